"""The processes that call reward functions. They are plain classes; :mod:`rewards.pool` makes Ray actors of them.

    SerialWorker       one call after another, on the main thread (math-verify's time limits are signals, which only
                       work there). A call that outstays its timeout takes the process down with it.
    ConcurrentWorker   all async functions of all groups at the same time, on one event loop. A call that outstays its
                       timeout is cancelled.

Both answer with one row of outcomes per reward asked for. A function that raises is tried again here; a process that
died is the pool's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import sys
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from rewards.chance import begin, seed_globals
from rewards.judge import JudgeAddress, appoint
from rewards.protocol import Fault, Outcome, Reward, RewardFunction, read_result, read_results, resolve
from rl.config import RewardUse
from rl.environ import forget_environment
from rl.plugin import describe_raised
from rl.sample import Sample

CANCEL_GRACE_S = 1.0
"""How much longer than its timeout an async call may take on a serial worker, to be cancelled before it is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What the pool must know of a reward function to route it."""

    is_async: bool
    is_batched: bool
    concurrency: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What rewards find in their process."""

    directory: str
    """Joins the import path."""
    judge: JudgeAddress | None = None
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables beside those that every worker keeps."""
    seed: int = 0
    """The run's, for what rewards draw."""


MAX_KNOWN = 100_000
"""Outcomes that a process remembers for functions with a cache, over all of them."""


class _Functions:
    """The reward functions of every domain, in the recipe's order."""

    def __init__(self, uses: Mapping[str, Sequence[RewardUse]], surroundings: Surroundings) -> None:
        if surroundings.directory not in sys.path:
            sys.path.insert(0, surroundings.directory)
        forget_environment(keep=surroundings.env)
        appoint(surroundings.judge)
        begin(surroundings.seed)
        self._by_domain = {domain: [resolve(use) for use in members] for domain, members in uses.items()}
        self._places = {
            id(function): asyncio.Semaphore(function.concurrency)
            for functions in self._by_domain.values()
            for function in functions
            if function.concurrency is not None
        }
        self._known: OrderedDict[tuple[Any, ...], Reward] = OrderedDict()

    def known(self, function: RewardFunction, samples: Sequence[Sample]) -> list[Outcome] | None:
        """The outcome of an earlier call that the function is allowed to be spared."""
        found = self._known.get(_key(function, samples[0])) if function.cache else None
        return None if found is None else [found]

    def remember(self, function: RewardFunction, samples: Sequence[Sample], outcomes: list[Outcome]) -> list[Outcome]:
        """The outcomes again; a fault is not remembered."""
        if function.cache and isinstance(outcomes[0], Reward):
            self._known[_key(function, samples[0])] = outcomes[0]
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return outcomes

    def traits(self) -> dict[str, list[Traits]]:
        return {
            domain: [
                Traits(is_async=function.is_async, is_batched=function.is_batched, concurrency=function.concurrency)
                for function in functions
            ]
            for domain, functions in self._by_domain.items()
        }

    def place(self, function: RewardFunction) -> AbstractAsyncContextManager[Any]:
        """What a call of an async function is held in: a place among those awaited at the same time."""
        return self._places.get(id(function)) or contextlib.nullcontext()

    def pick(self, domain: str, numbers: Sequence[int]) -> list[RewardFunction]:
        return [self._by_domain[domain][number] for number in numbers]


