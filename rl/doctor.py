"""The hang doctor: notices a phase that takes far longer than it ever did, says who waits for whom, and then acts.

Phases are the open spans of the run's timeline. One is late after ``doctor.factor`` times the longest that its kind has
taken so far, never before ``doctor.floor_s``, and ``doctor.first_s`` where it has no history. Then the processes that
could be at fault are looked at from outside (`rl.whereabouts`), as one that hangs does not answer.

    late                         what ``recover`` does
    engine: any call, once up    the engine is killed, and started again like any that died
    learner: step, sync, ...     the rank that does not run is killed, or all; the learner's failure follows
    rewards: score               a worker that is stopped is killed; one that runs has limits of its own, which end it
    anything else                nothing: what it waits for has limits of its own, too
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rl.choices import DoctorAct
from rl.cluster import on_host
from rl.config import Doctor as Settings
from rl.errors import RunStopped
from rl.secrets import redact
from rl.system import System
from rl.timeline import Span, Timeline
from rl.whereabouts import Whereabouts, end, innermost, stack_of
from rollout.engine_lane import REQUEST

ENDLESS = {("engine", "generate"), ("engine", "sleep"), ("learner", "cold start")}
"""Kinds that last as long as there is work, or as others take."""
STARTING = ("start", "load")
"""Phases of an engine that have a limit of their own, ``faults.restart_s``."""
LEARNERS_OWN = (
    *("begin", "load", "step", "supervised step", "canary", "sync", "checksums", "checkpoint", "save", "wake", "sleep"),
)
_UNKNOWN = "cannot be looked at"
_ANSWER_S = 10.0
"""Seconds that a process, or its host, may take to say something about itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspect:
    """A process that a late span may be waiting for."""

    name: str
    where: Whereabouts
    stack: str
    """As :func:`rl.whereabouts.stack_of` says it, or why it cannot be looked at."""

    @property
    def runs(self) -> bool:
        return self.stack.startswith(("runs", "sleeps"))

    @property
    def is_known(self) -> bool:
        """Whether it could be looked at."""
        return not self.stack.startswith(_UNKNOWN)


