"""The dispatch point of Keel's kernels: each function here picks an implementation by the device of its first tensor.

`kernels.reference` holds the plain-torch meaning of every function and serves every device and function that has no
entry in `_IMPLEMENTATIONS`. What is entered there has the same signature, and its module is imported on first use.

`__version__` matters: transformers probes for a package of this name and asks for its version.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from kernels import reference

__version__ = "0.1.0"

P = ParamSpec("P")
R = TypeVar("R")

# Device type to function name to the module that defines it.
_IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "cuda": {
        "cache_rows": "kernels.paged",
        "decode_sparse_attention": "kernels.sparse_mla",
        "dense_attention": "kernels.varlen",
        "grouped_linear": "kernels.grouped",
        "indexer_scores": "kernels.indexer",
        "kept_logprobs": "kernels.logprob",
        "latent_attention": "kernels.sparse_mla",
        "packed_attention": "kernels.masked_mha",
        "packed_index_scores": "kernels.indexer",
        "packed_indexer_loss": "kernels.indexer_loss",
        "packed_sparse_attention": "kernels.sparse_mla",
        "paged_index_scores": "kernels.indexer",
        "paged_sparse_attention": "kernels.paged",
        "project_in_fp32": "kernels.paged",
        "quantise_index_heads": "kernels.indexer",
        "record_draws": "kernels.draws",
        "rotate_heads": "kernels.paged",
        "select_keys": "kernels.indexer",
        "select_paged_keys": "kernels.paged",
        "selection_bitmask": "kernels.masked_mha",
        "sparse_attention": "kernels.sparse_mla",
        "store_rows": "kernels.paged",
        "topk_indices": "kernels.topk",
        "topk_mask": "kernels.topk",
    }
}


def _by_device(meaning: Callable[P, R]) -> Callable[P, R]:
    name = meaning.__name__

    @functools.wraps(meaning)
    def dispatch(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0]
        assert isinstance(first, torch.Tensor), f"{name}: the first argument must be a tensor"
        module = _IMPLEMENTATIONS.get(first.device.type, {}).get(name)
        function = meaning if module is None else getattr(importlib.import_module(module), name)
        return function(*args, **kwargs)

    return dispatch


indexer_scores = _by_device(reference.indexer_scores)
topk_mask = _by_device(reference.topk_mask)
topk_indices = _by_device(reference.topk_indices)
masked_attention = _by_device(reference.masked_attention)
latent_attention = _by_device(reference.latent_attention)
packed_attention = _by_device(reference.packed_attention)
selection_bitmask = _by_device(reference.selection_bitmask)
sparse_attention = _by_device(reference.sparse_attention)
packed_sparse_attention = _by_device(reference.packed_sparse_attention)
dense_attention = _by_device(reference.dense_attention)
decode_sparse_attention = _by_device(reference.decode_sparse_attention)
mean_attention = _by_device(reference.mean_attention)
indexer_kl = _by_device(reference.indexer_kl)
packed_indexer_loss = _by_device(reference.packed_indexer_loss)
packed_index_scores = _by_device(reference.packed_index_scores)
paged_index_scores = _by_device(reference.paged_index_scores)
quantise_index_heads = _by_device(reference.quantise_index_heads)
select_keys = _by_device(reference.select_keys)
store_rows = _by_device(reference.store_rows)
rotate_heads = _by_device(reference.rotate_heads)
project_in_fp32 = _by_device(reference.project_in_fp32)
locate_rows = _by_device(reference.locate_rows)
select_paged_keys = _by_device(reference.select_paged_keys)
cache_rows = _by_device(reference.cache_rows)
paged_sparse_attention = _by_device(reference.paged_sparse_attention)
grouped_linear = _by_device(reference.grouped_linear)
kept_logprobs = _by_device(reference.kept_logprobs)
record_draws = _by_device(reference.record_draws)

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
