"""How much memory one GPU of a vLLM engine needs, and how many tokens its cache then holds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model.costs import ModelCosts
from rl.choices import Dsa
from rl.config import Recipe
from rl.hardware import GIB
from rl.learner_memory import Item, element_bytes
from rl.selections import carried_bytes_per_token

BATCHED_TOKENS = 8192
"""Tokens of one scheduler step (vLLM's max_num_batched_tokens on an H100 or H200)."""
ASLEEP_BYTES = 3 * GIB
"""What a sleeping engine keeps of its GPU: CUDA context, captured graphs, NCCL's buffers."""
GRAPHS_BYTES = 2 * GIB
PROCESS_BYTES = 1 * GIB

_REPLICATED = (
    "q_a_proj.weight",
    "kv_a_proj_with_mqa.weight",
    ".mlp.gate.weight",
    "e_score_correction_bias",
)
"""Tensors that vLLM keeps whole on every worker, beside vectors and the indexer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerMemory:
    """One worker's, on its own GPU."""

    items: tuple[Item, ...]  # all but the cache
    share_bytes: float  # what rollout.gpu_memory gives to weights, workspace and cache together
    cache_bytes_per_token: float
    max_context: int

    @property
    def fixed_bytes(self) -> float:
        return sum(item.num_bytes for item in self.items)

    @property
    def cache_bytes(self) -> float:
        """What is left for cached tokens; may be negative."""
        return self.share_bytes - self.fixed_bytes

    @property
    def sequence_bytes(self) -> float:
        """Of the cache, for one sequence of ``model.max_context`` tokens."""
        return self.max_context * self.cache_bytes_per_token

    @property
    def cache_tokens(self) -> int:
        return max(0, int(self.cache_bytes // self.cache_bytes_per_token))

    @property
    def full_sequences(self) -> float:
        """Sequences of ``model.max_context`` tokens that the cache holds at once."""
        return self.cache_tokens / self.max_context


def worker_memory(recipe: Recipe, costs: ModelCosts, gpu_bytes: int) -> WorkerMemory:
    """The memory of one worker of a tensor-parallel engine on a GPU with ``gpu_bytes``."""
    rollout, spec, element = recipe.rollout, costs.outline, element_bytes(recipe.model.dtype)
    parallel = rollout.tensor_parallel
    weights = worker_weight_bytes(costs, parallel, element)
    width = 2 * spec.hidden_size + max(
        2 * (layer.query + layer.key_rows) + 3 * layer.ffn + spec.experts_per_token * spec.hidden_size
        for layer in costs.layers
    )
    spread = f", over {parallel} GPUs" if parallel > 1 else ""
    logits = 3 * 4 * rollout.max_num_seqs * spec.vocab_size
    items = [
        Item(name="weights", num_bytes=weights, how=f"{element} B each{spread}"),
        Item(
            name="workspace",
            num_bytes=BATCHED_TOKENS * width * element + logits,
            how=f"{BATCHED_TOKENS} tokens of a step, {rollout.max_num_seqs} rows of logits; estimated",
        ),
        Item(name="process", num_bytes=PROCESS_BYTES, how="CUDA and NCCL (a constant)"),
    ]
    if spec.moe_layers and recipe.objective.keep_routing:
        routes = 4 * BATCHED_TOKENS * spec.num_layers * spec.experts_per_token
        how = f"int32 for {BATCHED_TOKENS} tokens x {spec.num_layers} layers x {spec.experts_per_token}"
        items.append(Item(name="routes buffer", num_bytes=routes, how=how))
    if recipe.objective.keep_selection and costs.index_topk is not None and recipe.model.max_context > costs.index_topk:
        carried = carried_bytes_per_token(spec.num_layers, recipe.model.max_context)
        how = f"{BATCHED_TOKENS} tokens x {carried} B, and two copies on the way to the host"
        items.append(Item(name="selections buffer", num_bytes=3 * BATCHED_TOKENS * carried, how=how))
    if rollout.cuda_graphs:
        items.append(Item(name="CUDA graphs", num_bytes=GRAPHS_BYTES, how="a constant"))
    return WorkerMemory(
        items=tuple(items),
        share_bytes=rollout.gpu_memory * gpu_bytes,
        cache_bytes_per_token=costs.cache_bytes_per_token(parallel, element, quantised_keys=rollout.dsa == Dsa.vllm),
        max_context=recipe.model.max_context,
    )


def worker_weight_bytes(costs: ModelCosts, tensor_parallel: int, element: int) -> float:
    """Bytes of weights on one worker, as vLLM 0.32.0 splits them.

    Matrices are spread over the workers, experts too (whole experts or slices of each take the same room); keys and
    values by whole heads, at least one a worker. Vectors, routers, MLA's down-projections and the indexer are whole.
    """
    total = 0.0
    for name, tensor in costs.outline.tensors.items():
        whole = len(tensor.shape) < 2 or ".indexer." in name or name.endswith(_REPLICATED)
        share = 1.0 if whole else 1.0 / tensor_parallel
        if costs.kv_heads is not None and name.endswith(("k_proj.weight", "v_proj.weight")):
            share = max(1.0, costs.kv_heads / tensor_parallel) / costs.kv_heads
        bytes_each = 4 if name.endswith("e_score_correction_bias") else element
        total += math.prod(tensor.shape) * share * bytes_each
    return total
