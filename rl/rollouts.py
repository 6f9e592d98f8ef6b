"""Keeps the buffer fed: prompt -> samples -> rewards -> group, for as many groups as the buffer admits."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.pool import Failure
from rl.buffer import GroupBuffer, Ticket
from rl.choices import ZeroVariance
from rl.config import Recipe
from rl.errors import RunStopped
from rl.metrics import Mean
from rl.prompts import PromptStream
from rl.sample import Group, Prompt, Sample, Scored
from rl.saved_groups import prompt_of
from rl.secrets import redact_values
from rl.system import System, seeds_of

HOPELESS_STEPS = 3
"""Steps' worth of groups that may fail in a row before the run stops."""
REPLACED_STEPS = 4
"""Steps' worth of groups that may be replaced for one step: a policy that masters every prompt has no variance left."""


@dataclass(slots=True)
class Tally:
    """What happened since the last step."""

    failed_tokens: int = 0  # sampled for samples that could not be scored
    replaced: list[Group] = field(default_factory=list)  # without variance, before the groups that are trained now
    scoring: Mean = field(default_factory=lambda: Mean(0.0, 0.0))  # seconds from a group's last token to its rewards
    failed_groups: int = 0  # without a single sample that could be scored
    failures: Counter[str] = field(default_factory=Counter)  # samples, by "<reward> <reason>"


class Rollouts:
    """The background half of the loop."""

    def __init__(self, recipe: Recipe, system: System, prompts: PromptStream, buffer: GroupBuffer) -> None:
        self.recipe = recipe
        self.system = system
        self.prompts = prompts
        self.buffer = buffer
        self._unfinished: dict[Ticket, Prompt] = {}
        self._tally = Tally()
        self._failed_in_a_row = 0
        self._replaced: list[Group] = []  # since the last group that was added
        self._replaced_before: dict[int, tuple[Group, list[Group]]] = {}  # by id() of a group in the buffer
        self._num_added = 0
        self._num_replaced = 0  # for the step's worth of groups that is being added

    def take_tally(self, batch: Sequence[Group]) -> Tally:
        """What happened since the last call, and the groups that were replaced on the way to this ``batch``.

        Those belong to the batch and not to the moment: generation runs ahead of training, and ends before it.
        """
        tally, self._tally = self._tally, Tally()
        before = [self._replaced_before.pop(id(group)) for group in batch if id(group) in self._replaced_before]
        tally.replaced = [old for _, replaced in before for old in replaced]
        return tally

    async def run(self) -> None:
        """Starts a group whenever the buffer has a place, until it is cancelled.

        Raises:
            RunStopped: no sample of ``HOPELESS_STEPS`` steps' worth of groups could be scored; says why.
        """
        async with asyncio.TaskGroup() as groups:
            for ticket, prompt in self._unfinished.items():
                groups.create_task(self._collect(ticket, prompt))
            while True:
                ticket = await self.buffer.admission()
                prompt = self._unfinished[ticket] = self.prompts.next()
                groups.create_task(self._collect(ticket, prompt))

    def state_dict(self, keep: Callable[[Group], int]) -> dict[str, Any]:
        """Everything but the prompts and the buffer, fit for JSON; ``keep`` puts a group aside for its number."""
        tally = self._tally
        return {
            "unfinished": {str(ticket.number): prompt.id for ticket, prompt in self._unfinished.items()},
            "replaced": [keep(group) for group in self._replaced],
            "replaced_before": [
                [keep(group), [keep(old) for old in replaced]] for group, replaced in self._replaced_before.values()
            ],
            "failed_in_a_row": self._failed_in_a_row,
            "num_added": self._num_added,
            "num_replaced": self._num_replaced,
            "tally": {
                "failed_tokens": tally.failed_tokens,
                "scoring": [tally.scoring.total, tally.scoring.count],
                "failed_groups": tally.failed_groups,
                "failures": redact_values(tally.failures),
            },
        }

    def load_state_dict(
        self, state: Mapping[str, Any], groups: Sequence[Group], again: Sequence[Ticket], prompts: Mapping[str, Prompt]
    ) -> None:
        """Continues where ``state`` was written: the groups of the tickets ``again`` are generated from the start.

        ``prompts`` are those of the run by id. Raises DataError for one that is no longer there.
        """
        self._unfinished = {ticket: prompt_of(state["unfinished"][str(ticket.number)], prompts) for ticket in again}
        self._replaced = [groups[number] for number in state["replaced"]]
        self._replaced_before = {
            id(groups[kept]): (groups[kept], [groups[number] for number in replaced])
            for kept, replaced in state["replaced_before"]
        }
        self._failed_in_a_row = state["failed_in_a_row"]
        self._num_added, self._num_replaced = state["num_added"], state["num_replaced"]
        tally = state["tally"]
        self._tally = Tally(
            failed_tokens=tally["failed_tokens"],
            scoring=Mean(*tally["scoring"]),
            failed_groups=tally["failed_groups"],
            failures=Counter(tally["failures"]),
        )

    async def _collect(self, ticket: Ticket, prompt: Prompt) -> None:
        size = self.recipe.domains[prompt.domain].group_size
        seeds = seeds_of(self.recipe.seed, ticket.number, size)  # tickets are numbered as prompts are drawn
        samples = await self.system.generate(prompt, seeds)
        self._settle(ticket, await self._score(prompt, samples))

    async def _score(self, prompt: Prompt, samples: list[Sample]) -> Group:
        began = time.perf_counter()
        with self.system.timeline.span("rewards", "score", detail=prompt.id):
            outcomes = await self.system.rewards.score_group(samples)
        self._tally.scoring += Mean(time.perf_counter() - began, 1)
        failures = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
        self._tally.failures.update(f"{failure.reward} {failure.reason}" for failure in failures)
        self._tally.failed_tokens += sum(failure.sample.num_generated for failure in failures)
        scored = tuple(outcome for outcome in outcomes if isinstance(outcome, Scored))
        return Group(prompt=prompt, scored=scored, failed=len(outcomes) - len(scored))

    def _settle(self, ticket: Ticket, group: Group) -> None:
        """Hands a group to the buffer, or gives its place to a fresh prompt."""
        del self._unfinished[ticket]
        if not group.scored:
            self._tally.failed_groups += 1
            self._failed_in_a_row += 1
            self._stop_if_hopeless()
            self.buffer.drop(ticket, "failed")
            return
        self._failed_in_a_row = 0
        if group.zero_variance and self._may_replace():
            self._replaced.append(group)
            self._num_replaced += 1
            self.buffer.drop(ticket, "zero variance")
            return
        if self._replaced:
            self._replaced_before[id(group)], self._replaced = (group, self._replaced), []
        self.buffer.add(ticket, group)
        self._num_added += 1
        if self._num_added % self.recipe.prompts_per_step == 0:
            self._num_replaced = 0

    def _may_replace(self) -> bool:
        allowed = self.recipe.objective.zero_variance == ZeroVariance.replace
        return allowed and self._num_replaced < REPLACED_STEPS * self.recipe.prompts_per_step

    def _stop_if_hopeless(self) -> None:
        if self._failed_in_a_row >= HOPELESS_STEPS * self.recipe.prompts_per_step:
            ((reason, _),) = self._tally.failures.most_common(1) or [("every generation failed", 0)]
            raise RunStopped(f"no sample of the last {self._failed_in_a_row} groups could be scored: {reason}")
