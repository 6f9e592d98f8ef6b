import asyncio
import math
import os

import numpy as np
import pytest

from rewards.judge import JudgeAddress, appoint
from rewards.protocol import (
    BUILT_IN,
    MAX_COMMENT,
    Fault,
    Reward,
    check_names,
    part_name,
    read_result,
    read_results,
    resolve,
)
from rl.config import Domain, RewardUse
from rl.errors import RecipeError


def error(use: str, **settings) -> str:
    with pytest.raises(RecipeError) as raised:
        resolve(RewardUse(use=use, **settings))
    message = str(raised.value)
    assert "\n" not in message and use in message
    return message


def test_every_built_in_resolves():
    args = {"length_penalty": {"target": 1, "limit": 2}}
    asking = {"rubric", "rubric_comparison", "proof_generator", "proof_verifier"}
    appoint(JudgeAddress(url="http://judge", model="m"))
    for name in BUILT_IN:
        function = resolve(RewardUse(use=name, args=args.get(name, {})))
        assert (function.name, function.is_batched) == (name, name == "rubric_comparison")
        assert function.is_async == (name in asking | {"code_tests", "state_check"})
    appoint(None)


def test_a_dotted_path_from_the_current_directory(user_rewards, make_sample):
    function = resolve(RewardUse(use=f"{user_rewards}:brevity", args={"target": 2}))
    assert function.name == "brevity"
    assert function.call(make_sample("four")) == 0.5


def test_kinds_of_functions(user_rewards):
    kinds = {
        name: (function.is_async, function.is_batched)
        for name in ("brevity", "slow_but_sure", "ranks", "async_ranks")
        for function in [resolve(RewardUse(use=f"{user_rewards}:{name}"))]
    }
    assert kinds == {
        "brevity": (False, False),
        "slow_but_sure": (True, False),
        "ranks": (False, True),
        "async_ranks": (True, True),
    }


def test_a_class_is_constructed_with_the_arguments(user_rewards, make_sample):
    function = resolve(RewardUse(use=f"{user_rewards}:Counter", args={"start": 4}))
    assert [function.call(make_sample()), function.call(make_sample())] == [5, 6]
    assert "start must not be negative" in error(f"{user_rewards}:Counter", args={"start": -1})
    assert "needs the argument 'start'" in error(f"{user_rewards}:Counter")
    assert "__call__" in error(f"{user_rewards}:NotCallable")


def test_paths_that_lead_nowhere(user_rewards):
    assert "did you mean 'math_answer'?" in error("math_anwser")
    assert "my_package.rewards:brevity" in error("zzzzzz")
    assert "nor a dotted path such as my_rewards:brevity" in error("my_rewards.brevity")
    assert "write it as my_rewards:brevity" in error("my_rewards.py:brevity")
    assert "write it as mine.my_rewards:brevity" in error("./mine/my_rewards.py:brevity")
    assert f"No module named 'nowhere' (looked in {os.getcwd()})" in error("nowhere.at_all:f")
    assert "No module named 'a_package_that_is_not_there'" in error(f"{user_rewards}_broken:f")
    assert "not today" in error(f"{user_rewards}_exits:f")
    assert "did you mean 'brevity'?" in error(f"{user_rewards}:brevty")
    assert "is a int, not a function" in error(f"{user_rewards}:NUMBER")
    assert "not a dotted path" in error(f"{user_rewards}:")


def test_arguments_that_do_not_fit(user_rewards):
    assert "'tagret'; did you mean 'target'?" in error(f"{user_rewards}:brevity", args={"tagret": 3})
    assert "'sample'" in error(f"{user_rewards}:brevity", args={"sample": 3})
    assert "it takes none" in error(f"{user_rewards}:length", args={"x": 1})
    assert "needs the argument 'marker'" in error(f"{user_rewards}:flaky")
    assert "needs the arguments 'target', 'limit'" in error("length_penalty")
    assert "below limit" in error("length_penalty", args={"target": 5, "limit": 5})
    assert "'english'" in error("language_consistency", args={"language": "english"})
    assert "timeout_s" in error("format", timeout_s=0)
    assert "weight" in error("format", weight=math.nan)


def test_names():
    assert part_name(RewardUse(use="a.b:brevity")) == "brevity"
    assert part_name(RewardUse(use="format")) == "format"
    assert part_name(RewardUse(use="format", name="form")) == "form"
    with pytest.raises(RecipeError, match=r"domains\.math has no rewards"):
        check_names("math", Domain(prompts="x"))
    twice = [RewardUse(use="format"), RewardUse(use="a.b:format")]
    with pytest.raises(RecipeError, match="two rewards called 'format'"):
        check_names("math", Domain(prompts="x", rewards=twice))


@pytest.mark.parametrize("value", [1, 0.5, True, np.float32(0.5), np.int64(3), np.bool_(True)])
def test_numbers_are_rewards(value):
    assert read_result(value) == Reward(float(value))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "returned None, which is not a number"),
        ("good", "returned 'good', which is not a number"),
        (math.nan, "returned nan, which is not finite"),
        (-math.inf, "returned -inf, which is not finite"),
        (10**400, "not finite"),
        (Reward(1.0, {"style": math.inf}), "the part 'style' as inf, which is not finite"),
        (Reward(1.0, [1, 2]), "as parts"),  # type: ignore[arg-type]
        (Reward(1.0, comment=7), "returned 7 as comment, which is not a text"),  # type: ignore[arg-type]
        ([1.0], "returned [1.0], which is not a number"),
    ],
)
def test_what_is_no_reward(value, reason):
    outcome = read_result(value)
    assert isinstance(outcome, Fault) and reason in outcome.reason


def test_a_comment_is_kept_up_to_its_limit():
    outcome = read_result(Reward(1.0, {"style": 1}, comment="x" * (MAX_COMMENT + 5)))
    assert outcome == Reward(1.0, {"style": 1.0}, comment="x" * MAX_COMMENT)


def test_a_coroutine_asks_for_async_def():
    async def score() -> float:
        return 1.0

    coroutine = score()
    outcome = read_result(coroutine)
    assert isinstance(outcome, Fault) and "async def" in outcome.reason
    assert asyncio.run(coroutine) == 1.0


def test_batches_give_one_result_for_each_sample():
    assert read_results(np.array([1, 2]), 2) == [Reward(1.0), Reward(2.0)]
    mixed = read_results([1, "x"], 2)
    assert mixed[0] == Reward(1.0) and isinstance(mixed[1], Fault)
    assert read_results([1.0], 2) == [Fault("returned 1 results for 2 samples")] * 2
    assert all(isinstance(outcome, Fault) for outcome in read_results(1.0, 2))
