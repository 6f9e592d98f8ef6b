"""What of a run changes from step to step on the driver's side: taken at one moment, written later, put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rl.buffer import GroupBuffer
from rl.prompts import PromptStream
from rl.rollouts import Rollouts
from rl.sample import Group, NDArray, Prompt
from rl.saved_groups import Arrays, group_of, group_record
from trainer.learner import Learner


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """A moment between two steps. Groups never change, so that they can be written while the run goes on."""

    values: dict[str, Any]  # fit for JSON, with the numbers of groups
    groups: list[Group] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """About what its groups will take on the disk."""
        samples = (sequence for group in self.groups for one in group.scored for sequence in one.sample.sequences)
        return sum(1024 + 16 * len(one) + one.recorded_bytes for one in samples)

    def encode(self) -> tuple[dict[str, Any], Arrays]:
        """The same as JSON and arrays."""
        arrays: Arrays = {}
        records = [group_record(group, str(number), arrays) for number, group in enumerate(self.groups)]
        return {"values": self.values, "groups": records}, arrays

    @classmethod
    def decode(cls, record: Mapping[str, Any], arrays: Mapping[str, NDArray], prompts: Sequence[Prompt]) -> LoopState:
        """Raises DataError when one of its prompts is not among ``prompts``."""
        by_id = {prompt.id: prompt for prompt in prompts}
        groups = [group_of(one, arrays, by_id) for one in record["groups"]]
        return cls(values=record["values"], groups=groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The parts of the loop that have a state."""

    prompts: PromptStream
    buffer: GroupBuffer
    rollouts: Rollouts
    shuffle: np.random.Generator
    learner: Learner

    def state(self) -> LoopState:
        """All of it at this moment."""
        groups: list[Group] = []
        numbers: dict[int, int] = {}

        def keep(group: Group) -> int:
            if id(group) not in numbers:
                numbers[id(group)] = len(groups)
                groups.append(group)
            return numbers[id(group)]

        values = {
            "prompts": self.prompts.state_dict(),
            "buffer": self.buffer.state_dict(keep),
            "rollouts": self.rollouts.state_dict(keep),
            "shuffle": self.shuffle.bit_generator.state,
            "learner": self.learner.state_dict(),
        }
        return LoopState(values=values, groups=groups)

    def restore(self, state: LoopState, prompts: Sequence[Prompt]) -> None:
        """Puts everything back; raises DataError when the prompts are others."""
        values = state.values
        self.prompts.load_state_dict(values["prompts"])
        again = self.buffer.load_state_dict(values["buffer"], state.groups)
        by_id = {prompt.id: prompt for prompt in prompts}
        self.rollouts.load_state_dict(values["rollouts"], state.groups, again, by_id)
        self.shuffle.bit_generator.state = values["shuffle"]
        self.learner.load_state_dict(values["learner"])
