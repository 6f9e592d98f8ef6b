"""Signals end a run between two steps, or at once when it is not in one, is asked twice, or takes too long."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from typing import Any

import pytest

from rl.stop import Stop


async def after(seconds: float, value: str) -> str:
    await asyncio.sleep(seconds)
    return value


def run(test: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(test)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_what_is_waited_for_and_nothing_else(number: int):
    async def test() -> list[str | None]:
        stop = Stop(grace_s=60)
        stop.listen()
        with stop.orderly():
            said = [await stop.unless(after(0, "first"))]
            asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), number)
            said.append(await stop.unless(after(60, "never")))
            # Something else that is under way goes on to its end.
            said.append(await after(0.05, "the step"))
            return [*said, await stop.unless(after(0, "not begun"))]

    assert run(test()) == ["first", None, "the step", None]


def test_what_is_there_when_the_signal_comes_is_not_lost():
    async def test() -> str | None:
        stop = Stop(grace_s=60)

        async def take() -> str:
            stop.ask()
            return "taken"

        with stop.orderly():
            return await stop.unless(take())

    assert run(test()) == "taken"


@pytest.mark.parametrize(
    ("grace_s", "asks", "orderly"),
    [(60.0, 1, False), (60.0, 2, True), (0.05, 1, True)],
    ids=["outside of training", "asked twice", "after the grace"],
)
def test_otherwise_a_signal_cancels(grace_s: float, asks: int, orderly: bool):
    async def test() -> None:
        stop = Stop(grace_s)
        for _ in range(asks):
            asyncio.get_running_loop().call_later(0.02, stop.ask)
        if orderly:
            with stop.orderly():
                await asyncio.sleep(60)
        await asyncio.sleep(60)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(test())


def test_an_error_of_what_is_waited_for_is_raised():
    async def fails() -> None:
        raise ValueError("rollouts")

    async def test() -> None:
        await Stop(grace_s=60).unless(fails())

    with pytest.raises(ValueError, match="rollouts"):
        run(test())
