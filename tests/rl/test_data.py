"""What a run reads before it starts anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.config import Domain, Evaluation, Recipe, RewardUse, Supervised
from rl.data import load_data
from rl.errors import RecipeError
from rl.prompts import question
from rl.sample import Prompt


def echo(prompt: Prompt, rng: np.random.Generator) -> dict[str, str]:
    return {"content": str(prompt.messages[-1]["content"])}


def write(path: Path, questions: Sequence[str]) -> str:
    path.write_text("".join(json.dumps({"prompt": text, "answer": "1"}) + "\n" for text in questions))
    return str(path)


def recipe_of(num_eval: int, **sources: Any) -> Recipe:
    rewards = [RewardUse(use="math_answer")]
    domains = {name: Domain(thinking=False, rewards=rewards, **source) for name, source in sources.items()}
    return Recipe(name="data", domains=domains, evaluation=Evaluation(num_prompts=num_eval))


def test_no_domain_trains_on_what_another_one_is_evaluated_on(tmp_path: Path):
    shared = [f"shared {n}" for n in range(20)]
    plain = [f"plain {n}" for n in range(20)]
    sources = {
        "first": {"prompts": write(tmp_path / "first.jsonl", [*shared, *(f"a {n}" for n in range(20))])},
        "second": {"prompts": write(tmp_path / "second.jsonl", [*plain, *shared])},
        "third": {
            "prompts": write(tmp_path / "third.jsonl", [*plain, "only here"]),
            "eval_prompts": write(tmp_path / "apart.jsonl", [f"a {n}" for n in range(8)]),
            "system": "Other instructions do not make it another question.",
        },
    }
    data = load_data(recipe_of(8, **sources))
    assert len(data.evaluation) == 3 * 8
    asked = {question(prompt) for prompt in data.evaluation}
    for name, source in sources.items():
        whole = {f"user: {json.loads(line)['prompt']}" for line in Path(source["prompts"]).read_text().splitlines()}
        assert {question(prompt) for prompt in data.training if prompt.domain == name} == whole - asked
    assert {data.stream.next().id for _ in range(3 * 40)} == {prompt.id for prompt in data.training}


def test_demonstrations_are_called_over_what_is_left(tmp_path: Path):
    path = write(tmp_path / "p.jsonl", [f"q {n}" for n in range(12)])
    source = {"function": f"{__name__}:echo"}
    recipe = recipe_of(
        3, plain={"prompts": path}, other={"prompts": write(tmp_path / "o.jsonl", [f"q {n}" for n in range(8)])}
    )
    recipe = Recipe(
        name=recipe.name,
        domains=recipe.domains,
        evaluation=recipe.evaluation,
        supervised=Supervised(steps=1, demonstrations=source),
    )
    data = load_data(recipe)
    asked = {question(prompt) for prompt in data.evaluation}
    assert {question(demonstration.prompt) for demonstration in data.demonstrations} == {
        f"user: q {n}" for n in range(12)
    } - asked


def test_a_domain_that_others_leave_nothing_to_is_named(tmp_path: Path):
    recipe = recipe_of(
        4,
        wide={
            "prompts": write(tmp_path / "wide.jsonl", [f"w {n}" for n in range(9)]),
            "eval_prompts": write(tmp_path / "apart.jsonl", [f"n {n}" for n in range(4)]),
        },
        narrow={
            "prompts": write(tmp_path / "narrow.jsonl", [f"n {n}" for n in range(4)]),
            "eval_prompts": write(tmp_path / "own.jsonl", [f"o {n}" for n in range(4)]),
        },
    )
    with pytest.raises(RecipeError, match=r"domains\.narrow: every one of its prompts is held out"):
        load_data(recipe)
