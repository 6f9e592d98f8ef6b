"""What every rollout engine takes and gives back: token ids, with everything the learner needs to replay them.

An engine knows nothing about text. The driver talks to one through :class:`Engine`; `rollout.actor` implements it
around the embedded torch engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import numpy as np

from rl.config import Sampling
from rl.errors import DataError, RunStopped
from rl.sample import Kept, NDArray
from rl.selections import Selections


class EngineDied(RunStopped):
    """An engine whose process is gone, or a process that it cannot do without. The pool starts another one."""


class Finish(StrEnum):
    """Why an engine stopped generating a request."""

    STOP = "stop"
    """A stop token was sampled; it is the completion's last token."""
    LENGTH = "length"
    """`max_tokens` or the context window was reached."""
    ABORT = "abort"
    """Somebody asked for it; the completion holds what there was, possibly nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate. Equal tokens, sampling, seed and weights give an equal completion."""

    id: str  # unique among the requests an engine holds; used in errors and for `abort`
    token_ids: NDArray  # int32 [P]
    sampling: Sampling
    seed: int  # any integer; its low 64 bits count
    stop_token_ids: tuple[int, ...] = ()
    urgent: bool = False  # goes before requests that wait for a place
    schema: str | None = None  # JSON schema that the completion follows from its first token on
    ends_at: float = math.inf  # of the driver's time.monotonic(): when the driver aborts it

    def __post_init__(self) -> None:
        if len(self.token_ids) == 0:
            raise DataError(f"request {self.id}: the prompt is empty; there is nothing to continue")
        check_sampling(self.sampling)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was generated for one request: C tokens after a prompt of P."""

    token_ids: NDArray  # int32 [C], a stop token included
    logprobs: NDArray  # float32 [C], after temperature and truncation, renormalised over the kept set
    versions: NDArray  # int32 [C], the weights that sampled each token
    kept: Kept | None  # C rows; None when the request's sampling does not truncate
    routes: NDArray | None  # uint8 (uint16 above 256 experts) [P + C, moe_layers, top_k]; None without experts
    routed: NDArray | None  # bool [P + C], False for tokens that were never fed: always the last one
    finish: Finish
    selections: Selections | None = None  # of P + C tokens; None without sparse attention, or where nobody asked

    def __post_init__(self) -> None:
        for name in ("logprobs", "versions", "kept"):
            stream = getattr(self, name)
            if stream is not None and len(stream) != len(self.token_ids):
                raise ValueError(f"completion: {name} has {len(stream)} entries for {len(self.token_ids)} tokens")
        if (self.routes is None) != (self.routed is None):
            raise ValueError("completion: routes and routed come together or not at all")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """An engine's counters since it started, and its load now."""

    num_generated_tokens: int
    num_prompt_tokens: int  # as submitted; siblings that share a prefill count each
    num_prefilled_tokens: int  # as computed
    num_decode_steps: int
    busy_s: float  # seconds spent stepping
    num_active: int  # sequences being generated
    num_waiting: int
    version: int

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of stepping."""
        return self.num_generated_tokens / self.busy_s if self.busy_s else 0.0


class Engine(Protocol):
    """An inference engine as the pool sees it. Weights change between two decode steps only.

    How they arrive before a commit is each kind's own: the embedded engine has `stage`, vLLM's `receive`, and
    `take_broadcast` where all of an update comes at once.
    """

    async def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completes requests that arrive together, in their order; siblings of one prompt share its prefill.

        Raises DataError for a prompt that does not fit the context window; the others of the call are not started.
        """
        ...

    async def abort(self, request_ids: Sequence[str] | None = None) -> int:
        """Ends the named requests (all of them for None) with ``Finish.ABORT``; unknown ids are passed over.

        Returns how many were ended.
        """
        ...

    async def commit(self, version: int) -> dict[str, int]:
        """Puts what has arrived into effect as `version` and returns the checksums of all live tensors.

        Sequences in flight keep their cache and go on; their later tokens carry the later version.
        """
        ...

    async def sleep(self, *, keep_weights: bool = False) -> None:
        """Gives up what memory it can; sequences in flight and new ones wait, and go on when the engine is awake again.

        It wakes with the next update, or with :meth:`wake` if weights were kept.
        """
        ...

    async def wake(self) -> None:
        """Undoes a sleep that kept the weights."""
        ...

    async def stats(self) -> EngineStats: ...


def check_window(name: str, num_tokens: int, max_context: int, *, note: str = "") -> None:
    """Raises DataError when a prompt leaves no room in the context window for even one token of reply."""
    if num_tokens >= max_context:
        raise DataError(
            f"{name} has {num_tokens} tokens and needs at least one more for the reply, but the context window holds "
            f"{max_context} (model.max_context){note}; shorten the prompt or widen the window"
        )


def check_sampling(sampling: Sampling) -> None:
    """Raises DataError for sampling parameters that no distribution has."""
    ranges = {
        "temperature": (sampling.temperature >= 0 and np.isfinite(sampling.temperature), "at least 0"),
        "top_p": (0 < sampling.top_p <= 1, "in (0, 1]"),
        "top_k": (sampling.top_k >= 0, "at least 0 (0 keeps every token)"),
        "min_p": (0 <= sampling.min_p <= 1, "in [0, 1]"),
        "max_tokens": (sampling.max_tokens >= 1, "at least 1"),
    }
    for name, (holds, wanted) in ranges.items():
        if not holds:
            raise DataError(f"sampling.{name} is {getattr(sampling, name)} and must be {wanted}")


def truncates(sampling: Sampling) -> bool:
    """Whether a token's kept set can be smaller than the vocabulary. Temperature 0 keeps one token."""
    return sampling.temperature == 0 or sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0
