"""An environment that answers what a test says, and episodes in it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from rl.choices import ContextStrategy
from rl.config import EnvironmentUse, Sampling
from rl.sample import Prompt, Sample, ToolCall, ToolResult
from rollout.conversation import Conversation
from rollout.engine import Completion, Request
from rollout.environments.protocol import Environment
from rollout.episode import Attempt, Episode

ASK = {"role": "user", "content": "Q1"}
STRATEGIES = [ContextStrategy.none, ContextStrategy.discard_75, ContextStrategy.discard_all, ContextStrategy.summary]


class World(Environment):
    """Answers with what the test says; ``users`` are the messages that follow final answers."""

    isolated = False

    def __init__(
        self, answer: Callable[[ToolCall], Any] | None = None, users: Sequence[str] = (), *, shown: bool = True
    ) -> None:
        self.shown = shown
        self.answer = answer or (lambda call: f"{call.name} says hi")
        self.users = list(users)
        self.called: list[ToolCall] = []
        self.is_closed = False

    @property
    def tools(self):
        return [{"name": "f", "description": "", "parameters": {"type": "object"}}] if self.shown else []

    async def call(self, call: ToolCall) -> ToolResult | str:
        self.called.append(call)
        result = self.answer(call)
        return await result if isinstance(result, Awaitable) else result

    async def next_user_message(self, answer: str) -> str | None:
        return self.users.pop(0) if self.users else None

    def final_state(self) -> Any:
        return {"calls": len(self.called)}


def episode(
    world: Environment,
    complete: Callable[[Request], Awaitable[Completion]],
    conversation: Conversation,
    *,
    thinking: bool = True,
    max_context: int = 4000,
    sampling: Sampling | None = None,
    messages: Sequence[Any] = (ASK,),
    seed: int = 0,
    **budgets: Any,
) -> Sample:
    prompt = Prompt(id="p", domain="d", messages=tuple(messages), thinking=thinking)
    use = EnvironmentUse(use="test", **budgets)
    running = Episode(
        Attempt(prompt=prompt, index=0, seed=seed, name="p#0"),
        world,
        use,
        complete=complete,
        conversation=conversation,
        sampling=sampling or Sampling(max_tokens=1000),
        max_context=max_context,
    )
    return asyncio.run(running.run())
