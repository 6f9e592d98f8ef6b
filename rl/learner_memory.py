"""How much memory one learner rank needs: what DeepSpeed keeps at each ZeRO stage, and what a step adds to it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from model.costs import ModelCosts
from rl.choices import EngineKind, Offload, Placement
from rl.config import Recipe
from rl.hardware import GIB

MASTER_AND_MOMENTS = 12
"""Bytes a parameter: fp32 weights and AdamW's two fp32 moments."""
BUCKET_ELEMENTS = 50_000_000
"""Of trainer.deepspeed_engine.Sharding: gradients reduced together, and parameters gathered ahead."""
LIVE_ELEMENTS = 1_000_000_000
"""Parameters that DeepSpeed keeps gathered at stage 3 (its stage3_max_live_parameters), if no module is larger."""
LOGIT_ROWS = 1024
"""Tokens whose logits exist at the same time (kernels.kept_logprobs)."""
LOGIT_COPIES = 5
"""fp32 arrays of [LOGIT_ROWS, vocabulary] in its backward pass."""
UPDATE_BYTES = 512 << 20
"""Of trainer.learner.Learner: a bucket of a weight update, where no tensor is larger."""
STAGED, OFFERED = 3, 2
"""Of model.transport and trainer.sender: packed buckets for a broadcast, and out of shared memory."""
PROCESS_BYTES = 3 * GIB
"""CUDA context, NCCL's buffers and the allocator's slack of one process; measured on no machine in particular."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of a memory plan."""

    name: str
    num_bytes: float
    how: str  # the formula, with the numbers of this recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """One learner rank's."""

    resident: tuple[Item, ...]  # between steps, on its device
    step: tuple[Item, ...]  # what a step adds at its peak
    update: tuple[Item, ...]  # what an update of engines' weights adds, on the rank that needs most for it
    host: tuple[Item, ...]  # in the memory of its node
    slept: float  # of the resident bytes, those that learner.sleep moves to the host while engines generate
    copied: Item  # what a checkpoint copies to the host, and keeps there until it is written beside later steps

    @property
    def resident_bytes(self) -> float:
        return sum(item.num_bytes for item in self.resident)

    @property
    def step_bytes(self) -> float:
        return self.resident_bytes + sum(item.num_bytes for item in self.step)

    @property
    def update_bytes(self) -> float:
        return self.resident_bytes + sum(item.num_bytes for item in self.update)

    @property
    def peak_bytes(self) -> float:
        return max(self.step_bytes, self.update_bytes)

    @property
    def peak(self) -> str:
        """When it is."""
        return "a step" if self.step_bytes >= self.update_bytes else "a weight update"

    @property
    def host_bytes(self) -> float:
        return sum(item.num_bytes for item in self.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counts:
    """What the formulas are made of, in elements."""

    whole: int  # trained parameters
    experts: int  # of them, routed experts
    ranks: int
    expert_parallel: int
    largest_tensor: int  # of one rank before ZeRO
    largest_whole: int  # with all experts
    largest_module: int  # parameters that one module gathers together: a layer's experts, or the embedding

    @property
    def spread(self) -> str:
        return f", over {self.ranks} ranks" if self.ranks > 1 else ""

    @property
    def local(self) -> float:
        """Parameters of one rank before ZeRO: all but the experts of its expert-parallel peers."""
        return self.whole - self.experts + self.experts / self.expert_parallel


def rank_memory(recipe: Recipe, costs: ModelCosts, *, on_gpu: bool = True) -> RankMemory:
    """The memory of one rank under ``recipe.learner``.

    The states follow ZeRO (arXiv 1910.02054, section 5, with fp32 gradients): for N parameters of e bytes on R ranks,
    N e + 4 N + 12 N / R at stage 1 (2 N more for bf16 gradients before they are added up in fp32), N e + 16 N / R at
    stage 2, (e + 16) N / R at stage 3; without ZeRO N e + 12 N, as fp32 weights are their own masters.
    """
    learner, element = recipe.learner, element_bytes(recipe.model.dtype)
    counts = _count(recipe, costs)
    stage, optimizer_on_host = learner.zero_stage, learner.offload_optimizer == Offload.cpu
    parameters = _parameters(counts, stage, element)
    gradients = _gradients(counts, stage, element)
    optimizer = _optimizer(counts, stage)
    on_host = [optimizer, gradients] if optimizer_on_host else []
    resident = [item for item in (parameters, gradients, optimizer) if item not in on_host]
    if learner.offload_parameters == Offload.cpu:
        resident.remove(parameters)
        on_host.append(parameters)
    if any(domain.kl_beta for domain in recipe.domains.values()):
        resident.append(_reference(counts, stage, element))
    shared = recipe.rollout.engine == EngineKind.vllm and recipe.placement == Placement.shared
    # At stages 1 and 2 DeepSpeed lays parameters side by side, and engines read them there. A model with some five
    # hundred tensors that are not trained, each a piece of memory of its own, is packed all the same: not counted.
    if shared and (stage not in (1, 2) or counts.expert_parallel > 1):
        bucket = _bucket_bytes(counts, element)
        resident.append(Item(name="offered weights", num_bytes=OFFERED * bucket, how=f"{OFFERED} buckets that stay"))
    if on_gpu:
        resident.append(Item(name="process", num_bytes=PROCESS_BYTES, how="CUDA, NCCL, allocator (a constant)"))
    slept = optimizer.num_bytes + gradients.num_bytes if learner.sleep and not optimizer_on_host else 0.0
    if slept:
        on_host.append(Item(name="asleep", num_bytes=slept, how="optimizer and gradients while engines generate"))
    whole = _collectives(counts, stage, element, learner.activation_checkpointing)
    return RankMemory(
        resident=tuple(resident),
        step=(*whole, _activations(recipe, costs, element), _logits(costs, element)),
        update=tuple(_update(recipe, counts, element)),
        host=tuple(on_host),
        slept=slept,
        copied=_copied(counts),
    )


def element_bytes(dtype: str) -> int:
    """Bytes of one number of ``model.dtype``."""
    return 4 if dtype == "float32" else 2


def _count(recipe: Recipe, costs: ModelCosts) -> _Counts:
    spec, parallel = costs.outline, recipe.learner.expert_parallel
    experts = largest = largest_whole = 0
    modules: dict[str, float] = {}
    for name, tensor in spec.tensors.items():
        size = math.prod(tensor.shape) if tensor.trained else 0
        is_expert = ".experts." in name and len(tensor.shape) == 3
        experts += size if is_expert else 0
        largest_whole = max(largest_whole, size)
        size //= parallel if is_expert else 1
        largest = max(largest, size)
        module = name.rpartition(".")[0]
        modules[module] = modules.get(module, 0) + size
    return _Counts(
        whole=spec.num_parameters,
        experts=experts,
        ranks=recipe.learner.ranks,
        expert_parallel=parallel,
        largest_tensor=largest,
        largest_whole=largest_whole,
        largest_module=round(max(modules.values())),
    )


def _parameters(counts: _Counts, stage: int, element: int) -> Item:
    if stage < 3:
        return Item(name="parameters", num_bytes=element * counts.local, how=f"{element} B each, whole on every rank")
    return Item(
        name="parameters",
        num_bytes=element * counts.whole / counts.ranks,
        how=f"{element} B each{counts.spread}",
    )


def _gradients(counts: _Counts, stage: int, element: int) -> Item:
    if stage >= 2:
        return Item(name="gradients", num_bytes=4 * counts.whole / counts.ranks, how=f"fp32{counts.spread}")
    both = 4 if element == 4 else 4 + element
    return Item(
        name="gradients",
        num_bytes=both * counts.local,
        how="fp32, whole on every rank" if element == 4 else "bf16 and, added up, fp32; whole on every rank",
    )


def _optimizer(counts: _Counts, stage: int) -> Item:
    if stage == 0:
        return Item(name="optimizer", num_bytes=8 * counts.local, how="two fp32 moments, whole on every rank")
    return Item(
        name="optimizer",
        num_bytes=MASTER_AND_MOMENTS * counts.whole / counts.ranks,
        how=f"fp32 weights and two moments{counts.spread}",
    )


def _copied(counts: _Counts) -> Item:
    """At every stage what a rank alone holds of the optimizer; what all ranks hold alike, they share out."""
    num_bytes = MASTER_AND_MOMENTS * counts.whole / counts.ranks
    return Item(name="checkpoint", num_bytes=num_bytes, how=f"fp32 weights and two moments{counts.spread}")


def _reference(counts: _Counts, stage: int, element: int) -> Item:
    copies = _parameters(counts, stage, element)
    return Item(name="reference model", num_bytes=copies.num_bytes, how=f"for kl_beta; {copies.how}")


def _collectives(counts: _Counts, stage: int, element: int, recomputes: bool) -> list[Item]:
    """What is whole for a moment. A gradient larger than the bucket is sent alone, as an fp32 copy.

    A matrix product keeps its (transposed) matrix for the backward pass. So at stage 3 what was gathered stays from the
    forward to the backward pass, unless layers are computed again.
    """
    sent = max(min(BUCKET_ELEMENTS, counts.local), counts.largest_tensor)
    items = [
        Item(
            name="gradient bucket",
            num_bytes=(element + 4) * sent,
            how=f"{sent / 1e6:.0f}M elements, as computed and as fp32 on the wire",
        )
    ]
    if stage == 3:
        live = min(counts.local, max(LIVE_ELEMENTS, counts.largest_module)) if recomputes else counts.local
        why = "" if recomputes else ", for want of learner.activation_checkpointing"
        items.append(
            Item(name="gathered", num_bytes=element * live, how=f"{live / 1e9:.2f}G parameters whole at a time{why}")
        )
    return items


def _bucket_bytes(counts: _Counts, element: int) -> float:
    return max(min(UPDATE_BYTES, element * counts.whole), element * counts.largest_whole)


def _update(recipe: Recipe, counts: _Counts, element: int) -> Iterator[Item]:
    """Of a large model a bucket is its largest tensor, a layer's experts."""
    if recipe.rollout.engine != EngineKind.vllm:
        return
    bucket = _bucket_bytes(counts, element)
    if counts.expert_parallel > 1 or recipe.learner.zero_stage == 3:  # of one rank too, which gathers a copy
        yield Item(name="whole weights", num_bytes=bucket, how="one bucket of an update, gathered")
    if recipe.placement == Placement.split:
        yield Item(name="packed weights", num_bytes=STAGED * bucket, how=f"{STAGED} buckets on their way, of rank 0")


def _activations(recipe: Recipe, costs: ModelCosts, element: int) -> Item:
    tokens = max(recipe.learner.micro_tokens, recipe.model.max_context)
    saved = [costs.saved_bytes_per_token(layer, element) for layer in range(len(costs.layers))]
    if recipe.learner.activation_checkpointing:
        inputs = len(saved) * costs.layer_input_bytes_per_token(element)
        return Item(
            name="activations",
            num_bytes=tokens * (inputs + max(saved)),
            how=f"{tokens} tokens x {len(saved)} layer inputs, and one layer in full",
        )
    return Item(
        name="activations", num_bytes=tokens * sum(saved), how=f"{tokens} tokens x {sum(saved) / 1e3:.0f} kB, estimated"
    )


def _logits(costs: ModelCosts, element: int) -> Item:
    spec = costs.outline
    chunk = LOGIT_COPIES * 4 * LOGIT_ROWS * spec.vocab_size
    head = (4 + element) * spec.vocab_size * spec.hidden_size
    return Item(
        name="log-probabilities",
        num_bytes=chunk + head,
        how=f"{LOGIT_ROWS} rows of {spec.vocab_size} logits; the head's gradient",
    )
