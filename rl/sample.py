"""The types that travel through Keel, from a prompt to the group the learner trains on.

    Prompt ──rollout──▶ Sample ──rewards──▶ Scored ──▶ Group ──buffer──▶ groups ──trainer.pack──▶ Microbatch ──▶ loss

Everything is a frozen dataclass over numpy and is checked when it is constructed, so a wrong length is reported with
the sample's name here and not as a shape error inside a collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from rl.selections import Selections

NDArray = np.ndarray


class Status(StrEnum):
    """How the generation of a sample ended."""

    FINISHED = "finished"
    """The policy produced a stop token."""
    TRUNCATED = "truncated"
    """A length limit cut it off; it is scored and trained like any other."""
    ABORTED = "aborted"
    """Stopped from outside before it was complete; never trained."""
    FAILED = "failed"
    """Generation or scoring raised; never trained, always counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One task, as it is read from a data source.

    Example: ``Prompt(id="math/17", domain="math", messages=({"role": "user", "content": "2+2?"},), answer="4")``.
    """

    id: str
    domain: str
    messages: tuple[Mapping[str, Any], ...] = ()
    token_ids: NDArray | None = None  # int32 [P]; given instead of messages when the prompt is already encoded
    tools: tuple[Mapping[str, Any], ...] = ()
    answer: Any = None  # whatever the domain's rewards need
    thinking: bool = True  # whether the reply starts inside <think>

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.token_ids is not None):
            raise ValueError(f"prompt {self.id}: give either messages or token_ids, not both and not neither")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Kept sets of sampling in CSR form: token t could only be ``ids[offsets[t]:offsets[t + 1]]``.

    Rows of tokens the policy did not sample are empty. Ids ascend within a row.
    """

    ids: NDArray  # int32 [M]
    offsets: NDArray  # int64 [T + 1]

    def __post_init__(self) -> None:
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.ids):
            raise ValueError(f"kept sets: offsets must start at 0 and end at {len(self.ids)}, the number of ids")
        if (self.offsets[1:] < self.offsets[:-1]).any():
            raise ValueError("kept sets: offsets must not decrease")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> NDArray:
        """int64 [T]: how many ids each token could have been."""
        return np.diff(self.offsets)

    def contains(self, token_ids: NDArray) -> NDArray:
        """bool [T]: whether ``token_ids[t]`` is in row t."""
        rows = np.repeat(np.arange(len(self)), self.sizes)
        found = np.zeros(len(self), dtype=bool)
        found[rows[self.ids == token_ids[rows]]] = True
        return found

    @classmethod
    def from_rows(cls, rows: list[NDArray]) -> Kept:
        """Joins one id array per token."""
        sizes = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
        ids = np.concatenate(rows).astype(np.int32, copy=False) if rows else np.zeros(0, np.int32)
        return cls(ids=ids, offsets=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """One call of a tool, as the policy wrote it."""

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """What a tool answered; ``failed`` when it could not do what it was asked."""

    text: str
    failed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One reply of an episode and what came back before the next one."""

    reply: str  # as sampled, like Sample.reply
    calls: tuple[ToolCall, ...] = ()
    results: tuple[ToolResult, ...] = ()  # one for each call, or one that says why the reply's calls cannot be read
    malformed: str = ""  # why the reply breaks the format of its tool calls; "" when it does not
    user: str = ""  # the environment's next user message, "" when there was none


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One trajectory as a single flat token sequence: prompt, replies and tool output.

    All per-token arrays have the length T of ``token_ids``. ``sampled`` says which tokens the policy chose; only those
    are trained on.

    An episode goes on in a sequence of its own where its context stops being append-only: after a user message, which
    drops earlier reasoning, and where context management dropped something. This is then the last sequence, and
    ``earlier`` holds those before it. They share the prompt, the reward and the advantage.
    """

    prompt: Prompt
    index: int = 0  # which of its group's siblings this is
    token_ids: NDArray  # int32 [T]
    sampled: NDArray  # bool [T]
    rollout_logprobs: NDArray  # float32 [T], after temperature and truncation; 0 where not sampled
    versions: NDArray  # int32 [T], weight version that sampled the token; -1 where not sampled
    routes: NDArray | None = None  # uint8 (uint16 above 256 experts) [T, moe_layers, top_k]; t routed as an input
    routed: NDArray | None = None  # bool [T], which rows of routes were recorded; None means all of them
    selections: Selections | None = None  # None when not recorded, or where no position sees more than it attends to
    kept: Kept | None = None  # None when sampling did not truncate
    status: Status = Status.FINISHED
    reply: str = ""  # the (last) reply, decoded once by the engine's tokenizer for rewards and reports
    turns: tuple[Turn, ...] = ()  # of an episode with an environment, over all of its sequences; () without one
    final_state: Any = None  # what the environment says of its state at the end; plain values, for rewards
    earlier: tuple[Sample, ...] = ()  # oldest first
    fault: str = ""  # why its status is FAILED
    part: int | None = None  # place among the earlier sequences of its episode; None for the last one

    def __post_init__(self) -> None:
        for name in ("sampled", "rollout_logprobs", "versions", "routes", "routed", "selections", "kept"):
            stream = getattr(self, name)
            if stream is not None and len(stream) != len(self.token_ids):
                raise ValueError(f"sample {self.id}: {name} has {len(stream)} entries for {len(self.token_ids)} tokens")
        if self.routes is None and self.routed is not None:
            raise ValueError(f"sample {self.id}: routed is given without routes")
        if self.selections is not None and (fault := self.selections.fault()):
            raise ValueError(f"sample {self.id}: selections {fault}")
        if len(self.sampled) and self.sampled[0]:
            raise ValueError(f"sample {self.id}: the first token has no context it could have been sampled from")
        if np.any(self.rollout_logprobs[~self.sampled] != 0):
            raise ValueError(f"sample {self.id}: rollout_logprobs must be 0 where nothing was sampled")
        if not np.all(np.isfinite(self.rollout_logprobs)):
            raise ValueError(f"sample {self.id}: rollout_logprobs holds a value that is not finite")
        if self.kept is not None:
            outside = np.flatnonzero(self.sampled & ~self.kept.contains(self.token_ids))
            if len(outside):
                raise ValueError(f"sample {self.id}: token {outside[0]} lies outside its own kept set")
        if [sequence.part for sequence in self.earlier] != list(range(len(self.earlier))):
            raise ValueError(f"sample {self.id}: its earlier sequences are not numbered from 0")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def id(self) -> str:
        """The name used in errors, reports and metrics: ``math/17#3``, or ``math/17#3.0`` for an earlier sequence."""
        name = f"{self.prompt.id}#{self.index}"
        return name if self.part is None else f"{name}.{self.part}"

    @property
    def sequences(self) -> tuple[Sample, ...]:
        """Everything that is trained of this episode, oldest first; ends with the sample itself."""
        return (*self.earlier, self)

    @property
    def num_sampled(self) -> int:
        """The number of tokens the policy chose in this sequence."""
        return int(np.count_nonzero(self.sampled))

    @property
    def num_generated(self) -> int:
        """|o_i|, the number of tokens the policy chose in the whole episode."""
        return sum(sequence.num_sampled for sequence in self.sequences)

    @property
    def recorded_bytes(self) -> int:
        """What this sequence's routes and selections take."""
        return sum(stream.nbytes for stream in (self.routes, self.selections) if stream is not None)

    @property
    def oldest_version(self) -> int:
        """Oldest weight version that sampled any of the episode's tokens; -1 when none was sampled."""
        sampled = [sequence.versions[sequence.sampled] for sequence in self.sequences if sequence.num_sampled]
        return int(min(versions.min() for versions in sampled)) if sampled else -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """A sample with its reward. ``parts`` holds each reward function's own value before weighting, ``comments`` what
    some of them say of it in words, by the function's name."""

    sample: Sample
    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)
    comments: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not np.isfinite(self.reward):
            raise ValueError(f"sample {self.sample.id}: reward {self.reward} is not finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Siblings of one prompt. ``scored`` holds those that can be trained; ``failed`` counts those that cannot."""

    prompt: Prompt
    scored: tuple[Scored, ...]
    failed: int = 0

    @property
    def rewards(self) -> NDArray:
        """float64 [G]."""
        return np.array([scored.reward for scored in self.scored], dtype=np.float64)

    @property
    def zero_variance(self) -> bool:
        """Whether every sibling earned the same reward, so that no advantage is left."""
        return bool(len(self.scored) == 0 or np.all(self.rewards == self.rewards[0]))

    @property
    def oldest_version(self) -> int:
        """Oldest weight version that any of its tokens was sampled with."""
        return min((scored.sample.oldest_version for scored in self.scored), default=-1)
