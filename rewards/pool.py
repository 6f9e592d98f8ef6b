"""The driver's side of scoring: samples in, each one's weighted reward or the reason why there is none out.

Functions run in worker processes (Ray actors), so none can take the run down. A group goes to a worker in one call,
which costs about a millisecond. When a process dies under a group, by a function that hangs, exits or crashes, every
call of the group is made again on its own, so that only the sample at fault fails.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from rewards.judge import JudgeAddress
from rewards.protocol import Fault, Outcome, check_names, part_name
from rewards.worker import ConcurrentWorker, SerialWorker, Surroundings, Traits, late, most_s
from rl.config import Domain, RewardUse
from rl.environ import chosen_variables
from rl.errors import RecipeError, RunStopped, UserError
from rl.fault_log import FaultLog
from rl.plugin import describe
from rl.sample import Sample, Scored, Status
from rl.whereabouts import Whereabouts, announce

OPEN_LIMIT_S = 300.0
"""Seconds a worker may take to start and import the rewards."""
GRACE_S = 30.0
"""Seconds the driver waits beyond all timeouts of a call before it kills a worker that should have ended itself."""
START_TRIES = 3
"""How often a worker that ran before is started until it lives through that."""
ASYNC_CALLS = 1000
"""Groups whose async rewards are awaited at the same time."""

Settled = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A sample that could not be scored; it is left out of the loss and counted."""

    sample: Sample
    reward: str
    reason: str

    def __str__(self) -> str:
        return f"reward {self.reward} on sample {self.sample.id} {self.reason}"


