"""Dense causal attention over packed rows by torch's flash attention, on a GPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

_WIDEST_HEAD = 256


def dense_attention(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    longest: int,
) -> torch.Tensor:
    """As `kernels.reference.dense_attention`; what torch's kernel does not take, `packed_attention` does.

    The kernel's gradient of the queries is summed by atomics, in any order, unless torch.use_deterministic_algorithms
    is on.
    """
    dim, value_dim = queries.shape[-1], values.shape[-1]
    if not has_kernel(queries.dtype, dim, value_dim):
        from kernels.masked_mha import packed_attention

        return packed_attention(queries, keys, values, cu_seqlens, scale)[0]
    bounds = cu_seqlens.to(torch.int32)
    # The kernel has one dimension for all heads; MLA's values have fewer.
    padded = F.pad(values, (0, dim - value_dim)) if value_dim < dim else values
    out = varlen_attn(queries, keys, padded, bounds, bounds, longest, longest, scale=scale, window_size=(-1, 0))
    assert isinstance(out, torch.Tensor)
    return out[..., :value_dim]


def has_kernel(dtype: torch.dtype, dim: int, value_dim: int) -> bool:
    """Whether torch's kernel takes queries of `dim` and values of `value_dim` in `dtype`."""
    return dtype in (torch.bfloat16, torch.float16) and dim % 8 == 0 and value_dim <= dim <= _WIDEST_HEAD
