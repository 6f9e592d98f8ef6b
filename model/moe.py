"""Mixture of experts: sigmoid `noaux_tc` routing, experts stacked in one parameter a projection, shared experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from model.config import ModelConfig
from model.expert_exchange import exchange_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Expert choices to replay (Keep Routing). Only the indices are replayed; gate weights stay live."""

    experts: torch.Tensor  # int [B, T, moe_layers, num_experts_per_tok]
    recorded: torch.Tensor  # bool [B, T]; False: the token routes live


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses experts by sigmoid score plus correction bias, within the best groups; weighs them by the score alone."""

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_groups, self.topk_groups = config.n_group, config.topk_group
        self.normalise, self.scaling = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(
        self, x: torch.Tensor, replay: torch.Tensor | None = None, recorded: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, hidden_size] to (experts int64 [N, top_k], weights fp32 [N, top_k]).

        replay int64 [N, top_k]: experts to use instead of the router's choice, in rows where `recorded` (bool [N]) is
        True, or in all rows without it.
        """
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        if replay is None:
            experts = self.choose(scores.detach())
        elif recorded is None:
            experts = replay
        else:
            experts = torch.where(recorded.unsqueeze(1), replay, self.choose(scores.detach()))
        weights = scores.gather(1, experts)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return experts, weights * self.scaling

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Group-limited top-k of scores fp32 [N, experts], ties to the lowest index; ascending int64 [N, top_k]."""
        # A token that is not finite has experts too: the loss shows what is wrong with it, an index of -1 does not.
        choice = (scores + self.e_score_correction_bias).nan_to_num(nan=0.0)
        if self.topk_groups < self.num_groups:
            grouped = choice.unflatten(-1, (self.num_groups, -1))
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(dim=-1)
            kept = kernels.topk_mask(group_scores, self.topk_groups)
            choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)
        return kernels.topk_indices(choice, self.top_k)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        """Module conversions such as `.bfloat16()` leave the correction bias in fp32, which selection needs."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self


ROW_MULTIPLE = 16


class Experts(nn.Module):
    """All routed experts of a layer: gate_up_proj [E, 2 * inner, D] (gate rows first) and down_proj [E, D, inner].

    Stacked because ZeRO averages different experts together, or hangs, when each is a parameter of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shape = (config.n_routed_experts, config.moe_intermediate_size, config.hidden_size)
        num_experts, inner, hidden = shape
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, inner))

    def forward(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of each token's experts: x [N, hidden], experts int64 [N, k], weights fp32 [N, k]."""
        return run_experts(x, experts, weights, self.gate_up_proj, self.down_proj, _swiglu)


def _swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def run_experts(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: torch.Tensor,
    up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Weighted sum of each token's experts: x [N, hidden], experts int64 [N, k], weights [N, k].

    up_proj [E, 2 * inner, hidden], whose outputs `activation` takes to [.., inner], and down_proj [E, hidden, inner].
    Where `share_experts` has dealt them out, they are this rank's, and tokens travel.
    """
    exchange = exchange_of(up_proj)
    num_tokens, top_k = experts.shape
    place, ends = _places(experts.flatten(), exchange.num_experts if exchange else up_proj.shape[0])
    copies = x.unsqueeze(1).expand(-1, top_k, -1).flatten(0, 1)
    num_rows = len(copies) if torch.is_grad_enabled() else int(ends[-1])  # the latter waits for the device
    routed = x.new_zeros(num_rows, x.shape[1]).index_copy(0, place, copies)

    def apply(rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return kernels.grouped_linear(activation(kernels.grouped_linear(rows, up_proj, ends)), down_proj, ends)

    outputs = apply(routed, ends) if exchange is None else exchange(routed, ends, apply)
    outputs = outputs.index_select(0, place).view(num_tokens, top_k, -1)
    return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def _places(chosen: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by expert: the row of each entry of `chosen` (int64 [M]), and where each expert's rows end.

    Without gradients an expert's rows are filled up to a multiple of ROW_MULTIPLE: on the libraries we measured a row
    of a matrix product then has the same bits whatever shares the batch, which generation relies on.
    """
    in_order, order = chosen.sort(stable=True)
    # Not torch.bincount, which waits for the device.
    stops = torch.searchsorted(in_order, torch.arange(num_experts, device=chosen.device), right=True)
    counts = stops.diff(prepend=stops.new_zeros(1))
    multiple = 1 if torch.is_grad_enabled() else ROW_MULTIPLE
    room = (counts + multiple - 1) // multiple * multiple
    ends = room.cumsum(0)
    rank = torch.empty_like(order).index_copy_(0, order, torch.arange(order.shape[0], device=order.device))
    shift = (ends - room) - (stops - counts)
    return rank + shift[chosen], ends.to(torch.int32)


class MoE(nn.Module):
    """Routed experts plus the experts that every token takes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(
        self, hidden: torch.Tensor, replay: torch.Tensor | None = None, recorded: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [B, T, hidden_size] to (the same shape, experts chosen int64 [B, T, top_k])."""
        x = hidden.flatten(0, 1)
        experts, weights = self.gate(
            x, None if replay is None else replay.flatten(0, 1), None if recorded is None else recorded.flatten()
        )
        routed = self.experts(x, experts, weights).view_as(hidden)
        return routed + self.shared_experts(hidden), experts.view(*hidden.shape[:2], -1)