class RewardPool:
    """Scores samples with the rewards of their domain. Made by :meth:`start`, ended by :meth:`close`."""

    def __init__(
        self,
        uses: Mapping[str, Sequence[RewardUse]],
        num_workers: int,
        surroundings: Surroundings,
        faults: FaultLog | None = None,
        settled: Settled | None = None,
    ) -> None:
        self._uses = uses
        self._faults = faults or FaultLog()
        serial = ray.remote(SerialWorker).options(num_cpus=0, scheduling_strategy="SPREAD")
        concurrent = ray.remote(ConcurrentWorker).options(num_cpus=0, max_concurrency=ASYNC_CALLS)
        self._serial = [_Process(serial, uses, surroundings, settled, exclusive=True) for _ in range(num_workers)]
        self._concurrent = _Process(concurrent, uses, surroundings, settled, exclusive=False)
        self._idle: asyncio.LifoQueue[_Process] = asyncio.LifoQueue()
        self._traits: dict[str, list[Traits]] = {}
        self._turns: dict[tuple[str, int], asyncio.Semaphore] = {}

    @classmethod
    async def start(
        cls,
        domains: Mapping[str, Domain],
        *,
        num_workers: int = 1,
        judge: JudgeAddress | None = None,
        env: Sequence[str] = (),
        seed: int = 0,
        faults: FaultLog | None = None,
        settled: Settled | None = None,
    ) -> RewardPool:
        """Starts the workers and imports every reward in them.

        ``judge`` is for rewards that ask one, and ``env`` names variables of this process that rewards may read.
        ``seed`` is the run's, for what they draw.
        ``settled`` returns when Ray knows which nodes there are; one that was lost kills what is started there.

        Raises RecipeError for a reward that cannot be used, a domain without rewards, and two parts of one name.
        """
        for name, domain in domains.items():
            check_names(name, domain)
        surroundings = Surroundings(directory=os.getcwd(), judge=judge, env=chosen_variables(env), seed=seed)
        uses = {name: list(domain.rewards) for name, domain in domains.items()}
        pool = cls(uses, max(1, num_workers), surroundings, faults, settled)
        try:
            traits, *_ = await asyncio.gather(*(process.start() for process in pool._serial))
            if any(trait.is_async for members in traits.values() for trait in members):
                await pool._concurrent.start()
        except BaseException:
            await pool.close()
            raise
        pool._traits = traits
        for process in pool._serial:
            pool._idle.put_nowait(process)
        return pool

    async def close(self) -> None:
        """Ends the worker processes."""
        for process in (*self._serial, self._concurrent):
            process.kill()

    def working(self, most: int) -> list[tuple[str, Whereabouts]]:
        """The processes that are at work, with what they do, those that are at it for longest first."""
        busy = [process for process in (*self._serial, self._concurrent) if process.calls and process.process]
        busy.sort(key=lambda process: next(iter(process.calls)))
        return [(next(iter(one.calls.values())), one.process) for one in busy[:most] if one.process is not None]

    async def score(self, sample: Sample) -> Scored | Failure:
        """Scores one sample; a batched reward sees it as a group of one."""
        return (await self.score_group([sample]))[0]

    async def score_group(self, samples: Sequence[Sample]) -> list[Scored | Failure]:
        """Scores the siblings of one prompt, in their order.

        The reward is the weighted sum over the domain's rewards. ``parts`` holds each one's own value under its name
        and its own parts under ``<name>/<part>``, ``comments`` what it says in words. A sample whose
        generation did not end properly is a failure.
        """
        complete = [sample for sample in samples if sample.status in (Status.FINISHED, Status.TRUNCATED)]
        rows = await self._rows([_lightened(sample) for sample in complete]) if complete else []
        columns = iter(zip(*rows, strict=True))
        return [
            self._combine(sample, next(columns))
            if sample.status in (Status.FINISHED, Status.TRUNCATED)
            else Failure(sample=sample, reward="generation", reason=sample.fault or f"ended as {sample.status}")
            for sample in samples
        ]

    def _combine(self, sample: Sample, column: Sequence[Outcome]) -> Scored | Failure:
        total, parts, comments = 0.0, {}, {}
        for use, outcome in zip(self._uses[sample.prompt.domain], column, strict=True):
            name = part_name(use)
            if isinstance(outcome, Fault):
                return Failure(sample=sample, reward=name, reason=outcome.reason)
            total += use.weight * outcome.value
            parts[name] = outcome.value
            parts |= {f"{name}/{part}": value for part, value in outcome.parts.items()}
            if outcome.comment:
                comments[name] = outcome.comment
        return Scored(sample=sample, reward=total, parts=parts, comments=comments)

    async def _rows(self, samples: Sequence[Sample]) -> list[list[Outcome]]:
        """[reward][sample], in the order of the domain's rewards."""
        domain = samples[0].prompt.domain
        numbers = range(len(self._uses[domain]))
        kinds = ([n for n in numbers if self._traits[domain][n].is_async is kind] for kind in (False, True))
        halves = await asyncio.gather(*(self._rows_of(domain, half, samples) for half in kinds if half))
        rows = {number: row for half in halves for number, row in half.items()}
        return [rows[number] for number in numbers]

    async def _rows_of(self, domain: str, numbers: list[int], samples: Sequence[Sample]) -> dict[int, list[Outcome]]:
        is_async = self._traits[domain][numbers[0]].is_async
        limit_s = GRACE_S + sum(self._limit(domain, number, len(samples)) for number in numbers)
        try:
            if is_async:
                async with self._turn(domain, numbers):
                    rows = await self._concurrent.score(domain, numbers, samples, limit_s)
            else:
                async with self._worker() as worker:
                    rows = await worker.score(domain, numbers, samples, limit_s)
        except _ProcessLost as lost:
            self._record(lost, domain, numbers, samples)
            rows = await asyncio.gather(*(self._row_alone(domain, number, samples) for number in numbers))
        return dict(zip(numbers, rows, strict=True))

    async def _row_alone(self, domain: str, number: int, samples: Sequence[Sample]) -> list[Outcome]:
        if self._traits[domain][number].is_batched:
            return await self._alone(domain, number, samples)
        columns = await asyncio.gather(*(self._alone(domain, number, [sample]) for sample in samples))
        return [column[0] for column in columns]

    async def _alone(self, domain: str, number: int, samples: Sequence[Sample]) -> list[Outcome]:
        """One function call with a worker to itself, tried again when the worker dies of it."""
        use = self._uses[domain][number]
        limit_s = GRACE_S + self._limit(domain, number, len(samples))
        reason = ""
        for _ in range(1 + use.retries):
            try:
                async with self._worker() as worker:
                    return (await worker.score(domain, [number], samples, limit_s))[0]
            except _ProcessLost as lost:
                self._record(lost, domain, [number], samples)
                reason = late(use.timeout_s) if lost.after_s >= use.timeout_s else "ended or crashed its process"
        return [Fault(reason)] * len(samples)

    def _record(self, lost: _ProcessLost, domain: str, numbers: Sequence[int], samples: Sequence[Sample]) -> None:
        names = ", ".join(part_name(self._uses[domain][number]) for number in numbers)
        self._faults.record(
            "reward_workers",
            f"a reward worker ended or was killed after {lost.after_s:.1f} s of scoring {samples[0].id} with {names}; "
            "it is started again",
        )

    def _limit(self, domain: str, number: int, num_samples: int) -> float:
        """Seconds that a worker may properly spend on a reward."""
        return most_s(self._uses[domain][number], self._traits[domain][number], num_samples)

    @asynccontextmanager
    async def _turn(self, domain: str, numbers: Sequence[int]) -> AsyncIterator[None]:
        """As many groups as a reward may have calls: more would wait in the worker, where their time already counts."""
        async with AsyncExitStack() as held:
            for number in numbers:
                limit = self._traits[domain][number].concurrency
                if limit is not None:
                    turns = self._turns.setdefault((domain, number), asyncio.Semaphore(limit))
                    await held.enter_async_context(turns)
            yield

    @asynccontextmanager
    async def _worker(self) -> AsyncIterator[_Process]:
        """An idle serial worker, for as long as the block runs."""
        worker = await self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put_nowait(worker)


