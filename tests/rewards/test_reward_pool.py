import asyncio
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.pool import Failure, RewardPool
from rl.config import Domain, RewardUse
from rl.errors import RecipeError
from rl.sample import Kept, Sample, Scored, Status
from rl.selections import Selections
from tests.rewards.conftest import USER_REWARDS

pytestmark = pytest.mark.usefixtures("cluster")


def score(uses: list[RewardUse], samples: list[Sample], num_workers: int = 1) -> list[Scored | Failure]:
    return with_pool(uses, lambda pool: pool.score_group(samples), num_workers)


def with_pool(uses: list[RewardUse], body: Callable[[RewardPool], Awaitable[Any]], num_workers: int = 1) -> Any:
    async def run() -> Any:
        domains = {"math": Domain(prompts="-", rewards=uses)}
        pool = await RewardPool.start(domains, num_workers=num_workers)
        try:
            return await body(pool)
        finally:
            await pool.close()

    return asyncio.run(run())


def reasons(outcomes: list[Scored | Failure]) -> list[str | float]:
    return [outcome.reward if isinstance(outcome, Scored) else str(outcome) for outcome in outcomes]


def test_weighted_sum_and_parts(user_rewards, make_sample):
    uses = [
        RewardUse(use="math_answer"),
        RewardUse(use=f"{user_rewards}:with_parts", weight=0.5, name="judge"),
        RewardUse(use="length_penalty", weight=0.1, args={"target": 1, "limit": 5}),
        RewardUse(use=f"{user_rewards}:slow_but_sure", weight=2.0),
        RewardUse(use=f"{user_rewards}:ranks", weight=1.0),
    ]
    right, wrong = score(uses, [make_sample("it is $4$"), make_sample("5", index=1)])
    assert isinstance(right, Scored) and isinstance(wrong, Scored)
    assert right.parts == {
        "math_answer": 1.0,
        "math_answer/undecided": 0.0,
        "judge": 0.5,
        "judge/style": 0.25,
        "judge/facts": 0.75,
        "length_penalty": -0.5,
        "slow_but_sure": 1.0,
        "ranks": 1.0,
    }
    assert right.comments == {"judge": "dull"}
    assert right.reward == pytest.approx(1.0 + 0.25 - 0.05 + 2.0 + 1.0)
    assert wrong.reward == pytest.approx(0.0 + 0.25 - 0.05 + 2.0 + 0.0)


def line_of(code: str) -> int:
    (number,) = (number for number, line in enumerate(USER_REWARDS.splitlines(), 1) if code in line)
    return number


def test_faults_of_functions_are_failures_with_a_sentence(user_rewards, make_sample):
    expected = {
        "raises": f"raised KeyError: 'no such rubric' ({user_rewards}.py:{line_of('no such rubric')})",
        "leaves": f"raised SystemExit: 3 ({user_rewards}.py:{line_of('SystemExit(3)')})",
        "returns_text": "returned 'good', which is not a number",
        "returns_nan": "returned nan, which is not finite",
        "async_raises": f"raised RuntimeError: judge is offline ({user_rewards}.py:{line_of('judge is offline')})",
        "too_few": "returned 1 results for 2 samples",
    }

    async def all_of(pool: RewardPool) -> list[list[Scored | Failure]]:
        return [await pool.score_group([sample(name, 0), sample(name, 1)]) for name in expected]

    def sample(domain: str, index: int) -> Sample:
        return make_sample(domain=domain, index=index)

    async def run() -> None:
        domains = {name: Domain(prompts="-", rewards=[RewardUse(use=f"{user_rewards}:{name}")]) for name in expected}
        pool = await RewardPool.start(domains)
        for name, outcomes in zip(expected, await all_of(pool), strict=True):
            assert [str(outcome) for outcome in outcomes] == [
                f"reward {name} on sample {name}/1#{index} {expected[name]}" for index in (0, 1)
            ]
        await pool.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("function", "word", "timeout_s", "reason"),
    [
        ("hangs_on_hang", "hang", 0.5, "took longer than its timeout of 0.5 s"),
        ("holds_the_interpreter", "hang", 0.5, "took longer than its timeout of 0.5 s"),
        ("never_on_hang", "hang", 0.5, "took longer than its timeout of 0.5 s"),
        ("dies_on_die", "die", 30.0, "ended or crashed its process"),
        ("crashes_on_crash", "crash", 30.0, "ended or crashed its process"),
    ],
)
def test_only_the_sample_at_fault_fails_and_the_pool_works_on(
    user_rewards, make_sample, function, word, timeout_s, reason
):
    uses = [
        RewardUse(use=f"{user_rewards}:{function}", timeout_s=timeout_s, retries=0),
        RewardUse(use=f"{user_rewards}:length"),
    ]
    samples = [make_sample(reply, index=index) for index, reply in enumerate(["ok", word, "fine"])]

    async def body(pool: RewardPool) -> tuple[list[Scored | Failure], ...]:
        return await pool.score_group(samples), await pool.score_group([samples[0], samples[2]])

    first, second = with_pool(uses, body)
    assert reasons(first) == [3.0, f"reward {function} on sample math/1#1 {reason}", 5.0]
    assert reasons(second) == [3.0, 5.0]


