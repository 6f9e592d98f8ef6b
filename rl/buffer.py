"""Groups between generation and learning, with their age bounded when they are admitted.

A group is started only when it is certain that it can still be trained in time, so no finished work is ever thrown
away for being too old. The counting rule is that of AReaL (arXiv 2505.24298); a batch is chosen by earliest
deadline, which lets fast groups overtake slow ones whenever no bound is at stake.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.metrics import Mean
from rl.sample import Group


@dataclass(frozen=True, slots=True, order=True)
class Ticket:
    """The place of one admitted group, in the order of admission."""

    number: int
    version: int
    """Weight version at admission; the group must be trained before ``version + max_staleness`` is over."""


class GroupBuffer:
    """Holds at most what can be trained within ``max_staleness`` steps of ``prompts_per_step`` groups.

    Version v of the weights serves generation until step v has trained its batch and ``advance(v + 1)`` was called. A
    group admitted at version v is trained in step ``v + max_staleness`` at the latest, whatever the order in which
    groups finish: :meth:`take` waits for a slow group only when leaving it out would break that promise. With
    ``max_staleness`` 0, generation and training alternate in lock-step.

    One producer task a group and one consumer share it inside one event loop::

        producer:  ticket = await buffer.admission();  ...;  buffer.add(ticket, group)  or  buffer.drop(ticket, why)
        consumer:  groups = await buffer.take(n);  ...train, publish the weights...;  buffer.advance(version)
    """

    def __init__(
        self, *, prompts_per_step: int, max_staleness: int, version: int = 0, steps: int | None = None
    ) -> None:
        """Starts empty at ``version``. With ``steps``, no group is admitted that would come after the last step."""
        if prompts_per_step < 1 or max_staleness < 0:
            raise ValueError(
                f"a buffer needs prompts_per_step >= 1 and max_staleness >= 0, got {prompts_per_step}, {max_staleness}"
            )
        self.prompts_per_step = prompts_per_step
        self.max_staleness = max_staleness
        self.version = version
        self.steps = steps
        self.dropped: Counter[str] = Counter()
        """Groups dropped so far, by reason."""
        self._admitted = 0  # tickets ever issued
        self._settled = version * prompts_per_step  # groups trained before this buffer, and those it gave out
        self._generating: set[Ticket] = set()
        self._finished: dict[Ticket, Group] = {}
        self._changed = asyncio.Event()

    async def admission(self) -> Ticket:
        """Waits for a place. Its holder must :meth:`add` a group or :meth:`drop` it, or training will wait forever."""
        await self._until(lambda: self._settled + self._outstanding < self._capacity)
        ticket = Ticket(number=self._admitted, version=self.version)
        self._admitted += 1
        self._generating.add(ticket)
        return ticket

    def add(self, ticket: Ticket, group: Group) -> None:
        """Stores a finished group until it is trained."""
        self._close(ticket)
        self._finished[ticket] = group
        self._notify()

    def drop(self, ticket: Ticket, reason: str) -> None:
        """Gives the place of a group that will not be trained to a fresh one, and counts it."""
        self._close(ticket)
        self.dropped[reason] += 1
        self._notify()

    async def take(self, n: int) -> list[Group]:
        """Waits for this step's batch: the n = ``prompts_per_step`` finished groups with the earliest deadlines."""
        if n != self.prompts_per_step:
            raise ValueError(f"this buffer admits {self.prompts_per_step} groups a step, so a batch cannot have {n}")
        if self._trained:
            raise RuntimeError(f"the batch of step {self.version} was taken; call advance before the next")
        await self._until(self._batch_is_ready)
        batch = [self._finished.pop(ticket) for ticket in self._next_batch()]
        self._settled += n
        return batch

    def advance(self, version: int) -> None:
        """Ends a step: every engine now serves ``version``, and a step's worth of groups is admitted."""
        if version != self.version + 1 or not self._trained:
            raise RuntimeError(f"cannot advance from version {self.version} to {version}: one batch raises it by one")
        self.version = version
        self._notify()

    def state_dict(self, keep: Callable[[Group], int]) -> dict[str, Any]:
        """All that it knows, fit for JSON; ``keep`` puts a group aside and returns its number."""
        return {
            "version": self.version,
            "admitted": self._admitted,
            "settled": self._settled,
            "dropped": dict(self.dropped),
            "generating": [[ticket.number, ticket.version] for ticket in sorted(self._generating)],
            "finished": [[one.number, one.version, keep(self._finished[one])] for one in sorted(self._finished)],
        }

    def load_state_dict(self, state: Mapping[str, Any], groups: Sequence[Group]) -> list[Ticket]:
        """Continues where ``state`` was written; returns the tickets whose groups must be generated again."""
        self.version, self._admitted, self._settled = state["version"], state["admitted"], state["settled"]
        self.dropped = Counter(state["dropped"])
        generating = [Ticket(number, version) for number, version in state["generating"]]
        self._generating = set(generating)
        self._finished = {Ticket(number, version): groups[kept] for number, version, kept in state["finished"]}
        self._notify()
        return generating

    @property
    def _outstanding(self) -> int:
        return len(self._generating) + len(self._finished)

    @property
    def _trained(self) -> bool:
        """Whether the batch of this version was given out."""
        return self._settled > self.version * self.prompts_per_step

    @property
    def _capacity(self) -> int:
        """Groups, settled ones included, that can be trained by the end of step ``version + max_staleness``."""
        steps = self.version + self.max_staleness + 1
        return (steps if self.steps is None else min(steps, self.steps)) * self.prompts_per_step

    def _next_batch(self) -> list[Ticket]:
        return sorted(self._finished)[: self.prompts_per_step]

    def _batch_is_ready(self) -> bool:
        batch = self._next_batch()
        if len(batch) < self.prompts_per_step:
            return False
        # In order of admission, which is that of deadlines, the k-th group left behind is trained k // n steps after
        # the next one at the earliest. Admission keeps this true for the batch of all the oldest, so waiting ends.
        left = sorted(self._generating | self._finished.keys() - set(batch))
        return all(
            self.version + 1 + k // self.prompts_per_step <= ticket.version + self.max_staleness
            for k, ticket in enumerate(left)
        )

    def _close(self, ticket: Ticket) -> None:
        if ticket not in self._generating:
            raise ValueError(f"group {ticket.number} is not being generated: it was added or dropped before")
        self._generating.remove(ticket)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Staleness:
    """How many versions the weights moved on between sampling tokens and training on them."""

    mean: Mean
    max: int


def staleness(groups: Sequence[Group], version: int) -> Staleness:
    """Over the sampled tokens of a batch that is trained at ``version``."""
    samples = [scored.sample for group in groups for scored in group.scored]
    ages = [version - sample.versions[sample.sampled].astype(np.int64) for sample in samples]
    age = np.concatenate([np.zeros(0, np.int64), *ages])
    return Staleness(mean=Mean(float(age.sum()), float(len(age))), max=int(age.max(initial=0)))
