"""What a token costs a model: arithmetic, cached bytes, bytes kept for the backward pass. From its outline alone.

Everything follows from the shapes of the named tensors, so that one set of formulas serves MLA with an indexer,
grouped-query attention, dense and expert layers. Widths are in elements a token.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from model.hf import outline, read_json
from model.outline import ModelOutline, TensorSpec

_LAYER = re.compile(r"\.layers\.(\d+)\.(.+)$")
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_INDEX_QUANT_BLOCK = 128  # vLLM keeps an fp32 scale for every 128 fp8 index keys


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWidths:
    """Widths of one decoder layer, in elements a token."""

    query: int  # heads * dims of a query
    value: int  # heads * dims of a value
    key_rows: int  # what attention keeps for a token, as computed for training: keys and values of all their heads
    cached: int  # what an engine caches for a token: keys and values, or MLA's latent and rope key
    latents: int  # MLA's low-rank streams; 0 for grouped-query attention
    index_query: int  # indexer heads * dims; 0 without an indexer
    index_key: int
    ffn: int  # inner width that a token passes: dense, or shared plus chosen experts
    experts: int  # of it, the chosen experts' part


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCosts:
    """Costs of one model; build it with :func:`model_costs`."""

    outline: ModelOutline
    layers: tuple[LayerWidths, ...]
    index_topk: int | None  # keys that a query attends to at most; None for all before it
    kv_heads: int | None  # of grouped-query attention; None for MLA, whose cache all heads share
    quantized: bool = False  # whether config.json says that the weights are stored in fewer bits

    @property
    def active_parameters(self) -> int:
        """Elements of the matrices that one token is multiplied with: of the experts, those that it is routed to.

        The embedding is looked up and counts only where it is tied to the head; vectors (norms, biases) do not count.
        """
        spec = self.outline
        share = spec.experts_per_token / spec.num_experts if spec.num_experts else 0.0
        tied = not any(name.endswith("lm_head.weight") for name in spec.tensors)
        total = 0.0
        for name, tensor in spec.tensors.items():
            if not tensor.trained or len(tensor.shape) < 2 or (name.endswith("embed_tokens.weight") and not tied):
                continue
            total += math.prod(tensor.shape) * (share if name.endswith(_EXPERTS) else 1.0)
        return round(total)

    def attended(self, length: int) -> int:
        """Query-key pairs of one causal sequence: the sum of min(t, index_topk) over t = 1..length."""
        dense = min(length, self.index_topk or length)
        return dense * (dense + 1) // 2 + (length - dense) * dense

    def forward_flops(self, length: int) -> float:
        """Floating-point operations (a multiply-add is two) of one forward pass over a sequence of ``length`` tokens.

        2 * active_parameters * length, and per layer 2 * (query + value) * attended pairs for the scores and their
        mix of values; where the sequence outgrows index_topk, 2 * index_query for every pair that the indexer scores.
        """
        matrices = 2.0 * self.active_parameters * length
        pairs, scored = self.attended(length), length * (length + 1) // 2
        outgrown = self.index_topk is not None and length > self.index_topk
        attention = sum(
            2.0 * (layer.query + layer.value) * pairs + (2.0 * layer.index_query * scored if outgrown else 0.0)
            for layer in self.layers
        )
        return matrices + attention

    def training_flops(self, length: int) -> float:
        """Forward and backward, the backward at twice the forward: 6 * active_parameters * length plus attention.

        The indexer's scores count once, as choosing keys has no gradient. Recomputation and the reference's forward
        pass are left out: they are overhead, not the model's arithmetic.
        """
        index = self.forward_flops(length) - self._without_index().forward_flops(length)
        return 3.0 * (self.forward_flops(length) - index) + index

    def cache_bytes_per_token(
        self, tensor_parallel: int = 1, element_bytes: int = 2, *, quantised_keys: bool = True
    ) -> float:
        """Bytes that one engine worker caches for a token, over all layers.

        MLA's latent is the same for every head, so each worker of a tensor-parallel engine holds all of it; index
        keys are fp8 with an fp32 scale for every 128 of them, or as wide as other elements. Grouped-query heads are
        spread, at least one a worker.
        """
        total = 0.0
        for layer in self.layers:
            heads = 1 if self.kv_heads is None else self.kv_heads
            share = 1.0 if self.kv_heads is None else max(1.0, heads / tensor_parallel) / heads
            total += layer.cached * share * element_bytes
            scaled = layer.index_key + 4 * (layer.index_key // _INDEX_QUANT_BLOCK)
            total += scaled if quantised_keys else layer.index_key * element_bytes
        return total

    def saved_bytes_per_token(self, layer: int, element_bytes: int = 2) -> int:
        """Bytes that the backward pass of one layer keeps for a token, without recomputation; an estimate.

        In the model's dtype: both norms' outputs, queries, keys, values and attention's output, MLA's latents, and of
        every feed-forward the gate, its activation, the other half and their product; where tokens are sent to
        experts, their copies and the experts' outputs, and the router's fp32 input. In fp32: the input of every norm,
        and what it normalised. Attention scores are not kept (flash attention).
        """
        widths, hidden = self.layers[layer], self.outline.hidden_size
        elements = 2 * hidden + widths.query + widths.key_rows + widths.value + widths.latents + 4 * widths.ffn
        if widths.experts:
            elements += 3 * self.outline.experts_per_token * hidden + 2 * hidden
        normed = 2 * hidden + widths.latents
        return elements * element_bytes + 2 * 4 * normed

    def layer_input_bytes_per_token(self, element_bytes: int = 2) -> int:
        """What activation checkpointing keeps of a layer."""
        return self.outline.hidden_size * element_bytes

    def _without_index(self) -> ModelCosts:
        layers = tuple(dataclasses.replace(layer, index_query=0) for layer in self.layers)
        return dataclasses.replace(self, layers=layers)


def model_costs(path: str | os.PathLike[str]) -> ModelCosts:
    """The costs of a checkpoint directory, from its config.json. Raises ValueError as `model.outline.outline` does."""
    config = read_json(Path(path) / "config.json")
    text = config.get("text_config") or config
    costs = costs_of(outline(path), index_topk=text.get("index_topk"), kv_heads=text.get("num_key_value_heads") or 1)
    return dataclasses.replace(costs, quantized=bool(config.get("quantization_config")))


def costs_of(spec: ModelOutline, *, index_topk: int | None, kv_heads: int) -> ModelCosts:
    """The costs of an outline; ``kv_heads`` is passed over where the tensors are MLA's."""
    by_layer: dict[int, dict[str, TensorSpec]] = {}
    for name, tensor in spec.tensors.items():
        if found := _LAYER.search(name):
            by_layer.setdefault(int(found[1]), {})[found[2]] = tensor
    layers = tuple(_widths(spec, by_layer[layer]) for layer in sorted(by_layer))
    latent = any(layer.latents for layer in layers)
    return ModelCosts(outline=spec, layers=layers, index_topk=index_topk, kv_heads=None if latent else kv_heads)


