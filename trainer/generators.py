"""The states of a process's random generators, without pickle."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Torch's as tensors (``cuda`` is [GPUs, bytes]), Python's and numpy's as plain values for JSON."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.stack(torch.cuda.get_rng_state_all())
    kind, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    words = {
        "numpy": [kind, np.asarray(keys).tolist(), place, has_gauss, gauss],
        "python": random.getstate(),
    }
    return tensors, words


def restore_generators(tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> None:
    """Puts back what :func:`generator_states` gave."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state_all(list(tensors["cuda"]))
    kind, keys, place, has_gauss, gauss = words["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), place, has_gauss, gauss))
    version, state, following = words["python"]
    random.setstate((version, tuple(state), following))
