"""Groups of episodes: many at once on one event loop, with places for environments, and a bad tool among them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from model.tokenizer import build_byte_tokenizer
from rl.config import Domain, EnvironmentUse, Sampling
from rl.errors import DataError, RunStopped
from rl.fault_log import FaultLog
from rl.sample import Prompt, Sample, Status
from rollout.conversation import Conversation
from rollout.engine import Completion, Finish, Request
from rollout.episodes import Episodes
from rollout.pool import EnginePool
from tests.rollout.plugged import Light

CALL = (
    'R</think>\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="ask">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    "<｜end▁of▁sentence｜>"
)
ANSWER = "R</think>42<｜end▁of▁sentence｜>"


class Seats:
    """Stands for the engine pool: every reply calls the tool until it has been answered twice."""

    max_context = 4000

    def __init__(self) -> None:
        tokenizer = build_byte_tokenizer()
        self.call, self.answer = (np.array(tokenizer.encode(text), np.int32) for text in (CALL, ANSWER))
        self.result = tokenizer.encode("<result>", add_special_tokens=False)
        self.seated: list[int] = []
        self.names: set[str] = set()
        self.failing = False
        self.faults = FaultLog()

    @contextmanager
    def seat(self, num_sequences: int) -> Iterator[Any]:
        self.seated.append(num_sequences)
        yield self.complete
        self.seated.remove(num_sequences)

    async def complete(self, request: Request) -> Completion:
        if self.failing:
            raise RunStopped("engine 0 of 1 died during generate")
        assert request.id not in self.names
        self.names.add(request.id)
        await asyncio.sleep(0.001)
        said = int((request.token_ids == 1).sum())  # replies so far, by their ends
        token_ids = self.call if said < 2 else self.answer
        return Completion(
            token_ids=token_ids,
            logprobs=np.full(len(token_ids), -0.1, np.float32),
            versions=np.zeros(len(token_ids), np.int32),
            kept=None,
            routes=None,
            routed=None,
            finish=Finish.STOP,
        )


def generate(*names: str, group: int, seats: Seats | None = None, **use: Any) -> list[list[Sample]]:
    """One group of episodes for each name, all at once."""
    seats = seats or Seats()
    environment = EnvironmentUse(use="tests.rollout.plugged:Light", **use)
    domains = {"d": Domain(prompts="x", environment=environment), "plain": Domain(prompts="x")}
    episodes = Episodes(domains, cast(EnginePool, seats), Conversation(build_byte_tokenizer()))
    assert "d" in episodes and "plain" not in episodes

    async def run() -> list[list[Sample]]:
        prompts = [Prompt(id=name, domain="d", messages=({"role": "user", "content": "Q"},)) for name in names]
        try:
            return await asyncio.gather(
                *(episodes.generate_group(prompt, Sampling(max_tokens=500), range(group)) for prompt in prompts)
            )
        finally:
            await episodes.close()

    Light.open_now = Light.most_open = 0
    done = asyncio.run(asyncio.wait_for(run(), 200))
    assert seats.seated == [] and Light.open_now == 0
    return done


@pytest.mark.parametrize(("places", "number"), [(500, 60), (2000, 200)])
def test_thousands_of_episodes_share_one_loop_and_bounded_places(places, number):
    """All of them are open at the same time where there are places enough."""
    threads = threading.active_count()
    groups = generate(*[f"doze{prompt}" for prompt in range(number)], group=10, concurrency=places)
    samples = [sample for group in groups for sample in group]
    assert len(samples) == 10 * number
    assert {(sample.status, len(sample.turns), sample.reply) for sample in samples} == {
        (Status.FINISHED, 3, "R</think>42")
    }
    assert [[sample.index for sample in group] for group in groups] == [list(range(10))] * number
    assert Light.most_open == places
    assert threading.active_count() <= threads + 2


def test_a_hanging_and_a_breaking_tool_cost_their_own_episodes():
    hung, broken, fine = generate("hang", "break", "fine", group=3, tool_timeout_s=2.0)
    assert [sample.status for sample in hung] == [Status.FAILED] * 3
    assert {sample.fault for sample in hung} == {"ask did not answer within 2 s"}
    assert {(sample.status, sample.fault) for sample in broken} == {(Status.FAILED, "the lights went out")}
    assert [sample.status for sample in fine] == [Status.FINISHED] * 3


def test_what_ends_a_run_comes_out_as_it_is():
    seats = Seats()
    seats.failing = True
    with pytest.raises(RunStopped, match="engine 0 of 1 died"):
        generate("p", group=4, seats=seats)
    assert Light.open_now == 0


def test_tools_count_when_prompts_are_held_against_the_window():
    conversation = Conversation(build_byte_tokenizer())
    fits = Prompt(id="fits", domain="d", messages=({"role": "user", "content": "Q"},))
    long = Prompt(id="long", domain="d", messages=({"role": "user", "content": "Q" * 40},))
    tool = {"name": "ask", "description": "", "parameters": {"type": "object", "properties": {}, "required": []}}
    shown = len(conversation.encode(long.messages, thinking=True, tools=[tool]))

    async def check(max_context: int, **use: Any) -> None:
        seats = Seats()
        seats.max_context = max_context
        domains = {"d": Domain(prompts="x", environment=EnvironmentUse(**use)), "plain": Domain(prompts="x")}
        episodes = Episodes(domains, cast(EnginePool, seats), conversation)
        try:
            await episodes.check_window([fits, replace(long, id="other", domain="plain"), long])
        finally:
            await episodes.close()

    light = "tests.rollout.plugged:Light"
    Light.open_now = 0
    asyncio.run(check(shown + 1, use=light))
    with pytest.raises(DataError, match=f"prompt long with its tools has {shown} tokens"):
        asyncio.run(check(shown, use=light))
    assert Light.open_now == 0
    # One that cannot even start says so in its episodes, which are counted.
    asyncio.run(check(2, use="tests.rollout.plugged:Moody", args={"start": -1}))


def test_a_prompt_of_token_ids_has_no_episode():
    async def run():
        domains = {"d": Domain(prompts="x", environment=EnvironmentUse(use="tests.rollout.plugged:Light"))}
        episodes = Episodes(domains, cast(EnginePool, Seats()), Conversation(build_byte_tokenizer()))
        await episodes.generate_group(Prompt(id="p", domain="d", token_ids=np.ones(3, np.int32)), Sampling(), [1])

    with pytest.raises(DataError, match="needs messages, not token ids"):
        asyncio.run(run())
