"""Environments that misbehave in every way, for the tests of the process that runs them."""

from __future__ import annotations

import asyncio
import os
import time

from rl.sample import Prompt
from rollout.environments.protocol import Environment, EnvironmentFailed, ToolError, tool


def shout(text: str, times: int = 1) -> str:
    """Says it louder.

    text: what to say
    """
    return text.upper() * times


class Moody(Environment):
    def __init__(self, prompt: Prompt, *, start: int = 0) -> None:
        if start < 0:
            raise ValueError("start is negative")
        self.value = start
        self.waiting = 0

    @tool
    def add(self, amount: int) -> str:
        self.value += amount
        return f"at {self.value}"

    @tool
    async def meet(self) -> int:
        """Returns only when two calls are waiting."""
        self.waiting += 1
        while self.waiting < 2:
            await asyncio.sleep(0.01)
        return self.waiting

    @tool
    def refuse(self) -> str:
        raise ToolError("not today")

    @tool
    def crash(self) -> str:
        os._exit(3)

    @tool
    def hang(self) -> str:
        time.sleep(600)
        return ""

    @tool
    def chatter(self) -> str:
        print("x" * 10)
        os.write(1, b"garbage on standard output")
        return str(os.getpid())

    async def next_user_message(self, answer: str) -> str | None:
        return f"you said {answer}" if answer else None

    def final_state(self) -> int:
        return self.value


class Insistent(Environment):
    """A user who is not content with the first answers; there are no tools."""

    def __init__(self, prompt: Prompt, *, times: int) -> None:
        self.times = times

    async def next_user_message(self, answer: str) -> str | None:
        self.times -= 1
        return "again" if self.times >= 0 else None


class Light(Environment):
    """A tool in the driver's own process; prompts named ``hang`` and ``break`` meet a bad one, ``doze`` a slow one."""

    isolated = False
    open_now = 0
    most_open = 0

    def __init__(self, prompt: Prompt) -> None:
        self.mood = prompt.id

    async def start(self) -> None:
        Light.open_now += 1
        Light.most_open = max(Light.most_open, Light.open_now)

    @tool
    async def ask(self) -> str:
        if self.mood == "hang":
            await asyncio.sleep(600)
        if self.mood == "break":
            raise EnvironmentFailed("the lights went out")
        await asyncio.sleep(0.3 if self.mood.startswith("doze") else 0.01)
        return "answered"

    async def close(self) -> None:
        Light.open_now -= 1
