"""Routed experts of transformers' modules, run as our own are: sorted by expert, one grouped product a projection."""

from __future__ import annotations

from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from model.moe import run_experts

NAME = "keel"
"""Under which the function is registered with transformers."""


def experts_forward(
    module: Any, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """transformers' experts function: hidden [N, D], top_k_index int64 [N, k], top_k_weights [N, k] to [N, D]."""
    if hidden.device.type == "meta":
        return torch.empty_like(hidden)
    return run_experts(hidden, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj, module._apply_gate)


def is_stack(module: Any) -> bool:
    """Whether a module holds a layer's routed experts, stacked."""
    return hasattr(module, "is_concatenated") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")


def refusal(module: Any) -> str | None:
    """Why a stack of experts cannot be run by `experts_forward`, or None."""
    if module.has_bias:
        return "its experts have biases"
    if not module.has_gate:
        return "its experts have no gate"
    if module.is_transposed or not module.is_concatenated:
        return "its experts are stored transposed or interleaved"
    return None


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
