"""Keel's DeepSeek Sparse Attention inside vLLM: what ``rollout.dsa: keel`` puts in the place of vLLM's own.

`KeelV32ForCausalLM` goes into vLLM's model registry under the architecture's own name (``model_class_overrides``), in
every process of an engine. Its parameters are vLLM's, name by name, so loading, weight updates and checksums are as
ever. What is different:

* The indexer computes as the learner's does (`model.indexer`): keys and queries in the model's dtype, head weights in
  fp32, nothing quantised. Its cache holds keys of that dtype.
* Scores, top-k and attention are `kernels.paged`: the same arithmetic for a row of a prompt and of a decode step, and
  bits that do not depend on the batch. With ``VLLM_BATCH_INVARIANT=1``, which vLLM's sparse backends refuse, that goes
  for the whole model.
* Any latent size, index size and index_topk.
* Where the engine is to return what it selected (``additional_config``, `SELECTIONS`), every layer leaves it as bits in
  a buffer, from which it travels with vLLM's routed experts (`RoutesAndKeys`), through prefix cache and preemption.

Importing this module needs vLLM. vLLM decides what a decode step's CUDA graph holds: everything here, since nothing
waits for the device and shapes follow from those of the batch.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUntypedFunctionDecorator=false

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from vllm import envs
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import RoutedExpertsCapturer
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.layernorm import LayerNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.models.deepseek_v2 import DeepseekV32IndexerCache
from vllm.models.deepseek_v32.attention import DeepseekV32Attention
from vllm.models.deepseek_v32.nvidia import model as vllm_model
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    MLAAttentionImpl,
    MultipleOf,
)
from vllm.v1.attention.backends.mla.sparse_utils import align_blocks_to_rows, flat_kv_row_view

import kernels
from kernels.indexer import SCORES_LIMIT
from model.config import ModelConfig
from model.rope import Rope

SELECTIONS = "keel_selections"
"""The key of vLLM's ``additional_config`` that asks for them."""

# Tokens of a page, for latents and index keys alike; what vLLM's own backends for this model take.
_PAGE = 64


@dataclass(kw_only=True)
class Rows:
    """A batch as one cache's layers see it: R query rows, of which CUDA graphs may have padded the last ones."""

    num_rows: int
    owners: torch.Tensor  # int32 [R], the row of block_table that is the query's sequence
    seen: torch.Tensor  # int32 [R], how many keys of it the query sees; 0 for padding
    slots: torch.Tensor  # int64 [R], where the query's own entry goes; negative for padding
    block_table: torch.Tensor  # int32 [B, W]
    longest: int  # a bound of seen


