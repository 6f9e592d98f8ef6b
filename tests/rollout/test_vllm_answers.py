"""Waiting for vLLM's own processes, with processes of our own in their place."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from rollout.engine import EngineDied
from rollout.vllm_engine import answered


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """It answers nothing."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def test_an_answer_is_handed_on(process: subprocess.Popen[bytes]):
    async def answer() -> str:
        await asyncio.sleep(0.01)
        return "here"

    assert asyncio.run(answered(answer(), lambda: process.poll() is not None)) == "here"


def test_a_process_that_dies_without_an_answer_is_noticed(process: subprocess.Popen[bytes]):
    async def run() -> float:
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asking = asyncio.create_task(answered(never, lambda: process.poll() is not None))
        await asyncio.sleep(0.2)
        assert not asking.done()
        process.kill()
        began = time.monotonic()
        with pytest.raises(EngineDied, match="own process died"):
            await asking
        assert never.cancelled()
        return time.monotonic() - began

    assert asyncio.run(asyncio.wait_for(run(), 20)) < 5


def test_who_stops_waiting_gives_the_question_up(process: subprocess.Popen[bytes]):
    async def run() -> None:
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asking = asyncio.create_task(answered(never, lambda: process.poll() is not None))
        await asyncio.sleep(0.05)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert never.cancelled()

    asyncio.run(run())
