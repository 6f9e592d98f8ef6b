"""Activation checkpointing of a layer: only its input is kept, and the backward pass computes it again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

LayerOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def recomputed(layer: Callable[..., LayerOutput], *args: Any) -> LayerOutput:
    """``layer(*args)``, (hidden, experts, loss), with the same bits and the same gradients from less memory."""

    def anchored(*inputs: Any) -> LayerOutput:
        hidden, experts, loss = layer(*inputs)
        if loss is None:
            (hidden,) = _Anchor.apply(hidden)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            hidden, loss = _Anchor.apply(hidden, loss)  # pyright: ignore[reportGeneralTypeIssues]
        return hidden, experts, loss

    # To the end of the layer, not of the last tensor that is missed: ZeRO-3 lets go of parameters there.
    return checkpoint(anchored, *args, use_reentrant=False, preserve_rng_state=False, early_stop=False)


class _Anchor(torch.autograd.Function):
    """The identity on a layer's outputs, whose backward precedes all others of the layer and starts the recomputation.

    Otherwise that would start in the middle of some module's backward, for which ZeRO-3 has just gathered parameters,
    and the module's second forward would let go of them.
    """

    @staticmethod
    def forward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(outputs[0])
        same = tuple(output.view_as(output) for output in outputs)
        # Where only the indexer learns, hidden states have no gradient.
        ctx.mark_non_differentiable(*(s for s, needed in zip(same, ctx.needs_input_grad, strict=True) if not needed))
        return same

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.saved_tensors  # noqa: B018
        return grads
