"""A GPU's free memory as a learner may leave it: not zero."""

import torch

_PIECE_BYTES = 1 << 30
_LEFT_BYTES = 2 << 30


def soil_free_memory(most_bytes: int = 16 << 30) -> None:
    """Sets all bits in memory that is free on this process's GPU, which read as NaN in every floating type or as -1,
    and hands it back.

    An engine that sleeps finds it where its own memory was. Without it what it forgot may still be there.
    """
    torch.cuda.empty_cache()
    room = min(torch.cuda.mem_get_info()[0] - _LEFT_BYTES, most_bytes)
    pieces = [
        torch.full((_PIECE_BYTES // 8,), -1, dtype=torch.int64, device="cuda") for _ in range(room // _PIECE_BYTES)
    ]
    torch.cuda.synchronize()
    del pieces
    torch.cuda.empty_cache()