def _widths(spec: ModelOutline, tensors: dict[str, TensorSpec]) -> LayerWidths:
    def rows(*names: str) -> int:
        return sum(
            tensors[f"self_attn.{name}.weight"].shape[0] for name in names if f"self_attn.{name}.weight" in tensors
        )

    def size(name: str, axis: int) -> int:
        return tensors[name].shape[axis] if name in tensors else 0

    value = size("self_attn.o_proj.weight", 1)
    latents = rows("q_a_proj", "kv_a_proj_with_mqa")
    query = rows("q_proj") or rows("q_b_proj")
    chosen = spec.experts_per_token * size("mlp.experts.down_proj", 2)
    always = sum(
        tensor.shape[1]
        for name, tensor in tensors.items()
        if name.startswith("mlp.") and name.endswith("down_proj.weight")
    )
    # MLA expands its latent to keys as wide as the queries, and to values.
    expanded = query + value if rows("kv_b_proj") else rows("k_proj", "v_proj")
    return LayerWidths(
        query=query,
        value=value,
        key_rows=expanded,
        cached=rows("kv_a_proj_with_mqa") or rows("k_proj", "v_proj"),
        latents=latents,
        index_query=rows("indexer.wq_b"),
        index_key=rows("indexer.wk"),
        ffn=always + chosen,
        experts=chosen,
    )
