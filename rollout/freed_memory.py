"""Memory that was freed, handed back to whoever needs it next."""

from __future__ import annotations

import ctypes

import torch


def release_freed_memory(device: torch.device) -> None:
    """Lets the operating system, or other processes on a GPU, have what this process has freed.

    Left to itself the C library keeps what is freed in pieces of less than 32 MB, and torch what is freed on a GPU.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own
    if trim is not None:
        trim(0)
