"""A scored sample together with what the learner made of it: one line of ``samples/step_N.jsonl``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rl.sample import NDArray, Sample, Scored
from rl.secrets import redact_pieces

LONGEST_CHARACTER = 4  # bytes of one character in UTF-8


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceView:
    """One training sequence of a trajectory as people read it. An episode may have several (``Sample.earlier``)."""

    sample: Sample
    token_texts: Sequence[str]  # [T], see ``token_texts``
    log_ratios: NDArray | None = None  # float32 [T], learner minus rollout log-probability; None when not known
    masked: bool = False  # whether the off-policy mask dropped it from the surrogate

    def __post_init__(self) -> None:
        sample = self.sample
        for name, stream in (("token_texts", self.token_texts), ("log_ratios", self.log_ratios)):
            if stream is not None and len(stream) != len(sample):
                raise ValueError(f"trajectory {sample.id}: {name} has {len(stream)} entries for {len(sample)} tokens")

    def record(self) -> dict[str, Any]:
        """A value for each token; flags are 0 or 1; unknown streams are null; ids of a secret's tokens are 0."""
        sample = self.sample
        routed = np.ones(len(sample), bool) if sample.routed is None else sample.routed
        pieces = redact_pieces(self.token_texts)
        unchanged = np.array([one == other for one, other in zip(pieces, self.token_texts, strict=True)], bool)
        return {
            "reply": sample.reply,
            "masked": self.masked,
            "token_ids": np.where(unchanged, sample.token_ids, 0).tolist(),
            "tokens": pieces,
            "sampled": sample.sampled.astype(int).tolist(),
            "rollout_logprobs": _rounded(sample.rollout_logprobs),
            "log_ratios": None if self.log_ratios is None else _rounded(self.log_ratios),
            "kept_sizes": None if sample.kept is None else sample.kept.sizes.tolist(),
            "routed": None if sample.routes is None else routed.astype(int).tolist(),
            "versions": sample.versions.tolist(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What a person needs to judge one sample: the conversation, its reward, and every token's numbers."""

    scored: Scored
    sequences: Sequence[SequenceView]  # those of ``Sample.sequences``, in their order
    advantage: float

    def record(self) -> dict[str, Any]:
        """Plain JSON values. The last sequence's streams stand at the top, those before it under ``earlier``."""
        sample = self.scored.sample
        *earlier, last = self.sequences
        return {
            "id": sample.id,
            "prompt": sample.prompt.id,
            "domain": sample.prompt.domain,
            "messages": [dict(message) for message in sample.prompt.messages],
            "tools": [dict(tool) for tool in sample.prompt.tools],
            "answer": sample.prompt.answer,
            "thinking": sample.prompt.thinking,
            "index": sample.index,
            "turns": [asdict(turn) for turn in sample.turns],
            "final_state": sample.final_state,
            "status": str(sample.status),
            "reward": self.scored.reward,
            "parts": dict(self.scored.parts),
            "comments": dict(self.scored.comments),
            "advantage": self.advantage,
            **last.record(),
            "earlier": [sequence.record() for sequence in earlier],
        }


def token_texts(token_ids: Sequence[int] | NDArray, decode: Callable[[list[int]], str]) -> list[str]:
    """The text each token adds, so that joining them reads as the whole text.

    Where several tokens of a byte-level vocabulary spell one character, the last of them carries it and the others are
    empty. ``decode`` is the tokenizer's, with special tokens kept.
    """
    texts: list[str] = []
    pending: list[int] = []
    for position, token in enumerate(token_ids, start=1):
        pending.append(int(token))
        text = decode(pending)
        unfinished = text.endswith("\ufffd") and len(pending) < LONGEST_CHARACTER and position < len(token_ids)
        texts.append("" if unfinished else text)
        if not unfinished:
            pending.clear()
    return texts


def _rounded(stream: NDArray) -> list[float]:
    """Five significant digits: plenty to read, and a third of the bytes."""
    return [float(f"{value:.5g}") for value in stream.tolist()]
