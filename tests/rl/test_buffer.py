"""The buffer's promises, in simulated time: nothing late, nothing lost, nothing twice, no deadlock."""

import asyncio
import selectors
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.buffer import GroupBuffer, Ticket, staleness
from rl.sample import Group, Prompt, Sample, Scored


def group(name, *, versions=(0,)):
    """A group of one sample: an unsampled token, then one token per entry of ``versions``."""
    prompt = Prompt(id=str(name), domain="d", token_ids=np.zeros(1, np.int32))
    length = 1 + len(versions)
    sample = Sample(
        prompt=prompt,
        token_ids=np.zeros(length, np.int32),
        sampled=np.arange(length) > 0,
        rollout_logprobs=np.zeros(length, np.float32),
        versions=np.array([-1, *versions], np.int32),
    )
    return Group(prompt=prompt, scored=(Scored(sample=sample, reward=0.0),))


class Deadlock(AssertionError):
    """Every task waits for another one."""


class SimulatedTime(selectors.DefaultSelector):
    """Makes an event loop jump to its next timer; with neither timers nor ready tasks, nothing can ever happen."""

    now = 0.0

    def select(self, timeout=None):
        if timeout is None:
            raise Deadlock
        self.now += timeout
        return super().select(0)


def simulate(main):
    """Runs the coroutine to its end in no time. Returns its result."""
    clock = SimulatedTime()
    loop = asyncio.SelectorEventLoop(clock)
    loop.time = lambda: clock.now
    try:
        return loop.run_until_complete(asyncio.wait_for(main, None))
    finally:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


@dataclass(frozen=True)
class World:
    """How long things take, by the number of the ticket."""

    prompts_per_step: int
    max_staleness: int
    steps: int
    bounded: bool
    concurrency: int
    durations: tuple[float, ...]
    train_time: float
    drops: frozenset[int]

    def duration(self, number):
        return self.durations[number % len(self.durations)]


worlds = st.builds(
    World,
    prompts_per_step=st.integers(1, 4),
    max_staleness=st.integers(0, 3),
    steps=st.integers(1, 8),
    bounded=st.booleans(),
    concurrency=st.integers(1, 20),
    durations=st.lists(st.sampled_from([0.0, 0.1, 1.0, 3.0, 10.0, 40.0]), min_size=1, max_size=13).map(tuple),
    train_time=st.sampled_from([0.0, 1.0, 5.0]),
    drops=st.frozensets(st.integers(0, 40), max_size=10),
)


async def run(world):
    """The loop of the driver. Returns the buffer, the tickets it issued, and (version, groups) of every step."""
    buffer = GroupBuffer(
        prompts_per_step=world.prompts_per_step,
        max_staleness=world.max_staleness,
        steps=world.steps if world.bounded else None,
    )
    issued: list[Ticket] = []
    slots = asyncio.Semaphore(world.concurrency)

    async def generate(ticket):
        await asyncio.sleep(world.duration(ticket.number) / 2)
        middle = buffer.version
        await asyncio.sleep(world.duration(ticket.number) / 2)
        slots.release()
        if ticket.number in world.drops:
            buffer.drop(ticket, "failed")
        else:
            buffer.add(ticket, group(ticket.number, versions=(ticket.version, middle, buffer.version)))

    async def produce(tasks):
        while True:
            await slots.acquire()
            issued.append(await buffer.admission())
            tasks.create_task(generate(issued[-1]))

    steps = []
    async with asyncio.TaskGroup() as tasks:
        producer = tasks.create_task(produce(tasks))
        for version in range(world.steps):
            steps.append((version, await buffer.take(world.prompts_per_step)))
            await asyncio.sleep(world.train_time)
            buffer.advance(version + 1)
        await asyncio.sleep(1e6)
        producer.cancel()
    return buffer, issued, steps


@given(worlds)
@settings(max_examples=300, deadline=None)
def test_promises_hold_in_every_world(world):
    buffer, issued, steps = simulate(run(world))
    trained = [(version, int(group.prompt.id)) for version, groups in steps for group in groups]
    numbers = [number for _, number in trained]

    assert all(len(groups) == world.prompts_per_step for _, groups in steps)
    assert len(set(numbers)) == len(numbers), "trained twice"
    assert all(version <= issued[number].version + world.max_staleness for version, number in trained), "trained late"
    assert max(staleness(groups, version).max for version, groups in steps) <= world.max_staleness

    dropped = {ticket.number for ticket in issued} & world.drops
    assert buffer.dropped["failed"] == len(dropped) and not dropped & set(numbers)
    kept_for_later = len(issued) - len(dropped) - len(numbers)
    later_steps = 0 if world.bounded else world.max_staleness + 1
    assert kept_for_later <= later_steps * world.prompts_per_step
    if world.concurrency > 16:
        assert kept_for_later == later_steps * world.prompts_per_step, "a place was lost"

    if world.max_staleness == 0:
        assert all(version == issued[number].version for version, number in trained), "not in lock-step"


@given(worlds)
@settings(max_examples=100, deadline=None)
def test_a_simulation_repeats_itself(world):
    first, second = (simulate(run(world))[2] for _ in range(2))
    assert [[g.prompt.id for g in groups] for _, groups in first] == [
        [g.prompt.id for g in groups] for _, groups in second
    ]


def test_the_simulation_notices_a_deadlock():
    async def never_added():
        buffer = GroupBuffer(prompts_per_step=1, max_staleness=0)
        await buffer.admission()
        await buffer.take(1)

    with pytest.raises(Deadlock):
        simulate(never_added())


