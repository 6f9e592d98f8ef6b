"""Rewards over an episode's turns and its environment's final state."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.reply import reasoning, tool_calls
from rewards.state_check import StateCheck
from rewards.test_suite import TestSuite, read_junit
from rewards.tool_protocol import tool_protocol
from rl.sample import ToolCall, ToolResult, Turn

CALL, GOOD, BAD = ToolCall(name="f"), ToolResult(text="1"), ToolResult(text="no", failed=True)


def test_tool_protocol(make_sample):
    turns = (
        Turn(reply="", calls=(CALL, CALL), results=(GOOD, BAD)),
        Turn(reply="", malformed="no name", results=(BAD,)),
        Turn(reply="4"),
    )
    sample = replace(make_sample("4"), turns=turns)
    outcome = tool_protocol(sample)
    assert outcome.value == pytest.approx(-1 / 3)
    assert outcome.parts == {"malformed": pytest.approx(1 / 3), "failed": 0.5, "calls": 2.0}
    assert tool_calls(sample) == (CALL, CALL)


@pytest.mark.parametrize(
    "piece", ["<｜DSML｜invoke", "</｜DSML｜function_calls>", "<function_calls>", "<function_results>"]
)
def test_pieces_of_calls_outside_of_calls(make_sample, piece):
    assert tool_protocol(make_sample(f"it is 4 {piece}")).value == -1
    assert tool_protocol(make_sample(f"{piece}</think>4", thinking=True)).value == 0
    assert tool_protocol(make_sample("it is 4")).value == 0


def test_reasoning_of_every_turn(make_sample):
    turns = (Turn(reply="first</think>"), Turn(reply="</think>x"), Turn(reply="second</think>4"))
    sample = replace(make_sample("second</think>4", thinking=True), turns=turns)
    assert reasoning(sample) == "first\n\nsecond"


names = st.sampled_from(["a", "b", "c", "d"])


@given(
    st.sets(names, min_size=1), st.sets(names), st.dictionaries(names, st.sampled_from(["passed", "failed", "skipped"]))
)
def test_test_suite(make_sample, fail_to_pass, pass_to_pass, tests):
    asked = {"fail_to_pass": sorted(fail_to_pass), "pass_to_pass": sorted(pass_to_pass)}
    sample = replace(make_sample("", answer=asked), final_state={"tests": tests})
    passed = {name for name, outcome in tests.items() if outcome == "passed"}
    assert TestSuite()(sample).value == float(fail_to_pass | pass_to_pass <= passed)
    share = len(fail_to_pass & passed) / len(fail_to_pass)
    assert TestSuite(partial=True)(sample).value == pytest.approx(share if pass_to_pass <= passed else 0)


def test_tests_that_could_not_be_run(make_sample):
    sample = make_sample("", answer={"fail_to_pass": ["a"]})
    for state in (None, {}, {"tests": None}, "x"):
        outcome = TestSuite()(replace(sample, final_state=state))
        assert (outcome.value, outcome.parts["not_run"]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="needs fail_to_pass"):
        TestSuite()(make_sample("", answer={"pass_to_pass": ["a"]}))


def test_junit_reports():
    report = """<testsuites><testsuite>
        <testcase classname="tests.t" name="good"/>
        <testcase classname="tests.t" name="bad"><failure message="x">assert</failure></testcase>
        <testcase classname="tests.t" name="torn"><error/></testcase>
        <testcase name="left"><skipped/></testcase>
        <testcase classname="tests.t" name="twice"><failure/></testcase>
        <testcase classname="tests.t" name="twice"/>
    </testsuite></testsuites>"""
    assert read_junit(report) == {
        "tests.t::good": "passed",
        "tests.t::bad": "failed",
        "tests.t::torn": "error",
        "left": "skipped",
        "tests.t::twice": "failed",
    }
    with pytest.raises(ValueError, match="not XML"):
        read_junit("passed")
    with pytest.raises(ValueError, match="entities"):
        read_junit('<!DOCTYPE x [<!ENTITY a "aaaa">]><testsuite/>')


def test_a_verifier_of_ones_own(make_sample, user_rewards, tmp_path):
    (tmp_path / "my_verifiers.py").write_text(
        "def at(state, answer): return state['at'] == answer\n"
        "async def share(state): return len(state) / 4\n"
        "def too_much(state): return 7\n"
    )
    check = StateCheck(verifier="my_verifiers:at")
    assert asyncio.run(check(replace(make_sample(answer="home"), final_state={"at": "home"}))).value == 1.0
    assert asyncio.run(check(replace(make_sample(answer="home"), final_state={"at": "work"}))).value == 0.0
    assert asyncio.run(check(replace(make_sample(answer="home"), final_state=None))).parts == {"raised": 1.0}
    share = StateCheck(verifier="my_verifiers:share")
    assert asyncio.run(share(replace(make_sample(), final_state=[1, 2]))).value == 0.5
    with pytest.raises(ValueError, match="returned 7"):
        asyncio.run(StateCheck(verifier="my_verifiers:too_much")(make_sample()))


VERIFIER = """
def verify(state, answer):
    cities = [day["city"] for day in state]
    return len(cities) == answer["days"] and len(set(cities)) == len(cities)
"""


@pytest.mark.parametrize(
    ("state", "value", "raised"),
    [
        ([{"city": "A"}, {"city": "B"}], 1.0, 0.0),
        ([{"city": "A"}, {"city": "A"}], 0.0, 0.0),
        ("nonsense", 0.0, 1.0),
        (None, 0.0, 1.0),
    ],
)
def test_a_verifier_that_comes_with_the_prompt(make_sample, state, value, raised):
    sample = replace(make_sample(answer={"verifier": VERIFIER, "days": 2}), final_state=state)
    outcome = asyncio.run(StateCheck()(sample))
    assert (outcome.value, outcome.parts["raised"]) == (value, raised)


def test_a_verifier_is_confined(make_sample, tmp_path):
    source = f"def verify(state):\n    open({str(tmp_path / 'x')!r}, 'w')\n    return 1"
    sample = replace(make_sample(answer={"verifier": source}), final_state=1)
    assert asyncio.run(StateCheck()(sample)).parts == {"raised": 1.0}
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="has no verifier"):
        asyncio.run(StateCheck()(make_sample(answer="4")))
