"""What every kernel computes, in plain torch: DeepSeek Sparse Attention, experts and kept-set log-probabilities."""

from kernels.reference.attention import (
    decode_sparse_attention,
    dense_attention,
    latent_attention,
    masked_attention,
    mean_attention,
    packed_attention,
    packed_sparse_attention,
    selection_bitmask,
    sparse_attention,
)
from kernels.reference.draws import record_draws
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
from kernels.reference.paged import (
    cache_rows,
    locate_rows,
    paged_sparse_attention,
    project_in_fp32,
    rotate_heads,
    select_paged_keys,
    store_rows,
)

__all__ = [
    "cache_rows",
    "decode_sparse_attention",
    "dense_attention",
    "grouped_linear",
    "indexer_kl",
    "indexer_scores",
    "kept_logprobs",
    "latent_attention",
    "locate_rows",
    "masked_attention",
    "mean_attention",
    "packed_attention",
    "packed_index_scores",
    "packed_indexer_loss",
    "packed_sparse_attention",
    "paged_index_scores",
    "paged_sparse_attention",
    "project_in_fp32",
    "quantise_index_heads",
    "record_draws",
    "rotate_heads",
    "select_keys",
    "select_paged_keys",
    "selection_bitmask",
    "sparse_attention",
    "store_rows",
    "topk_indices",
    "topk_mask",
]
