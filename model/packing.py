"""The sequences of a batch as attention sees them: padded groups of similar length, each with causal order.

Everything else in the model works on tokens one by one, so several sequences may share one packed row; attention takes
them apart and puts them together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

# A group's shortest sequence is at least this share of its longest, which bounds the work lost to padding.
_MIN_FILL = 0.7

# Tokens of the longest sequence up to which a CPU works on padded groups.
_MAX_GROUPED = 2048


class SequenceGroup:
    """S sequences, padded to the longest of them, T tokens.

    `rows` int64 [S * T] picks them from the packed row; None means that the batch is the group as it stands. Padding
    repeats a sequence's last token: causality hides it from all real queries, and its own output is dropped.
    """

    __slots__ = ("_causal", "_device", "num_sequences", "num_tokens", "rows")

    def __init__(self, num_sequences: int, num_tokens: int, device: torch.device, rows: torch.Tensor | None) -> None:
        self.num_sequences = num_sequences
        self.num_tokens = num_tokens
        self.rows = rows
        self._device = device
        self._causal: torch.Tensor | None = None

    @property
    def causal(self) -> torch.Tensor:
        """bool [1, T, T]: which keys each query may see."""
        if self._causal is None:
            shape = (1, self.num_tokens, self.num_tokens)
            self._causal = torch.ones(shape, dtype=torch.bool, device=self._device).tril_()
        return self._causal

    def take(self, stream: torch.Tensor) -> torch.Tensor:
        """A per-token stream [B, T, ...] or [1, N, ...] as [S, T, ...]."""
        if self.rows is None:
            return stream
        return stream[0].index_select(0, self.rows).unflatten(0, (self.num_sequences, self.num_tokens))


class Batch:
    """Input of shape [B, T]: B sequences, or with cu_seqlens (int [S + 1], rising from 0 to T) S packed in one row.

    Raises ValueError for cu_seqlens that do not describe the row.
    """

    __slots__ = ("_place", "cu_seqlens", "ends", "groups", "positions", "starts")

    def __init__(self, input_ids: torch.Tensor, cu_seqlens: torch.Tensor | None) -> None:
        num_rows, num_tokens = input_ids.shape
        device = input_ids.device
        ends = torch.arange(num_rows + 1, device=device) * num_tokens if cu_seqlens is None else cu_seqlens
        # The tokens of all rows one after another, N of them: where the sequences end, and what each token sees.
        self.cu_seqlens = ends.int()  # int32 [S + 1]
        self.ends = torch.arange(1, num_rows * num_tokens + 1, dtype=torch.int32, device=device)  # [N], exclusive
        order = torch.arange(num_tokens, device=device)
        if cu_seqlens is None:
            self.groups = [SequenceGroup(num_rows, num_tokens, device, None)]
            self.positions = order.unsqueeze(0)  # int64 [1, T], place within the sequence
            self.starts = self.cu_seqlens[:-1].repeat_interleave(num_tokens)  # int32 [N]
            self._place = None
            return
        bounds = cu_seqlens.tolist()
        lengths = [end - start for start, end in pairwise(bounds)]
        if num_rows != 1 or bounds[0] != 0 or bounds[-1] != num_tokens or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens {bounds} must rise from 0 to {num_tokens} and describe a single row")
        starts, sizes = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        places = torch.empty_like(starts)  # of each sequence's first token, once the padded groups are lined up
        self.groups = []
        lined_up = 0
        for members in _similar(lengths):
            longest = lengths[members[0]]
            index = torch.tensor(members, device=device)
            within = torch.minimum(order[:longest], sizes[index].unsqueeze(1) - 1)
            rows = (starts[index].unsqueeze(1) + within).flatten()
            self.groups.append(SequenceGroup(len(members), longest, device, rows))
            places[index] = lined_up + order[: len(members)] * longest
            lined_up += rows.shape[0]
        sequence = torch.repeat_interleave(sizes)
        self.starts = starts[sequence].int()
        position = order - starts[sequence]
        self.positions = position.unsqueeze(0)
        self._place = places[sequence] + position

    @property
    def longest(self) -> int:
        return self.groups[0].num_tokens

    @property
    def packed(self) -> bool:
        """Whether attention should take the tokens as one row, through the packed kernels, and not group by group.

        A CPU is fastest with large matrix products over padded groups, until their squares no longer fit its memory.
        """
        return self.cu_seqlens.device.type != "cpu" or self.longest > _MAX_GROUPED

    def join(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """One [S, T, ...] a group back to the shape of the input, [B, T, ...] or [1, N, ...]."""
        if self._place is None:
            return parts[0]
        flat = [part.flatten(0, 1) for part in parts]
        return (flat[0] if len(flat) == 1 else torch.cat(flat)).index_select(0, self._place).unsqueeze(0)


def _similar(lengths: list[int]) -> list[list[int]]:
    """Indices of non-empty sequences, longest first, cut into groups of similar length."""
    groups: list[list[int]] = []
    for index in sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i]):
        if not groups or lengths[index] < _MIN_FILL * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(index)
    return groups
