"""A reward that a test holds up, and an environment that breaks; workers import them in no time."""

from __future__ import annotations

import os
import signal
import time

from rl.sample import Prompt, Sample
from rollout.environments.protocol import Environment
from tests.rl.tiny_rewards import evenness


def gated(sample: Sample, *, gate: str) -> float:
    """As ``evenness``, but not while the file ``gate`` is there: it holds the run up where a test wants it."""
    while os.path.exists(gate):
        time.sleep(0.02)
    return evenness(sample)


class Fragile(Environment):
    """The first one of a run only tells its tools. The process of the second one dies as it starts, and the third one
    never gets through with that; all others are fine."""

    def __init__(self, prompt: Prompt, *, flag: str) -> None:
        self.flag = flag

    async def start(self) -> None:
        if _is_first(f"{self.flag}-told"):
            return
        if _is_first(f"{self.flag}-died"):
            os.kill(os.getpid(), signal.SIGKILL)
        if _is_first(f"{self.flag}-hung"):
            time.sleep(600)


def _is_first(flag: str) -> bool:
    """Whether nobody has asked for this ``flag`` before."""
    try:
        os.close(os.open(flag, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
