"""Environments as authors write them, in processes that they may hang or kill."""

from __future__ import annotations

import asyncio
import os
from typing import Literal, Optional

import pytest

from rl.config import EnvironmentUse
from rl.errors import RecipeError
from rl.sample import Prompt, ToolCall, ToolResult
from rollout.environments.protocol import (
    Environment,
    EnvironmentFailed,
    ToolError,
    answer,
    as_result,
    checked_arguments,
    describe_tool,
    tool,
)
from rollout.environments.registry import resolve
from rollout.environments.worker import EnvironmentPool
from tests.rollout.plugged import shout

PROMPT = Prompt(id="p", domain="d", messages=({"role": "user", "content": "Q"},))
MOODY = "tests.rollout.plugged:Moody"


def call(name: str, **arguments) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def search(
    query: str,
    limit: int = 5,
    kind: Literal["web", "news"] = "web",
    near: Optional[list[float]] = None,
    deep: bool = False,
) -> str:
    """Finds pages.

    Every word counts.
    query: words to look for
    limit: how many
    """
    return f"{query} {limit} {kind} {near} {deep}"


def test_a_tool_is_described_by_its_hints_and_its_docstring():
    assert describe_tool(search) == {
        "name": "search",
        "description": "Finds pages.\n\nEvery word counts.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "words to look for"},
                "limit": {"type": "integer", "description": "how many"},
                "kind": {"enum": ["web", "news"]},
                "near": {"type": "array", "items": {"type": "number"}},
                "deep": {"type": "boolean"},
            },
            "required": ["query"],
        },
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({}, "search needs the parameter 'query'"),
        ({"query": "x", "page": 1}, "search has no parameter 'page'; it has query, limit"),
        ({"query": 3}, "'query' must be of type string, not 3"),
        ({"query": "x", "limit": "3"}, "'limit' must be of type integer, not \"3\""),
        ({"query": "x", "limit": True}, "'limit' must be of type integer, not true"),
        ({"query": "x", "limit": 2.5}, "'limit' must be of type integer"),
        ({"query": "x", "kind": "old"}, "'kind' must be one of 'web', 'news', not 'old'"),
        ({"query": "x", "near": 1}, "'near' must be of type array"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(arguments, complaint):
    with pytest.raises(ToolError) as raised:
        checked_arguments(search, arguments)
    assert complaint in str(raised.value)


def test_arguments_that_fit_are_passed():
    given = checked_arguments(search, {"query": "x", "limit": 2.0, "near": None})
    assert search(**given) == "x 2 web None False" and isinstance(given["limit"], int)


def test_results_become_text():
    assert as_result("é") == ToolResult(text="é")
    assert as_result({"é": [1, None]}) == ToolResult(text='{"é": [1, null]}')
    assert as_result({1j}) == ToolResult(text="{1j}")


def test_tools_may_be_made_while_running_and_unknown_ones_are_named():
    class Late(Environment):
        def __init__(self) -> None:
            self.shout = tool(shout)

        @tool
        def first(self) -> str:
            return "1"

    late = Late()
    assert sorted(one["name"] for one in late.tools) == ["first", "shout"]
    assert asyncio.run(answer(late, call("shout", text="a", times=2))).text == "AA"
    unknown = asyncio.run(answer(late, call("x")))
    assert unknown.failed and "there is no tool 'x'; the tools are first, shout" in unknown.text


@pytest.mark.parametrize(
    ("use", "args", "complaint"),
    [
        ("serch", {}, "neither built in (did you mean 'search'?) nor a dotted path"),
        ("tests.rollout.plugged:Moody", {"begin": 1}, "does not take the argument 'begin'; known: start"),
        ("tests.rollout.plugged:nothing", {}, "has no 'nothing'"),
        ("tests.rollout.plugged:shout", {"times": 2}, "takes no args from the recipe"),
        ("pathlib:Path", {}, "does not derive from rollout.environments.protocol.Environment"),
    ],
)
def test_environments_that_cannot_be_are_refused(use, args, complaint):
    with pytest.raises(RecipeError) as raised:
        resolve(use, args)
    assert complaint in str(raised.value)


def with_environment(talk, use: str = MOODY, *, concurrency: int = 8, **args):
    """Runs ``talk(pool)`` with a pool of one kind of environment."""

    async def run():
        pool = EnvironmentPool(EnvironmentUse(use=use, args=args, concurrency=concurrency))
        try:
            return await talk(pool)
        finally:
            await pool.close()

    return asyncio.run(asyncio.wait_for(run(), 120))


def test_an_environment_of_ones_own_runs_in_another_process():
    async def talk(pool):
        async with pool.open(PROMPT) as environment:
            await environment.start()
            names = [one["name"] for one in environment.tools]
            first = await environment.call(call("add", amount=2))
            meeting = await asyncio.gather(*(environment.call(call("meet")) for _ in range(2)))
            refused = await environment.call(call("refuse"))
            pid = await environment.call(call("chatter"))
            said = [await environment.next_user_message(text) for text in ("a", "")]
            return names, first, meeting, refused, pid, said, await environment.final_state()

    names, first, meeting, refused, pid, said, state = with_environment(talk, start=40)
    assert sorted(names) == ["add", "chatter", "crash", "hang", "meet", "refuse"]
    assert first == ToolResult(text="at 42") and state == 42
    assert [one.text for one in meeting] == ["2", "2"]
    assert refused == ToolResult(text="error: not today", failed=True)
    assert int(pid.text) != os.getpid()
    assert said == ["you said a", None]


def test_a_function_is_an_environment():
    async def talk(pool):
        async with pool.open(PROMPT) as environment:
            await environment.start()
            return environment.tools, await environment.call(call("shout", text="a"))

    tools, result = with_environment(talk, "tests.rollout.plugged:shout")
    assert [one["name"] for one in tools] == ["shout"] and result.text == "A"


def test_processes_are_used_again_and_places_are_bounded():
    async def talk(pool):
        open_now, most, pids = 0, 0, []

        async def one():
            nonlocal open_now, most
            async with pool.open(PROMPT) as environment:
                open_now += 1
                most = max(most, open_now)
                await environment.start()
                pids.append((await environment.call(call("chatter"))).text)
                open_now -= 1
                return await environment.final_state()

        states = await asyncio.gather(*(one() for _ in range(12)))
        return states, most, pids

    states, most, pids = with_environment(talk, concurrency=2, start=1)
    assert states == [1] * 12 and most == 2 and len(set(pids)) == 2


def test_a_dying_or_hanging_tool_costs_its_own_environment_alone():
    async def talk(pool):
        async def broken(name):
            async with pool.open(PROMPT) as environment:
                await environment.start()
                own = (await environment.call(call("chatter"))).text
                try:
                    async with asyncio.timeout(1 if name == "hang" else None):
                        await environment.call(call(name))
                except (EnvironmentFailed, TimeoutError) as error:
                    return int(own), type(error).__name__
            raise AssertionError(f"{name} returned")

        async def sound():
            async with pool.open(PROMPT) as environment:
                await environment.start()
                values = []
                for _ in range(20):
                    values.append((await environment.call(call("add", amount=1))).text)
                    await asyncio.sleep(0.1)
                return values[-1]

        crash, hang, fine = await asyncio.gather(broken("crash"), broken("hang"), sound())
        return crash, hang, fine, await sound()

    (crashed, died), (hung, timed_out), fine, later = with_environment(talk)
    assert (died, timed_out, fine, later) == ("EnvironmentFailed", "TimeoutError", "at 20", "at 20")
    for pid in (crashed, hung):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_constructor_that_raises_fails_the_episode_when_it_starts():
    async def talk(pool):
        async with pool.open(PROMPT) as environment:
            await environment.start()

    with pytest.raises(EnvironmentFailed, match="for prompt p: ValueError: start is negative"):
        with_environment(talk, start=-1)
