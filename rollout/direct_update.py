"""Which way an update takes into a vLLM worker's parameters: through vLLM's loader, or straight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from model.checksum import Piece, word_sums
from rl.sample import NDArray
from rollout.held_weights import Described, HeldWeights, Taken, live_tensors
from rollout.vllm_layout import LayoutError, Shapes, held_parts

_AFTER = "process_weights_after_loading"
_COPYING_METHODS = {
    "vllm.model_executor.layers.linear.UnquantizedLinearMethod",
    "vllm.model_executor.layers.vocab_parallel_embedding.UnquantizedEmbeddingMethod",
    "vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method.UnquantizedFusedMoEMethod",
}
"""vLLM 0.32.0's, of which only a layout can come (which the sums show), on NVIDIA GPUs."""
_COPYING_LAYERS = {
    f"vllm.model_executor.layers.attention.attention.Attention.{_AFTER}",
    f"vllm.model_executor.layers.attention.mla_attention.MLAAttention.{_AFTER}",
}
"""They set scales of caches that are not quantised, and W_UK_T and W_UV."""
_NO_WEIGHTS = {"kv_cache"}
"""Tensors of a layer that are neither its parameters nor its buffers."""


class DirectUpdates:
    """Decides it, for one worker.

    An update is written straight into the live parameters, and what MLA makes of kv_b_proj is made again in place, when

    * nothing in the model makes anything else of its weights (:func:`obstacle`),
    * an update before it came through vLLM's loader, and afterwards every part of every tensor lay verbatim where
      `rollout.vllm_layout` says: what arrived had the sums of what the parameters held (which says nothing about the
      order within a tensor that is the same number everywhere, as norms are at first; no method that is let through
      reorders those),
    * and all modules and tensors of the model are still the same ones at the same addresses.

    Everything else goes through vLLM's layerwise reload: the first update of an engine, and the next one whenever one
    of these does not hold. Once begun, a direct update takes only tensors of the names, shapes and dtypes of the proven
    one. Captured graphs and sleep change none of this: addresses stay, and memory that comes back zeroed is written
    whole, but for rows that pad a vocabulary, which vLLM's loader zeroes too.
    """

    def __init__(self, model: nn.Module, barred: str, *, rank: int, size: int) -> None:
        """``barred``: why no update can be direct, or nothing."""
        self._model, self._rank, self._size = model, rank, size
        self._barred = barred
        self._held: HeldWeights | None = None
        self._ended: HeldWeights | None = None
        """What a direct update has just been written into, until it is read for the first time."""
        self._proven = False
        self._pieces: dict[str, list[Piece]] = {}
        self._arrived: list[tuple[list[tuple[str, Piece]], torch.Tensor]] = []
        self.through_loader = ""
        """Why the update goes through vLLM's loader; empty when it is direct."""

    @torch.inference_mode()
    def begin(self, shapes: Shapes) -> bool:
        """Whether the update that begins is direct. ``shapes``: of what it may bring."""
        self.through_loader = self._doubt()
        self._arrived, self._pieces, self._ended = [], {}, None
        if self.through_loader:
            self._proven = False
        if self.through_loader and not self._barred:
            self._expect(shapes)
        if not self.through_loader:
            assert self._held is not None
            self._held.begin()
        return not self.through_loader

    @torch.inference_mode()
    def note(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """What arrives for vLLM's loader."""
        parts = [(name, piece) for name in tensors for piece in self._pieces.get(name, [])]
        if parts:
            sums = word_sums((_part(tensors[name], piece), piece) for name, piece in parts)
            self._arrived.append((parts, sums))

    @torch.inference_mode()
    def write(self, tensors: Mapping[str, torch.Tensor], *, flowing: bool = False, stays: bool = False) -> None:
        """As `HeldWeights.write`."""
        assert self._held is not None
        self._held.write(tensors, flowing=flowing, stays=stays)

    @torch.inference_mode()
    def finish(self) -> None:
        """Ends a direct update."""
        assert self._held is not None
        self._held.absorb()
        self._ended = self._held

    @torch.inference_mode()
    def taken(self, tensors: Described) -> tuple[HeldWeights, Taken]:
        """What the worker holds of the last update's ``tensors``, and `HeldWeights.take` of it."""
        # It was live when the update began, and nothing but the update has been at work since: vLLM replaces parameters
        # only when it loads, and then there was no direct update.
        ended, self._ended = self._ended, None
        if ended is not None and ended.tensors == tensors:
            return ended, ended.take_written()
        if self._held is None or not self._held.is_of(tensors):
            self._proven = False
            self._held = HeldWeights.of_model(self._model, tensors, rank=self._rank, size=self._size)
        taken = self._held.take()
        if self._arrived:
            self._proven = self._lies_verbatim(self._held, *taken)
            self._arrived = []
        return self._held, taken

    def _doubt(self) -> str:
        if self._barred:
            return self._barred
        if self._held is None or not self._proven:
            return "no update has shown yet that weights lie verbatim in the live parameters"
        return "" if self._held.is_live() else "live parameters were replaced since the last update"

    def _expect(self, shapes: Shapes) -> None:
        parts = held_parts(live_tensors(self._model), shapes, rank=self._rank, size=self._size)
        pieces = defaultdict(list)
        try:
            for name, piece, _ in parts:
                pieces[name].append(piece)
        except LayoutError:  # whoever verifies the update says so
            return
        self._pieces = pieces

    def _lies_verbatim(self, held: HeldWeights, sums: NDArray, unabsorbed: list[str]) -> bool:
        arrived: dict[tuple[str, Piece], int] = {}
        for parts, values in self._arrived:
            arrived |= zip(parts, values.tolist(), strict=True)
        lying = zip(((name, piece) for name, piece, _ in held.parts), sums.tolist(), strict=True)
        return not unabsorbed and held.knows_absorbed and dict(lying) == arrived


def _part(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    return tensor.reshape(piece.shape).narrow(piece.axis, piece.start, piece.length)


def obstacle(model: nn.Module, vllm_config: Any) -> str:
    """What may make more of a model's weights than to keep them and MLA's matrices, in one sentence; else nothing.

    It knows by name what does not. A weight that is laid out differently needs no mention here: it shows in the sums.
    """
    if vllm_config.model_config.quantization is not None:
        return "the model is quantised"
    if vllm_config.lora_config is not None or vllm_config.parallel_config.enable_eplb:
        return "adapters or moving experts are in use"
    return next(filter(None, (_transforms(name, module) for name, module in model.named_modules())), "")


def _transforms(name: str, module: nn.Module) -> str:
    method = getattr(module, "quant_method", None)
    if method is not None and (_path(type(method)) not in _COPYING_METHODS or _AFTER in vars(method)):
        return f"{name} has its weights from {_path(type(method))}"
    after_loading = getattr(type(module), _AFTER, None)
    # Methods of experts are modules of their layers too.
    if (
        after_loading is not None
        and _path(type(module)) not in _COPYING_METHODS
        and _path(after_loading) not in _COPYING_LAYERS
    ):
        return f"{name} transforms weights in {_path(after_loading)}"
    inner = getattr(type(getattr(module, "impl", None)), _AFTER, None)
    if inner is not None and _path(inner) != f"vllm.v1.attention.backend.AttentionImplBase.{_AFTER}":
        return f"{name} transforms weights in {_path(inner)}"
    if getattr(module, "W_UK_T_dcp_qrep", None) is not None:
        return f"{name} has W_UK_T a second time"
    for key, value in vars(module).items():
        made = isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel() > 1
        if made and key not in _NO_WEIGHTS:
            return f"{name}.{key} may be made of weights"
    return ""


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"
