"""A judge that the run serves itself, and the recipe block that asks for one."""

import asyncio
import logging
from collections.abc import Iterator

import pytest
import ray

from rewards.judge import Judge as JudgeClient
from rewards.judge import JudgeFailed
from rl.config import Judge, Model, Recipe
from rl.errors import RecipeError
from rl.initial_model import create_initial_model, initial_config
from rl.judge import endpoint, start_judge
from rl.recipe import load_recipe
from tests.rl.tiny_runs import RECIPE


@pytest.fixture
def cluster() -> Iterator[None]:
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    if started_here:
        ray.shutdown()


def test_a_model_of_ones_own_answers_as_an_endpoint_does(tmp_path, cluster):
    create_initial_model(initial_config(RECIPE["model"]["init"], 128), tmp_path / "judge", seed=0)
    judge = Judge(path=str(tmp_path / "judge"), dtype="float32", max_context=128, max_tokens=12, temperature=0.8)
    recipe = Recipe(name="judged", model=Model(path="policy"), judge=judge)

    async def ask() -> None:
        async with start_judge(recipe) as address:
            assert address is not None and not address.structured
            client = JudgeClient(address)
            messages = [{"role": "user", "content": "2+2?"}]
            first, spent = await client.ask(messages, seed=1)
            again, _ = await client.ask(messages, seed=1)
            others = [(await client.ask(messages, seed=seed))[0] for seed in range(2, 6)]
            assert first == again and set(others) != {first}
            assert spent.calls == 1 and 4 < spent.tokens <= 128
            with pytest.raises(JudgeFailed, match="refused with status 400"):
                await client.ask([{"role": "user", "content": "x" * 500}], seed=1)
            with pytest.raises(JudgeFailed, match="refused with status 400"):
                await client.ask([{"role": "judge", "content": "x"}], seed=1)

    asyncio.run(ask())


def test_an_endpoint_and_its_key(monkeypatch):
    judge = Judge(url="http://judge/v1", model="m", api_key="KEEL_TEST_KEY", attempts=7)
    monkeypatch.setenv("KEEL_TEST_KEY", "s3cret")
    address = endpoint(judge)
    assert (address.url, address.model, address.api_key, address.attempts) == ("http://judge/v1", "m", "s3cret", 7)
    assert "s3cret" not in repr(address)
    monkeypatch.delenv("KEEL_TEST_KEY")
    with pytest.raises(RecipeError, match="no variable KEEL_TEST_KEY"):
        endpoint(judge)


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("{url: http://x, path: y, model: m}", "either judge.url or judge.path"),
        ("{url: http://x}", "judge.model is missing"),
        ("{path: x, max_tokens: 16384}", "leaves no room"),
        ("{path: x, attempts: 0}", "judge.attempts is 0"),
    ],
)
def test_mistakes_in_the_block(tmp_path, block, problem):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: x\nmodel: {path: m}\ndomains: {math: {prompts: p.jsonl, rewards: [{use: rubric}]}}\n"
        + f"judge: {block}\n"
    )
    with pytest.raises(RecipeError, match=problem):
        load_recipe(recipe)
