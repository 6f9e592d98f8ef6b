"""A judge that the run serves itself, and the recipe block that asks for one."""

import asyncio
import json

import pytest

from rewards.judge import Judge as JudgeClient
from rewards.judge import JudgeFailed, Spent
from rl.config import Judge, Model, Recipe
from rl.errors import RecipeError
from rl.initial_model import create_initial_model, initial_config
from rl.judge import endpoint, start_judge
from rl.recipe import load_recipe
from tests.rewards.judges import Form, judge_elsewhere
from tests.rl.tiny_runs import RECIPE, run_here


def test_a_model_of_ones_own_answers_as_an_endpoint_does(tmp_path, cluster):
    create_initial_model(initial_config(RECIPE["model"]["init"], 128), tmp_path / "judge", seed=0)
    judge = Judge(path=str(tmp_path / "judge"), dtype="float32", max_context=128, max_tokens=12, temperature=0.8)
    recipe = Recipe(name="judged", model=Model(path="policy"), judge=judge)
    wanted = {
        "type": "object",
        "properties": {"a": {"enum": [0, 0.5, 1]}},
        "required": ["a"],
        "additionalProperties": False,
    }

    async def ask() -> None:
        async with start_judge(recipe) as address:
            assert address is not None and address.structured
            client = JudgeClient(address)
            messages = [{"role": "user", "content": "2+2?"}]
            first, spent = await client.ask(messages, seed=1)
            again, _ = await client.ask(messages, seed=1)
            others = [(await client.ask(messages, seed=seed))[0] for seed in range(2, 6)]
            assert first == again and set(others) != {first}
            assert spent.calls == 1 and 4 < spent.tokens <= 128
            asked = (client.ask(messages, seed=seed, schema=wanted) for seed in range(32))
            assert {json.loads(said)["a"] for said, _ in await asyncio.gather(*asked)} == {0, 0.5, 1}
            with pytest.raises(JudgeFailed, match="refused with status 400"):
                await client.ask([{"role": "user", "content": "x" * 500}], seed=1)
            with pytest.raises(JudgeFailed, match="refused with status 400"):
                await client.ask([{"role": "judge", "content": "x"}], seed=1)
            with pytest.raises(JudgeFailed, match=r"refused with status 400.*the JSON schema cannot be followed"):
                await client.ask(messages, seed=1, schema={"type": "number", "minimum": 1, "maximum": 0})

    asyncio.run(ask())


def test_a_judge_thinks_freely_and_judges_by_the_schema(cluster):
    """Of random weights some thoughts end; what comes then is a verdict, and those that do not are no reply."""
    judge = Judge(
        init=RECIPE["model"]["init"], dtype="float32", max_context=512, max_tokens=400, thinking=True, temperature=0.8
    )
    recipe = Recipe(name="judged", model=Model(path="policy"), judge=judge)
    messages = [{"role": "user", "content": "2+2?"}]

    async def ask() -> list[tuple[str, Spent]]:
        async with start_judge(recipe) as address:
            assert address is not None
            client = JudgeClient(address)
            return await asyncio.gather(*(client.ask(messages, seed=seed, schema={"enum": [7]}) for seed in range(16)))

    replies = asyncio.run(ask())
    assert {said for said, _ in replies} == {"7", ""}
    assert (
        all(spent.tokens < 400 for said, spent in replies if said) and max(spent.tokens for _, spent in replies) > 400
    )


def test_a_run_learns_what_its_judge_likes(tmp_path, cluster, monkeypatch):
    """Two steps with a rubric as the reward, judged by an endpoint that counts what an answer is made of."""
    rubric = [{"name": "even", "criterion": "has few signs", "scale": 8}]
    lines = (json.dumps({"prompt": f"{n}=", "answer": {"rubric": rubric}}) for n in range(24))
    prompts = tmp_path / "judged.jsonl"
    prompts.write_text("".join(line + "\n" for line in lines))

    def says(form: Form) -> str:
        count = len(form.quoted["answer"]) % 9
        return form.verdict(lambda what, most: min(count, most) if "signs" in what else 0)

    with judge_elsewhere(says) as (url, key):
        monkeypatch.setenv("KEEL_TEST_JUDGE", key)
        status, run = run_here(
            tmp_path,
            f"domains.sums.prompts={prompts}",
            "domains.sums.rewards=[{use: rubric, args: {votes: 2}, timeout_s: 120}]",
            f"judge={{url: '{url}', model: m, api_key: KEEL_TEST_JUDGE, usd_per_million_input: 1.0}}",
        )
    assert status == 0
    assert len(run.steps) == 2
    for row in run.steps:
        assert 0 < row["reward/sums"] < 1 and row["samples/failed"] == 0
        assert row["reward/sums/rubric/judge_calls"] > 0 and row["reward/sums/rubric/judge_s"] > 0
        assert row["reward/sums/rubric/disagreement"] == row["reward/sums/rubric/tripped"] == 0
        assert 0 < row["reward/sums/rubric/judge_usd"] <= 2e-4


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
        ("{url: http://x, path: y, model: m}", "not url and path"),
        ("{init: {}, path: y}", "not path and init"),
        ("{url: http://x}", "judge.model is missing"),
        ("{url: 'judge:8000/v1', model: m}", "judge.url is judge:8000/v1; it must begin with http"),
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
