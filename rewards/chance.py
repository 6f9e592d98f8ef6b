"""Chance in rewards: a function of the run's seed and of what is scored, whichever process scores it, and when.

So a run that goes on from a checkpoint draws what it would have drawn.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from rl.sample import Sample

_run_seed = 0


def begin(run_seed: int) -> None:
    """What every draw of this process depends on besides what it is for."""
    global _run_seed
    _run_seed = run_seed


def drawn_for(*texts: str | int) -> random.Random:
    """A generator for one use. Nothing in the texts can have known what it gives, as they decide that."""
    return random.Random(_number(str(text).encode() for text in texts))


def seed_globals(reward: str, samples: Sequence[Sample], attempt: int) -> None:
    """Puts the process's own generators (``random``, ``numpy.random``, torch's where it is there) before one call."""
    said = (
        part for sample in samples for one in sample.sequences for part in (one.id.encode(), one.token_ids.tobytes())
    )
    number = _number((f"{reward} {attempt}".encode(), *said))
    random.seed(number)
    np.random.seed(number % (1 << 32))
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number % (1 << 63))


def _number(parts: Iterable[bytes]) -> int:
    digest = hashlib.sha256(str(_run_seed).encode())
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return int.from_bytes(digest.digest(), "little")