class RowsBuilder(AttentionMetadataBuilder):
    """Keeps owners and lengths in buffers of its own, which captured graphs read."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1)
        room = vllm_config.scheduler_config.max_num_batched_tokens
        self._owners = torch.zeros(room, dtype=torch.int32, device=device)
        self._seen = torch.zeros(room, dtype=torch.int32, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Rows:
        del common_prefix_len, fast_build
        batch, num_rows = common_attn_metadata, common_attn_metadata.num_actual_tokens
        owners, seen = kernels.locate_rows(batch.query_start_loc, batch.seq_lens, num_rows)
        return Rows(
            num_rows=num_rows,
            owners=self._owners[:num_rows].copy_(owners),
            seen=self._seen[:num_rows].copy_(seen),
            slots=batch.slot_mapping,
            block_table=batch.block_table_tensor,
            longest=batch.max_seq_len,
        )


class LatentImpl(MLAAttentionImpl):
    """Only what vLLM's MLA layer asks of an implementation when it is built; `KeelAttention` computes."""

    is_sparse: ClassVar[bool] = True
    supports_dense_mha_prefill = False
    supports_pcp = False

    def __init__(self, num_heads: int, head_size: int, scale: float, **others: Any) -> None:
        del others
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)

    def forward_mqa(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("KeelAttention attends by itself")


class KeyBackend(AttentionBackend):
    """The cache of index keys."""

    @staticmethod
    def get_name() -> str:
        return "KEEL_INDEX_KEYS"

    @staticmethod
    def get_builder_cls() -> type[RowsBuilder]:
        return RowsBuilder

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("a cache of index keys has no attention")

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        del kv_cache_spec
        return [_PAGE]

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return True


class LatentBackend(KeyBackend):
    """The cache of latents: [normed latent | rotated rope key] a token, in the model's dtype."""

    @staticmethod
    def get_name() -> str:
        return "KEEL_LATENTS"

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        del kv_cache_spec
        return [MultipleOf(_PAGE)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        return align_blocks_to_rows(spec)

    @classmethod
    def is_mla(cls) -> bool:
        return True

    @classmethod
    def is_sparse(cls) -> bool:
        return True


class IndexKeyCache(DeepseekV32IndexerCache):
    def get_attn_backend(self) -> type[AttentionBackend]:
        return KeyBackend


class KeelIndexer(nn.Module):
    """`model.indexer.Indexer` with the parameters of vLLM's."""

    def __init__(
        self,
        vllm_config: Any,
        config: Any,
        hidden_size: int,
        q_lora_rank: int,
        quant_config: Any,
        cache_config: Any,
        topk_indices_buffer: torch.Tensor | None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.topk_indices_buffer = topk_indices_buffer
        self.num_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.topk = config.index_topk
        self.weight_scale = self.num_heads**-0.5 * self.head_dim**-0.5
        self.wq_b = ReplicatedLinear(
            q_lora_rank, self.num_heads * self.head_dim, bias=False, quant_config=quant_config, prefix=f"{prefix}.wq_b"
        )
        self.wk_weights_proj = MergedColumnParallelLinear(
            hidden_size,
            [self.head_dim, self.num_heads],
            bias=False,
            quant_config=None,
            disable_tp=True,
            prefix=f"{prefix}.wk_weights_proj",
        )
        self.k_norm = LayerNorm(self.head_dim, eps=1e-6, dtype=torch.float32)
        self.k_cache = IndexKeyCache(
            head_dim=self.head_dim,
            dtype=vllm_config.model_config.dtype,
            prefix=f"{prefix}.k_cache",
            cache_config=cache_config,
        )

    def heads(
        self, hidden: torch.Tensor, query_latent: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [R, J, d], keys [R, d] and head weights fp32 [R, J], as `model.indexer.Indexer` computes them."""
        to_key, to_weights = self.wk_weights_proj.weight.split([self.head_dim, self.num_heads])
        queries = self.wq_b(query_latent)[0].unflatten(-1, (self.num_heads, self.head_dim))
        keys = F.linear(hidden, to_key).float()
        keys = F.layer_norm(keys, (self.head_dim,), self.k_norm.weight, self.k_norm.bias, self.k_norm.eps)
        keys = keys.to(hidden.dtype).unsqueeze(1)
        weights = kernels.project_in_fp32(hidden, to_weights) * self.weight_scale
        rotated, rotated_keys = torch.empty_like(queries), torch.empty_like(keys)
        kernels.rotate_heads(rotated, queries, cos, sin, interleaved=False)
        kernels.rotate_heads(rotated_keys, keys, cos, sin, interleaved=False)
        return rotated, rotated_keys.squeeze(1), weights


@dataclass
class Step:
    """What all layers share during a forward; one a model."""

    rope: Rope
    angles: tuple[torch.Tensor, torch.Tensor] | None = None
    """Cosine and sine of the batch's rows, fp32 [R, qk_rope_head_dim / 2] each."""
    keys: torch.Tensor | None = None
    """What the batch's rows selected, where it is to be returned: bits, int32 [R, layers, words]."""
    recorded: dict[str, list[torch.Tensor]] | None = None
    """While recording, the selections of every layer, by the layer's name: int32 [R, k] a batch."""


class KeelAttention(DeepseekV32Attention):
    """One layer's MLA over the keys that the indexer selects."""

    indexer_cls = KeelIndexer
    supports_dense_mha_prefill = False
    step: Step
    layer: int

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{**arguments, "attn_backend": LatentBackend})
        if self.impl.dcp_world_size > 1 or self.use_pcp:
            raise NotImplementedError("rollout.dsa keel has no context parallelism; use tensor parallelism")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states [R, hidden_size], normed. Returns the same shape, not yet summed over tensor-parallel ranks."""
        del positions
        angles = self.step.angles
        assert angles is not None
        sizes = [self.q_lora_rank, self.kv_lora_rank, self.qk_rope_head_dim]
        query_latent, latent, rope_key = self.fused_qkv_a_proj(hidden_states)[0].split(sizes, dim=-1)
        query_latent = _rms_norm(query_latent, self.q_a_layernorm)
        projected = self.q_b_proj(query_latent)[0].unflatten(-1, (self.num_local_heads, self.qk_head_dim))
        nope, rope = projected.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        queries = projected.new_empty(*projected.shape[:2], self.kv_lora_rank + self.qk_rope_head_dim)
        torch.bmm(nope.transpose(0, 1), self.W_UK_T, out=queries[..., : self.kv_lora_rank].transpose(0, 1))
        kernels.rotate_heads(queries[..., self.kv_lora_rank :], rope, *angles, interleaved=True)
        latents = latent.new_empty(latent.shape[0], self.kv_lora_rank + self.qk_rope_head_dim)
        latents[:, : self.kv_lora_rank] = _rms_norm(latent, self.kv_a_layernorm)
        rope_keys = latents[:, self.kv_lora_rank :].unsqueeze(1)
        kernels.rotate_heads(rope_keys, rope_key.unsqueeze(1), *angles, interleaved=True)
        index_queries = index_keys = index_weights = None
        if self.indexer is not None:
            index_queries, index_keys, index_weights = self.indexer.heads(hidden_states, query_latent, *angles)
        heads = hidden_states.new_empty(hidden_states.shape[0], self.num_local_heads * self.v_head_dim)
        self._select_and_attend(queries, latents, index_queries, index_keys, index_weights, heads)
        return self.o_proj(heads)[0]

    @eager_break_during_capture
    def _select_and_attend(
        self,
        queries: torch.Tensor,
        latents: torch.Tensor,
        index_queries: torch.Tensor | None,
        index_keys: torch.Tensor | None,
        index_weights: torch.Tensor | None,
        heads: torch.Tensor,
    ) -> None:
        """Writes both caches, and the heads' outputs. The graph of a decode step holds it; a prompt's runs it as is."""
        batch = get_forward_context().attn_metadata
        if not isinstance(batch, dict):
            heads.zero_()
            self._reserve(heads.device)
            return
        rows: Rows = batch[self.layer_name]
        num_rows = rows.num_rows
        kernels.store_rows(self.kv_cache, rows.slots[:num_rows], latents[:num_rows])
        places = self.topk_indices_buffer[:num_rows]
        if self.indexer is not None:
            assert index_queries is not None and index_keys is not None and index_weights is not None
            key_rows: Rows = batch[self.indexer.k_cache.prefix]
            key_pages = self.indexer.k_cache.kv_cache
            kernels.store_rows(key_pages, key_rows.slots[:num_rows], index_keys[:num_rows])
            places.copy_(self._selected(index_queries[:num_rows], key_pages, index_weights[:num_rows], key_rows))
        if self.step.keys is not None:
            words = self.step.keys.shape[2]
            self.step.keys[:num_rows, self.layer] = kernels.selection_bitmask(places, 32 * words)
        cache, apart = flat_kv_row_view(self.kv_cache, self.kv_cache.shape[1])
        entries = kernels.cache_rows(places, rows.block_table, rows.owners, self.kv_cache.shape[1], apart)
        attended = kernels.paged_sparse_attention(queries[:num_rows], cache, entries, self.scale, self.kv_lora_rank)
        into = heads[:num_rows].view(num_rows, self.num_local_heads, self.v_head_dim).transpose(0, 1)
        torch.bmm(attended.transpose(0, 1), self.W_UV, out=into)
        heads[num_rows:].zero_()

    def _selected(self, queries: torch.Tensor, pages: torch.Tensor, weights: torch.Tensor, rows: Rows) -> torch.Tensor:
        captured = torch.cuda.is_current_stream_capturing()
        longest = None if captured else rows.longest
        places = kernels.select_paged_keys(
            queries, pages, weights, rows.block_table, rows.owners, rows.seen, self.indexer.topk, longest
        )
        if self.step.recorded is not None and not captured:
            self.step.recorded.setdefault(self.layer_name, []).append(places.cpu())
        return places

    def _reserve(self, device: torch.device) -> None:
        """Takes, while vLLM measures, the memory of the largest batch: its scores and the winners of top-k's rounds.

        Where selections are returned, also the copies on the way to the host: of a batch, and of the one before.
        """
        leaving = 0 if self.step.keys is None else 2 * self.step.keys.nbytes
        torch.empty(4 * (SCORES_LIMIT * 3 // 2) + leaving, dtype=torch.uint8, device=device)


class RoutesAndKeys(RoutedExpertsCapturer):
    """vLLM's recorder of routed experts, whose rows go on with the bits of the selected keys: uint8 [R, layers, bytes].

    A row of a layer is its experts, a byte or two each (zeros where it has none), and then `Step.keys`. vLLM makes it
    when it has the model and its caches, before it captures graphs, and takes the rows' shape and dtype from it.
    """

    step: ClassVar[Step]

    def __init__(self, max_num_batched_tokens: int, vllm_config: Any) -> None:
        super().__init__(max_num_batched_tokens, vllm_config)
        keys = self.step.keys
        assert keys is not None and len(keys) >= max_num_batched_tokens
        layers, experts = self.shape_per_token
        self.shape_per_token = (layers, experts * self.output_dtype.itemsize + 4 * keys.shape[2])
        self.output_dtype_name = "uint8"

    def snapshot_routing_data(self, num_tokens: int) -> torch.Tensor:
        routes, keys = super().snapshot_routing_data(num_tokens), self.step.keys
        assert keys is not None
        return torch.cat([routes.view(torch.uint8), keys[:num_tokens].view(torch.uint8)], dim=2)


class KeelV32ForCausalLM(vllm_model.DeepseekV32ForCausalLM):
    """vLLM's deepseek_v32 with Keel's attention in every layer."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        with _attention_of_layers(KeelAttention):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM has changed its own copy of the config by now.
        values = json.loads((Path(vllm_config.model_config.model) / "config.json").read_text())
        self.step = Step(rope=Rope(ModelConfig.from_dict(values)))
        if vllm_config.additional_config.get(SELECTIONS):
            self._return_selections(vllm_config)
        for layer, decoder in enumerate(self.model.layers):
            decoder.self_attn.step, decoder.self_attn.layer = self.step, layer
        for module in self.modules():
            if isinstance(module, GateLinear) and envs.VLLM_BATCH_INVARIANT:
                module.LL_BF16_MAX_TOKENS = 0  # small batches would get another kernel, in this mode too

    def _return_selections(self, vllm_config: Any) -> None:
        from vllm.distributed.aux_output_connector import worker as recorders  # where vLLM's worker looks its class up

        room = vllm_config.scheduler_config.max_num_batched_tokens
        words = (vllm_config.model_config.max_model_len + 31) // 32
        layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.step.keys = torch.zeros(room, layers, words, dtype=torch.int32, device="cuda")
        RoutesAndKeys.step = self.step
        recorders.RoutedExpertsCapturer = RoutesAndKeys

    def forward(self, input_ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        cos, sin = self.step.rope(positions.unsqueeze(0)).of_tokens(torch.Size([1, positions.shape[0]]))
        self.step.angles = cos.squeeze(0), sin.squeeze(0)
        return super().forward(input_ids, positions, *args, **kwargs)


@contextmanager
def _attention_of_layers(attention: type) -> Iterator[None]:
    """Layers built meanwhile get this class; vLLM's decoder layer names its own, and builds it with a unique prefix."""
    theirs = vllm_model.DeepseekV32Attention
    vllm_model.DeepseekV32Attention = attention
    try:
        yield
    finally:
        vllm_model.DeepseekV32Attention = theirs


def _rms_norm(x: torch.Tensor, norm: Any) -> torch.Tensor:
    """As `model.norm.RMSNorm`, with the parameters of vLLM's."""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