def test_an_async_function_that_blocks_does_not_take_others_along(user_rewards, make_sample, monkeypatch):
    uses = [RewardUse(use=f"{user_rewards}:blocks_on_hang", timeout_s=0.5, retries=0)]

    async def body(pool: RewardPool) -> tuple[list[Scored | Failure], ...]:
        bad = [make_sample("ok"), make_sample("hang", index=1)]
        good = [make_sample("ok", index=2), make_sample("ok", index=3)]
        return await asyncio.gather(pool.score_group(bad), pool.score_group(good), pool.score_group(good))

    monkeypatch.setattr("rewards.pool.GRACE_S", 1.0)
    bad, *good = with_pool(uses, body)
    assert reasons(bad)[0] == 1.0
    assert "took longer than its timeout" in str(bad[1])
    assert [reasons(outcomes) for outcomes in good] == [[1.0, 1.0]] * 2


def test_what_goes_wrong_once_is_tried_again(user_rewards, make_sample, tmp_path):
    flaky = RewardUse(use=f"{user_rewards}:flaky", args={"marker": str(tmp_path / "a")})
    assert reasons(score([flaky], [make_sample()])) == [1.0]
    dies = RewardUse(use=f"{user_rewards}:dies_once", args={"marker": str(tmp_path / "b")}, retries=1)
    assert reasons(score([dies], [make_sample()])) == [1.0]
    unforgiven = RewardUse(use=f"{user_rewards}:flaky", args={"marker": str(tmp_path / "c")}, retries=0)
    assert "first time" in str(reasons(score([unforgiven], [make_sample()]))[0])


def test_async_rewards_of_many_groups_overlap(user_rewards, make_sample):
    uses = [RewardUse(use=f"{user_rewards}:slow_but_sure")]

    async def body(pool: RewardPool) -> float:
        began = time.perf_counter()
        groups = [[make_sample(index=i) for i in range(4)] for _ in range(10)]
        await asyncio.gather(*(pool.score_group(group) for group in groups))
        return time.perf_counter() - began

    assert with_pool(uses, body) < 3.0  # one after another, 40 calls of 0.3 s take 12 s


def test_a_cached_outcome_is_not_called_for_again(user_rewards, make_sample):
    """Counter counts its calls."""
    uses = [RewardUse(use=f"{user_rewards}:Counter", args={"start": 0}, cache=True)]
    first, second, third = (make_sample("a"), make_sample("b", index=1), make_sample("a", index=2))
    other = replace(first, final_state="another")
    outcomes = score(uses, [first, second, third, other])
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)] == [1, 2, 1, 3]


def test_async_rewards_that_wait_for_their_turn(user_rewards, make_sample):
    """Never two at the same time, and the time spent waiting is not held against them."""
    uses = [RewardUse(use=f"{user_rewards}:OneAtATime", timeout_s=1.5, retries=0)]

    async def body(pool: RewardPool) -> list[list[Scored | Failure]]:
        groups = [[make_sample(index=i) for i in range(6)] for _ in range(3)]
        return await asyncio.gather(*(pool.score_group(group) for group in groups))

    outcomes = [outcome for group in with_pool(uses, body) for outcome in group]
    assert [outcome.reward for outcome in outcomes if isinstance(outcome, Scored)] == [1.0] * 18