class _ProcessLost(Exception):
    """The process died, or was killed, while it worked on a call."""

    def __init__(self, after_s: float) -> None:
        super().__init__(after_s)
        self.after_s = after_s


class _Process:
    """A worker process that is started again, at its next use, when it died.

    ``exclusive`` says that it never has more than one call, so that a call given up by its caller may be killed.
    """

    def __init__(
        self,
        actor_class: Any,
        uses: Mapping[str, Sequence[RewardUse]],
        surroundings: Surroundings,
        settled: Settled | None = None,
        *,
        exclusive: bool,
    ) -> None:
        self._actor_class = actor_class
        self._opening = (uses, surroundings)
        self._settled = settled
        self._exclusive = exclusive
        self._actor: Any = None
        self.process: Whereabouts | None = None
        self.calls: dict[float, str] = {}  # under way, by when they began
        self._lock = asyncio.Lock()

    async def start(self) -> dict[str, list[Traits]]:
        """Starts the process and imports the rewards; returns what they are like.

        Raises RecipeError when the rewards cannot be used, of which its end while it starts is a sign.
        """
        actor = self._actor_class.remote()
        try:
            async with asyncio.timeout(OPEN_LIMIT_S):
                traits = await actor.open.remote(*self._opening)
                self.process = await actor.__ray_call__.remote(announce)
        except BaseException as error:
            ray.kill(actor)
            sentence = _opening_error(error)
            if sentence is None:
                raise
            raise sentence from error
        self._actor = actor
        return traits

    async def score(
        self, domain: str, numbers: Sequence[int], samples: Sequence[Sample], limit_s: float
    ) -> list[list[Outcome]]:
        """Raises _ProcessLost when the process dies, or does not answer within ``limit_s``."""
        actor = await self._running()
        began = time.monotonic()
        names = ", ".join(part_name(self._opening[0][domain][number]) for number in numbers)
        self.calls[began] = f"{names} of {samples[0].id}"
        try:
            async with asyncio.timeout(limit_s):
                return await actor.score.remote(domain, numbers, samples)
        except (RayActorError, TimeoutError) as error:
            self.kill(actor)
            raise _ProcessLost(time.monotonic() - began) from error
        except RayTaskError as error:  # not the function, whose errors come back as faults: samples that do not travel
            return [[Fault(f"could not be called: {describe(error.cause)}")] * len(samples) for _ in numbers]
        except asyncio.CancelledError:
            if self._exclusive:
                self.kill(actor)
            raise
        finally:
            self.calls.pop(began, None)

    async def _running(self) -> Any:
        """The actor; a fresh one if the last one died."""
        async with self._lock:
            if self._actor is None:
                await self._start_again()
            return self._actor

    async def _start_again(self) -> None:
        """What imported its rewards before is not at fault when it dies of a node that was lost unnoticed."""
        for tries_left in reversed(range(START_TRIES)):
            try:
                await self.start()
                return
            except RecipeError as error:
                if not tries_left or not isinstance(error.__cause__, RayActorError):
                    raise RunStopped(f"a reward worker died and cannot be started again: {error}") from error
            if self._settled is not None:
                await self._settled()

    def kill(self, actor: Any = None) -> None:
        """Ends the process; with ``actor``, only if that is still the current one."""
        if self._actor is not None and actor in (None, self._actor):
            ray.kill(self._actor)
            self._actor = None


def _opening_error(error: BaseException) -> BaseException | None:
    """What a worker that did not start means to the user, if it is theirs to mend."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
        return error.cause
    if isinstance(error, RayActorError):
        return RecipeError("importing the rewards ended or crashed their process; import them by hand to see why")
    if isinstance(error, TimeoutError):
        return RecipeError(f"importing the rewards took longer than {OPEN_LIMIT_S:g} s")
    return None


def _lightened(sample: Sample) -> Sample:
    """The sample without what is large and no reward reads."""
    if sample.routes is sample.selections is sample.kept is None and not sample.earlier:
        return sample
    earlier = tuple(_lightened(one) for one in sample.earlier)
    return replace(sample, routes=None, routed=None, selections=None, kept=None, earlier=earlier)
