"""Which form DSA's attention takes over whole sequences; all three are the same function.

Dense and masked attention expand keys and values for every head and compute every causal pair; the masked form then
drops what was not selected. Sparse attention stays in the latent space, where a pair costs several times as much, and
computes selected pairs only.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class AttentionForm(Enum):
    DENSE = "dense"  # nothing is left out
    MASKED = "masked"  # `packed_attention` under a bitmask of the selected keys
    SPARSE = "sparse"  # `packed_sparse_attention`


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """TFLOP/s of the mathematics at DeepSeek-V3.2's dimensions, one H200."""

    masked: float
    sparse: float


# masked_mha at 8192 tokens and sparse_mla at 128 heads in BENCHMARKS.md; training is both passes together.
FORWARD = Rates(masked=472.0, sparse=562.0)
TRAINING = Rates(masked=339.0, sparse=355.0)


def attention_form(
    longest: int, selected: int, *, expanded_dim: int, latent_dim: int, value_latent_dim: int, training: bool
) -> AttentionForm:
    """The fastest form for sequences of up to `longest` tokens, each of which selects `selected` keys.

    expanded_dim is a head's query and value dimensions together (192 + 128), latent_dim the absorbed query's (576)
    and value_latent_dim the part of it that is value (512).
    """
    if longest <= selected:
        return AttentionForm.DENSE
    return (
        AttentionForm.MASKED
        if longest
        <= crossover(
            selected,
            expanded_dim=expanded_dim,
            latent_dim=latent_dim,
            value_latent_dim=value_latent_dim,
            rates=TRAINING if training else FORWARD,
        )
        else AttentionForm.SPARSE
    )


def crossover(selected: int, *, expanded_dim: int, latent_dim: int, value_latent_dim: int, rates: Rates) -> int:
    """The length from which on selected pairs in the latent space cost less than half a square of expanded pairs."""
    sparse = selected * (latent_dim + value_latent_dim) / rates.sparse
    masked = 0.5 * expanded_dim / rates.masked
    return int(sparse / masked)