def test_sync_functions_run_on_main_threads_of_several_processes(user_rewards, make_sample):
    async def body(pool: RewardPool) -> list[list[Scored | Failure]]:
        return await asyncio.gather(*(pool.score_group([make_sample()]) for _ in range(16)))

    groups = with_pool([RewardUse(use=f"{user_rewards}:where")], body, num_workers=2)
    parts = [outcome.parts for group in groups for outcome in group]
    assert all(part["where/main"] == 1.0 for part in parts)
    assert len({part["where/pid"] for part in parts}) == 2


def test_rewards_do_not_see_the_environment_of_the_run(user_rewards, make_sample):
    assert "PYTEST_VERSION" in os.environ  # as it was when the cluster started
    uses = [RewardUse(use=f"{user_rewards}:sees", args={"name": "PYTEST_VERSION"})]
    (outcome,) = score(uses, [make_sample()])
    assert isinstance(outcome, Scored) and outcome.parts["sees"] == 0.0 and outcome.parts["sees/path"] == 1.0


def test_forgotten_variables_are_gone_from_memory_too():
    script = """
import os
from rl.environ import forget_environment
forget_environment(keep={"GIVEN": os.environ["GIVEN"]})
with open("/proc/self/environ", "rb") as file:
    initial = file.read()
print("SECRET_KEY" in os.environ, b"s3cret" in initial, os.environ["GIVEN"], b"stays" in initial, "PATH" in os.environ)
"""
    env = {**os.environ, "SECRET_KEY": "s3cret", "GIVEN": "stays", "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert ended.stdout == "False False stays False True\n", ended.stderr


def test_samples_that_did_not_end_properly_are_failures(make_sample):
    samples = [make_sample(), make_sample(index=1, status=Status.ABORTED), make_sample(index=2)]
    first, aborted, last = score([RewardUse(use="math_answer")], samples)
    assert isinstance(first, Scored) and isinstance(last, Scored)
    assert first.sample is samples[0] and last.sample is samples[2]
    assert str(aborted) == "reward generation on sample math/1#1 ended as aborted"


def test_routes_and_kept_sets_come_back_though_they_do_not_travel(make_sample):
    sample = make_sample()
    kept = Kept.from_rows([np.array([], np.int32)] * 2 + [np.array([token]) for token in (2, 3, 4)])
    selections = Selections.of(np.array([[[0, 1]], [[1, 2]]]), np.array([0, 0, 1, 1, 0], bool))
    sample = replace(sample, routes=np.zeros((5, 2, 2), np.uint8), kept=kept, selections=selections)

    async def body(pool: RewardPool) -> tuple[Scored | Failure, list[Scored | Failure]]:
        return await pool.score(sample), await pool.score_group([])

    scored, nothing = with_pool([RewardUse(use="format")], body)
    assert isinstance(scored, Scored) and scored.sample is sample and nothing == []


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        ("{}:brevty", "did you mean 'brevity'?"),
        ("{}_broken:f", "a_package_that_is_not_there"),
        ("{}_crashes:f", "ended or crashed their process"),
    ],
)
def test_a_reward_that_cannot_be_used_ends_the_start_in_one_sentence(user_rewards, tmp_path, use, sentence):
    (tmp_path / f"{user_rewards}_crashes.py").write_text("import os\nos._exit(1)\n")
    with pytest.raises(RecipeError) as raised:
        with_pool([RewardUse(use=use.format(user_rewards))], lambda pool: asyncio.sleep(0))
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_a_group_costs_milliseconds(make_sample):
    uses = [RewardUse(use="format"), RewardUse(use="length_penalty", args={"target": 1, "limit": 5})]

    async def body(pool: RewardPool) -> float:
        group = [make_sample(index=i) for i in range(8)]
        seconds = []
        for _ in range(100):
            began = time.perf_counter()
            await pool.score_group(group)
            seconds.append(time.perf_counter() - began)
        return statistics.quantiles(seconds, n=4)[0]

    assert with_pool(uses, body) < 0.03  # 2 ms on an idle machine; the bound is for a busy one
