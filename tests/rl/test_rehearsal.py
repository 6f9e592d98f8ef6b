"""`rl.train RECIPE --check`: what is wrong with a run's data and rewards is said, and nothing is started."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from rl.train import main
from tests.rl.tiny_runs import REWARDS, write_recipe

Capture = pytest.CaptureFixture[str]


def check(folder: Path, *overrides: str) -> int:
    code = main([str(write_recipe(folder)), f"runs={folder / 'runs'}", "--check", *overrides])
    assert not (folder / "runs").exists()
    return code


def test_a_run_that_is_in_order(tmp_path: Path, capsys: Capture):
    assert check(tmp_path, "evaluation.num_prompts=4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "sums: 20 prompts and 4 for evaluation; the longest has 9 of the 40 tokens of model.max_context"
    )
    assert lines[1].startswith("  evenness: ") and lines[1].endswith(" for the reply 0, tried on 20 of 20 prompts")
    assert lines[-1] == "nothing was started; this much is in order"


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        ("{use: my_rewards:f}", r"f: fails: reward 'my_rewards:f' cannot be imported: ModuleNotFoundError"),
        (f"{{use: {REWARDS}:evenness, args: {{targt: 1}}}}", r"evenness: fails: reward '"),
        ("{use: tests.rl.test_rehearsal:raises}", r"raises: fails for 24, tried on 24 of 24 prompts: raised KeyError"),
        (
            "{use: tests.rl.test_rehearsal:dies, retries: 0}",
            r"dies: fails for (\d+), tried on \1 of 24 prompts: ended",
        ),
    ],
)
def test_a_reward_that_cannot_be(reward: str, sentence: str, tmp_path: Path, capsys: Capture):
    assert check(tmp_path, f"domains.sums.rewards=[{{use: math_answer}}, {reward}]") == 1
    printed = capsys.readouterr().out
    assert "  math_answer: 0 for the reply 0" in printed or "  math_answer: 1 for the reply 0" in printed
    assert re.search(f"^  {sentence}", printed, re.MULTILINE)
    assert printed.endswith("nothing was started; rewards that failed: 1\n")


def test_prompts_that_a_reward_cannot_score(tmp_path: Path, capsys: Capture):
    lines = [{"prompt": "1+1=", "answer": 2}, {"prompt": "2+2="}, {"prompt": "3+3=", "answer": 6}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    use = ["domains.sums.rewards=[{use: math_answer}]", f"domains.sums.prompts={tmp_path / 'some.jsonl'}"]
    assert check(tmp_path, *use) == 1
    assert "math_answer: fails for 1, tried on 3 of 3 prompts: " in capsys.readouterr().out


def test_what_cannot_be_tried_is_said(tmp_path: Path, capsys: Capture):
    shown = ["domains.sums.rewards=[{use: rubric}]", "judge.url=http://127.0.0.1:9/v1", "judge.model=m"]
    assert check(tmp_path, *shown) == 0
    assert "  rubric: asks the judge; not tried" in capsys.readouterr().out


def test_rewards_of_episodes_are_imported_and_no_more(tmp_path: Path, capsys: Capture):
    tools = "domains.sums.environment.use=tests.rollout.plugged:shout"
    assert check(tmp_path, tools) == 0
    assert "  evenness: is there; not tried, as it scores what an environment leaves" in capsys.readouterr().out
    assert check(tmp_path, tools, f"domains.sums.rewards=[{{use: {REWARDS}:evennes}}]") == 1
    assert "did you mean 'evenness'?" in capsys.readouterr().out


def test_a_prompt_that_is_too_long_is_one_sentence(tmp_path: Path, capsys: Capture):
    assert check(tmp_path, "model.max_context=4", "sampling.max_tokens=2") == 1
    assert capsys.readouterr().err.startswith("keel: prompt sums/")


def raises(sample: object) -> float:
    raise KeyError("nope")


def dies(sample: object) -> float:
    os._exit(3)
