"""What every kernel computes, in plain torch: DeepSeek Sparse Attention, experts and kept-set log-probabilities."""

from kernels.reference.attention import latent_attention, masked_mha, mean_attention, sparse_attention
from kernels.reference.grouped import grouped_linear
from kernels.reference.indexer import (
    indexer_kl,
    indexer_scores,
    packed_index_scores,
    packed_indexer_loss,
    paged_index_scores,
    quantise_index_heads,
    select_keys,
    topk_indices,
    topk_mask,
)
from kernels.reference.logprob import kept_logprobs

__all__ = [
    "grouped_linear",
    "indexer_kl",
    "indexer_scores",
    "kept_logprobs",
    "latent_attention",
    "masked_mha",
    "mean_attention",
    "packed_index_scores",
    "packed_indexer_loss",
    "paged_index_scores",
    "quantise_index_heads",
    "select_keys",
    "sparse_attention",
    "topk_indices",
    "topk_mask",
]