class Doctor:
    """Looks at one run; :meth:`watch` is to run beside everything else."""

    def __init__(self, settings: Settings, system: System, *, notes: Path | None = None) -> None:
        """Whole stacks go to the file ``notes``, innermost calls to the terminal."""
        self._settings = settings
        self._system = system
        self._notes = notes
        self._said: dict[int, float] = {}  # seconds that a late span had taken when it was last told, by its number
        self._stalls: list[tuple[float, float]] = []  # until when the driver stood still, and for how many seconds

    @property
    def _timeline(self) -> Timeline:
        return self._system.timeline

    async def watch(self) -> None:
        """Until it is cancelled. Raises RunStopped, with what was found, where the recipe says ``stop``."""
        pause = min(5.0, self._settings.floor_s / 4)
        while self._settings.act != DoctorAct.none:
            began = self._timeline.now
            await asyncio.sleep(pause)
            self._excuse(self._timeline.now - began - pause)
            await self.look()

    def _excuse(self, stalled_s: float) -> None:
        """While the driver stood still, it could not hear from anybody: for so long nobody else was late."""
        if stalled_s > self._settings.floor_s / 4:
            self._stalls.append((self._timeline.now, stalled_s))
            for span in self._timeline.open:
                span.counts = False
        if stalled_s > self._settings.floor_s:
            sentence = f"the driver (process {os.getpid()}) stood still for {stalled_s:.1f} s"
            self._system.faults.record("late", f"{sentence}: it was stopped, or its machine was too busy", each=True)

    async def look(self) -> None:
        """One round: tells what is late and acts on it."""
        late = [span for span in self._timeline.open if self._is_late(span)]
        self._said = {span.number: self._said[span.number] for span in late if span.number in self._said}
        places: dict[tuple[str, str], list[Span]] = {}
        for span in late:
            span.counts = span.counts and span.number in self._said  # found before, it may have been excused
            places.setdefault((span.actor, span.phase), []).append(span)
        seen: set[str] = set()
        for longest, *others in places.values():
            # What else the same actor is late in may end with what is done about the first.
            if self._is_news(longest) and longest.actor not in seen:
                seen.add(longest.actor)
                self._said |= {span.number: self._age(span) for span in (longest, *others)}
                await self._see_to(longest, others)

    async def _see_to(self, span: Span, others: Sequence[Span]) -> None:
        suspects = await self._suspects(span)
        findings = "; ".join(f"{one.name} (process {one.where.pid}) {innermost(one.stack)}" for one in suspects)
        more = f" (and {len(others)} others)" if others else ""
        sentence = f"{self._complaint(span)}{more}{': ' + findings if findings else ''}"
        self._note(sentence, suspects)
        if not self._timeline.is_open(span):  # looking takes seconds
            for other in others:
                self._said.pop(other.number, None)
            self._system.faults.record("late", f"{sentence}; it has ended meanwhile", each=True)
            return
        if self._settings.act == DoctorAct.stop:
            raise RunStopped(sentence)
        self._system.faults.record("late", sentence, each=True)
        if self._settings.act == DoctorAct.recover and (consequence := await self._act(span, suspects)):
            self._system.faults.say(consequence)

    async def _act(self, span: Span, suspects: Sequence[Suspect]) -> str:
        """Ends the process at fault; returns what became of it, unless others say so."""
        actor, phase = span.kind
        if actor == "engine" and phase not in STARTING:
            return await self._act_on_engine(span, suspects)
        if actor == "learner" and phase in LEARNERS_OWN:
            return await self._act_on_learner(span, suspects)
        if actor == "rewards":
            return (await self._end([one for one in suspects if not one.runs]))[0]
        return ""

    async def _act_on_engine(self, span: Span, suspects: Sequence[Suspect]) -> str:
        """The pool starts it again, and says so."""
        index, pool = _number(span), self._system.pool
        if not suspects:
            return f"{span.actor} is being started"
        may_run = any(one.runs or not one.is_known for one in suspects)
        if span.phase == REQUEST and may_run and await self._is_making_progress(index):
            for one in self._timeline.open:
                one.counts = one.counts or (one.actor, one.phase) == (span.actor, REQUEST)
            return f"{span.actor} goes on generating and is left alone"
        consequence, _ = await self._end(suspects)
        if pool.process_of(index) in [one.where for one in suspects]:  # else the pool has noticed by itself
            pool.restart([index], f"its {span.phase} took too long")
        return consequence

    async def _act_on_learner(self, span: Span, suspects: Sequence[Suspect]) -> str:
        """The rank that does not run, or all; the learner's failure follows."""
        if span.phase == "sync" and any(one.kind == ("engine", "sync") for one in self._timeline.open):
            return f"an engine keeps the {span.actor} waiting"
        consequence, left = await self._end([one for one in suspects if not one.runs] or suspects)
        self._system.learner.end([one.where for one in left])
        return f"{consequence}; Ray is told to end what is left" if left else consequence

    async def _end(self, suspects: Sequence[Suspect]) -> tuple[str, list[Suspect]]:
        """Kills processes where they are; what became of them in words, and those whose host does not answer."""
        ending = (on_host(one.where.host, end, one.where, timeout_s=_ANSWER_S) for one in suspects)
        outcomes = dict(zip(suspects, await asyncio.gather(*ending, return_exceptions=True), strict=True))
        words = (
            f"{one.name} "
            + (f"cannot be killed ({type(error).__name__} on {one.where.host})" if error else "is killed")
            for one, error in outcomes.items()
        )
        return "; ".join(words), [one for one, error in outcomes.items() if error]

    async def _is_making_progress(self, index: int) -> bool:
        """Whether an engine answers and has generated since it was last asked, now or a moment ago."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                before = (await self._system.pool.stats_of(index)).num_generated_tokens
                await asyncio.sleep(1.0)
                return (await self._system.pool.stats_of(index)).num_generated_tokens > before
        except Exception:  # whatever it is that it answers instead
            return False

    def _is_late(self, span: Span) -> bool:
        return span.kind not in ENDLESS and self._age(span) > self._deadline(span)

    def _is_news(self, span: Span) -> bool:
        """Told once when it is late, and again whenever it has taken twice as long."""
        return self._age(span) >= 2 * self._said.get(span.number, 0.0)

    def _deadline(self, span: Span) -> float:
        longest = self._timeline.longest(span.kind)
        allowed = self._settings.first_s if longest is None else self._settings.factor * longest
        # The driver only waits for others, so whoever keeps it waiting is to be found out before.
        return max(allowed, self._settings.floor_s * (2 if span.actor == "driver" else 1))

    def _age(self, span: Span) -> float:
        stalled_s = sum(seconds for until, seconds in self._stalls if until > span.begin)
        return self._timeline.now - span.begin - stalled_s

    def _complaint(self, span: Span) -> str:
        """Who waits for whom, for how long, and how long it took before."""
        longest = self._timeline.longest(span.kind)
        before = "for the first time" if longest is None else f"{longest:.1f} s at most before"
        what = f"{span.phase} of {span.detail}" if span.detail else span.phase
        at = f" in step {span.step}" if span.step is not None else ""
        waiting = [one for one in self._timeline.open if one.actor == "driver" and one is not span]
        prefix = f"the driver waits ({waiting[0].phase} of step {waiting[0].step}); " if waiting else ""
        suffix = f"; under way: {self._under_way()}" if span.actor == "driver" else ""
        return f"{prefix}{span.actor} is late: {what}{at} has taken {self._age(span):.1f} s, {before}{suffix}"

    def _under_way(self) -> str:
        """What the driver may be waiting for, the longest first."""
        others = [one for one in self._timeline.open if one.actor != "driver" and one.kind not in ENDLESS]
        shown = [f"{one.phase} of {one.detail} by {one.actor} for {self._age(one):.1f} s" for one in others[:_SHOWN]]
        return ", ".join(shown) or "nothing"

    async def _suspects(self, span: Span) -> list[Suspect]:
        """The processes that a span may be waiting for, as they are now."""
        named = self._named(span)
        stacks = await asyncio.gather(*(self._stack(where) for _, where in named))
        return [
            Suspect(name=name, where=where, stack=stack) for (name, where), stack in zip(named, stacks, strict=True)
        ]

    def _named(self, span: Span) -> list[tuple[str, Whereabouts]]:
        system = self._system
        if span.kind[0] == "engine":
            process = system.pool.process_of(_number(span))
            return [] if process is None else [(span.actor, process)]
        if span.kind[0] == "learner":
            return [(f"learner rank {rank}", where) for rank, where in enumerate(system.learner.processes)]
        if span.kind[0] == "rewards":
            return [(f"the reward worker at {what}", where) for what, where in system.rewards.working(_SHOWN)]
        return []

    async def _stack(self, where: Whereabouts) -> str:
        try:
            return await on_host(where.host, stack_of, where, timeout_s=_ANSWER_S)
        except Exception as error:
            return f"{_UNKNOWN}: {type(error).__name__} on {where.host}"

    def _note(self, sentence: str, suspects: Sequence[Suspect]) -> None:
        if self._notes is not None:
            said = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}"]
            said += [f"--- {one.name}\n{one.stack}" for one in suspects]
            with suppress(OSError), open(self._notes, "a", encoding="utf-8") as file:
                file.write(redact("\n".join(said)) + "\n\n")


_SHOWN = 4
"""Reward workers that are looked at, and spans that are told."""


def _number(span: Span) -> int:
    return int(span.actor.split()[1])