class SerialWorker:
    """Calls functions one at a time on the process's main thread.

    It must not have an async method, private ones included: Ray would run all of them off the main thread.
    """

    def open(self, uses: Mapping[str, Sequence[RewardUse]], surroundings: Surroundings) -> dict[str, list[Traits]]:
        """Imports every reward. Raises RecipeError as :func:`resolve` does."""
        self._functions = _Functions(uses, surroundings)
        self._loop = asyncio.new_event_loop()
        self._nowhere = open(os.devnull, "w")  # noqa: SIM115  the watchdog writes to it for as long as the process lives
        return self._functions.traits()

    def score(self, domain: str, numbers: Sequence[int], samples: Sequence[Sample]) -> list[list[Outcome]]:
        """One row for each of the domain's rewards in ``numbers``, one outcome in it for each sample."""
        return [self._row(function, samples) for function in self._functions.pick(domain, numbers)]

    def _row(self, function: RewardFunction, samples: Sequence[Sample]) -> list[Outcome]:
        if function.is_async:
            with self._watchdog(most_s(function, function, len(samples))):
                return self._loop.run_until_complete(call_async(function, samples, self._functions))
        if function.is_batched:
            return self._persist(function, samples)
        return [self._persist(function, [sample])[0] for sample in samples]

    def _persist(self, function: RewardFunction, samples: Sequence[Sample]) -> list[Outcome]:
        if (known := self._functions.known(function, samples)) is not None:
            return known
        outcomes = self._once(function, samples, 0)
        for attempt in range(1, function.retries + 1):
            if not any(isinstance(outcome, Fault) for outcome in outcomes):
                break
            outcomes = self._once(function, samples, attempt)
        return self._functions.remember(function, samples, outcomes)

    def _once(self, function: RewardFunction, samples: Sequence[Sample], attempt: int) -> list[Outcome]:
        seed_globals(function.name, samples, attempt)
        try:
            with self._watchdog(function.timeout_s):
                result = function.call(samples if function.is_batched else samples[0])
        except (Exception, SystemExit) as error:
            return [Fault(f"raised {describe_raised(error)}")] * len(samples)
        return read_results(result, len(samples)) if function.is_batched else [read_result(result)]

    @contextlib.contextmanager
    def _watchdog(self, timeout_s: float) -> Iterator[None]:
        """Ends the process when the block takes longer, even inside C code that holds the interpreter's lock."""
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=self._nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


class ConcurrentWorker:
    """Awaits async functions, any number at the same time."""

    async def open(
        self, uses: Mapping[str, Sequence[RewardUse]], surroundings: Surroundings
    ) -> dict[str, list[Traits]]:
        """As :meth:`SerialWorker.open`."""
        self._functions = _Functions(uses, surroundings)
        return self._functions.traits()

    async def score(self, domain: str, numbers: Sequence[int], samples: Sequence[Sample]) -> list[list[Outcome]]:
        """As :meth:`SerialWorker.score`, for async functions."""
        functions = self._functions.pick(domain, numbers)
        return await asyncio.gather(*(call_async(function, samples, self._functions) for function in functions))


async def call_async(function: RewardFunction, samples: Sequence[Sample], functions: _Functions) -> list[Outcome]:
    """All calls of an async function for a group, at the same time; each has the timeout and the retries to itself."""
    if function.is_batched:
        return await _persist_async(function, samples, functions)
    rows = await asyncio.gather(*(_persist_async(function, [sample], functions) for sample in samples))
    return [row[0] for row in rows]


def most_s(timing: RewardUse | RewardFunction, traits: Traits | RewardFunction, num_samples: int) -> float:
    """Seconds that a group's calls of one reward may properly take: at the same time, or one after another."""
    at_once = traits.is_batched or (traits.is_async and traits.concurrency is None)
    return (1 if at_once else num_samples) * (1 + timing.retries) * (timing.timeout_s + CANCEL_GRACE_S)


async def _persist_async(function: RewardFunction, samples: Sequence[Sample], functions: _Functions) -> list[Outcome]:
    if (known := functions.known(function, samples)) is not None:
        return known
    outcomes = await _once_async(function, samples, functions)
    for _ in range(function.retries):
        if not any(isinstance(outcome, Fault) for outcome in outcomes):
            break
        outcomes = await _once_async(function, samples, functions)
    return functions.remember(function, samples, outcomes)


async def _once_async(function: RewardFunction, samples: Sequence[Sample], functions: _Functions) -> list[Outcome]:
    async with functions.place(function):
        try:
            async with asyncio.timeout(function.timeout_s) as limit:
                result = await function.call(samples if function.is_batched else samples[0])
        except (Exception, SystemExit) as error:
            if limit.expired():
                return [Fault(late(function.timeout_s))] * len(samples)
            return [Fault(f"raised {describe_raised(error)}")] * len(samples)
    return read_results(result, len(samples)) if function.is_batched else [read_result(result)]


def _key(function: RewardFunction, sample: Sample) -> tuple[Any, ...]:
    """All of a sample that a reward of its text can depend on."""
    prompt = sample.prompt
    return id(function), prompt.id, sample.reply, sample.status, repr(sample.turns), repr(sample.final_state)


def late(timeout_s: float) -> str:
    """The reason of a call that outstayed its timeout."""
    return f"took longer than its timeout of {timeout_s:g} s"
