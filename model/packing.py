"""Packed rows as padded batches: several sequences share one row of tokens, and attention sees one row a sequence."""

from __future__ import annotations

import torch


class Packing:
    """The sequences of one packed row of N tokens, for moving between [1, N, ...] and [S, longest, ...].

    cu_seqlens: int [S + 1], rising from 0 to N; sequence s is tokens cu_seqlens[s]:cu_seqlens[s + 1].
    Raises ValueError where it does not cover the row.
    """

    __slots__ = ("_slots", "longest", "num_sequences", "positions")

    def __init__(self, cu_seqlens: torch.Tensor, num_tokens: int) -> None:
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != num_tokens or bool((lengths < 0).any()):
            raise ValueError(f"cu_seqlens must rise from 0 to the row's {num_tokens} tokens, not {cu_seqlens.tolist()}")
        self.num_sequences = lengths.shape[0]
        self.longest = int(lengths.max())
        sequence = torch.repeat_interleave(torch.arange(self.num_sequences, device=cu_seqlens.device), lengths)
        position = torch.arange(num_tokens, device=cu_seqlens.device) - cu_seqlens[:-1][sequence]
        self.positions = position.unsqueeze(0)
        self._slots = sequence * self.longest + position

    def pad(self, row: torch.Tensor) -> torch.Tensor:
        """[1, N, ...] to [S, longest, ...]; zeros after the end of each sequence."""
        padded = row.new_zeros(self.num_sequences * self.longest, *row.shape[2:])
        return padded.index_copy(0, self._slots, row[0]).view(self.num_sequences, self.longest, *row.shape[2:])

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """[S, longest, ...] to [1, N, ...]."""
        return padded.flatten(0, 1).index_select(0, self._slots).unsqueeze(0)