async def admit(buffer, count):
    return [await asyncio.wait_for(buffer.admission(), 1) for _ in range(count)]


async def is_blocked(awaitable):
    """Whether it still waits after everything else had its turn; it is cancelled then."""
    try:
        await asyncio.wait_for(awaitable, 1)
    except TimeoutError:
        return True
    return False


def names(groups):
    return [int(group.prompt.id) for group in groups]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_admits_what_can_be_trained_in_time_and_no_more(max_staleness):
    async def main():
        buffer = GroupBuffer(prompts_per_step=4, max_staleness=max_staleness)
        tickets = await admit(buffer, (max_staleness + 1) * 4)
        assert await is_blocked(buffer.admission())
        for ticket in tickets:
            buffer.add(ticket, group(ticket.number))
        assert await is_blocked(buffer.admission())  # finished groups keep their place until they are trained
        await buffer.take(4)
        assert await is_blocked(buffer.admission())  # and until the weights they were for exist
        buffer.advance(1)
        assert {ticket.version for ticket in await admit(buffer, 4)} == {1}
        assert await is_blocked(buffer.admission())

    simulate(main())


def test_a_dropped_group_gives_its_place_back():
    async def main():
        buffer = GroupBuffer(prompts_per_step=2, max_staleness=0)
        first, second = await admit(buffer, 2)
        waiting = asyncio.create_task(buffer.take(2))
        buffer.drop(first, "zero_variance")
        (third,) = await admit(buffer, 1)
        assert await is_blocked(buffer.admission())
        buffer.add(second, group(1))
        buffer.add(third, group(2))
        assert names(await waiting) == [1, 2]
        assert buffer.dropped == {"zero_variance": 1}

    simulate(main())


def test_fast_groups_overtake_until_a_deadline_is_at_stake():
    async def main():
        buffer = GroupBuffer(prompts_per_step=2, max_staleness=1)
        slow, slower, *fast = await admit(buffer, 4)
        for ticket in fast:
            buffer.add(ticket, group(ticket.number))
        assert names(await buffer.take(2)) == [2, 3]  # the slow two can still be trained in step 1
        buffer.advance(1)
        for ticket in await admit(buffer, 2):
            buffer.add(ticket, group(ticket.number))
        assert await is_blocked(buffer.take(2))  # two are finished, but step 1 is the last for the slow ones
        buffer.add(slow, group(0))
        assert await is_blocked(buffer.take(2))
        buffer.add(slower, group(1))
        assert names(await buffer.take(2)) == [0, 1]

    simulate(main())


def test_waits_when_the_coming_steps_could_not_hold_all_slow_groups():
    async def main():
        buffer = GroupBuffer(prompts_per_step=1, max_staleness=2)
        slow, slower, fast = await admit(buffer, 3)
        buffer.add(fast, group(2))
        assert names(await buffer.take(1)) == [2]
        buffer.advance(1)
        (fresh,) = await admit(buffer, 1)
        buffer.add(fresh, group(3))
        # Neither slow group is due before step 2, but that step can only train one of them.
        assert await is_blocked(buffer.take(1))
        buffer.add(slower, group(1))
        assert names(await buffer.take(1)) == [1]
        buffer.add(slow, group(0))
        buffer.advance(2)
        assert names(await buffer.take(1)) == [0]

    simulate(main())


def test_a_producer_cancelled_while_waiting_takes_no_place():
    async def main():
        buffer = GroupBuffer(prompts_per_step=1, max_staleness=0)
        (ticket,) = await admit(buffer, 1)
        waiting = asyncio.create_task(buffer.admission())
        await asyncio.sleep(1)
        waiting.cancel()
        buffer.drop(ticket, "failed")
        await admit(buffer, 1)

    simulate(main())


def test_resumes_at_a_later_version_and_stops_admitting_at_the_last_step():
    async def main():
        buffer = GroupBuffer(prompts_per_step=3, max_staleness=2, version=7, steps=9)
        tickets = await admit(buffer, 6)
        assert {ticket.version for ticket in tickets} == {7}
        assert await is_blocked(buffer.admission())

    simulate(main())


def test_misuse_is_refused():
    async def main():
        buffer = GroupBuffer(prompts_per_step=1, max_staleness=1)
        ticket, other = await admit(buffer, 2)
        with pytest.raises(RuntimeError, match="cannot advance from version 0 to 1"):
            buffer.advance(1)
        buffer.add(ticket, group(0))
        for again in (lambda: buffer.add(ticket, group(0)), lambda: buffer.drop(ticket, "failed")):
            with pytest.raises(ValueError, match="added or dropped before"):
                again()
        with pytest.raises(ValueError, match="cannot have 2"):
            await buffer.take(2)
        await buffer.take(1)
        buffer.add(other, group(1))
        with pytest.raises(RuntimeError, match="call advance"):
            await buffer.take(1)
        with pytest.raises(RuntimeError, match="cannot advance from version 0 to 2"):
            buffer.advance(2)

    simulate(main())
    with pytest.raises(ValueError, match="prompts_per_step >= 1"):
        GroupBuffer(prompts_per_step=0, max_staleness=0)


def test_staleness_counts_sampled_tokens():
    measured = staleness([group(0, versions=(3, 4, 4)), group(1, versions=(5,))], version=5)
    assert measured.max == 2
    assert (measured.mean.total, measured.mean.count) == (2 + 1 + 1 + 0, 4)
    assert staleness([], version=5).max == 0 and float(staleness([], version=5).mean) == 0
