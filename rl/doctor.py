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
from collections.abc import Iterable, Sequence
from pathlib import Path

from rl.cluster import on_host
from rl.config import Doctor as Settings
from rl.config import DoctorAct
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
LEARNERS_OWN = ("step", "supervised step", "canary", "sync", "checkpoint", "save", "wake", "sleep")
_ANSWER_S = 10.0
"""Seconds that a process, or its host, may take to say something about itself."""


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
        if stalled_s > self._settings.floor_s:
            sentence = f"the driver (process {os.getpid()}) stood still for {stalled_s:.1f} s"
            self._system.faults.record("late", f"{sentence}: it was stopped, or its machine was too busy", each=True)

    async def look(self) -> None:
        """One round: tells what is late and acts on it."""
        late = [span for span in self._timeline.open if self._is_late(span)]
        self._said = {span.number: self._said[span.number] for span in late if span.number in self._said}
        places: dict[tuple[str, str], list[Span]] = {}
        for span in late:
            places.setdefault((span.actor, span.phase), []).append(span)
        for longest, *others in places.values():
            if self._is_news(longest):
                self._said |= {span.number: self._age(span) for span in (longest, *others)}
                await self._see_to(longest, len(others))

    async def _see_to(self, span: Span, num_others: int) -> None:
        suspects = self._suspects(span)
        stacks = await asyncio.gather(*(self._stack(where) for _, where in suspects))
        findings = "; ".join(
            f"{name} (process {where.pid}) {innermost(stack)}"
            for (name, where), stack in zip(suspects, stacks, strict=True)
        )
        others = f" (and {num_others} others)" if num_others else ""
        sentence = f"{self._complaint(span)}{others}{': ' + findings if findings else ''}"
        self._note(sentence, [name for name, _ in suspects], stacks)
        if self._settings.act == DoctorAct.stop:
            raise RunStopped(sentence)
        consequence = "" if self._settings.act == DoctorAct.warn else await self._act(span, suspects, stacks)
        self._system.faults.record("late", sentence + consequence, each=True)

    async def _act(self, span: Span, suspects: Sequence[tuple[str, Whereabouts]], stacks: Sequence[str]) -> str:
        """Ends the process at fault; returns the rest of the sentence."""
        actor, phase = span.kind
        if actor == "engine" and phase not in STARTING:
            index = _number(span)
            if not suspects:
                return "; it is being started"
            if phase == REQUEST and await self._is_making_progress(index):
                return "; it goes on generating and is left alone"
            await self._end(where for _, where in suspects)
            self._system.pool.restart([index], f"its {phase} took too long")
            return ""
        if actor == "learner" and phase in LEARNERS_OWN:
            if phase == "sync" and any(one.kind == ("engine", "sync") for one in self._timeline.open):
                return "; an engine keeps it waiting"
            still = [where for (_, where), stack in zip(suspects, stacks, strict=True) if not _runs(stack)]
            await self._end(still or [where for _, where in suspects])
            return "; it is killed"
        if actor == "rewards":
            still = [where for (_, where), stack in zip(suspects, stacks, strict=True) if not _runs(stack)]
            await self._end(still)
            return f"; {'it is' if len(still) == 1 else 'they are'} killed" if still else ""
        return ""

    async def _end(self, processes: Iterable[Whereabouts]) -> None:
        await asyncio.gather(*(on_host(where.host, end, where, timeout_s=_ANSWER_S) for where in processes))

    async def _is_making_progress(self, index: int) -> bool:
        """Whether an engine answers and has generated since it was last asked, now or a moment ago."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                before = (await self._system.pool.stats_of(index)).num_generated_tokens
                await asyncio.sleep(1.0)
                return (await self._system.pool.stats_of(index)).num_generated_tokens > before
        except (TimeoutError, RunStopped):
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

    def _suspects(self, span: Span) -> list[tuple[str, Whereabouts]]:
        """The processes that a span may be waiting for, with names."""
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
            return f"cannot be looked at: {type(error).__name__} on {where.host}"

    def _note(self, sentence: str, names: Sequence[str], stacks: Sequence[str]) -> None:
        if self._notes is not None:
            said = [f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}"]
            said += [f"--- {name}\n{stack}" for name, stack in zip(names, stacks, strict=True)]
            with open(self._notes, "a", encoding="utf-8") as file:
                file.write(redact("\n".join(said)) + "\n\n")


_SHOWN = 4
"""Reward workers that are looked at, and spans that are told."""


def _number(span: Span) -> int:
    return int(span.actor.split()[1])


def _runs(stack: str) -> bool:
    return stack.startswith(("runs", "sleeps"))
