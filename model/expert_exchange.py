"""Expert parallelism: rows travel to the rank that holds their expert, and the results travel back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class ExpertExchange:
    """One rank's side of it. Experts are dealt out in blocks: rank r of R holds the E / R experts from r * E / R on.

    Every rank of the group must call it equally often, with any number of rows, forward and backward.
    """

    def __init__(self, group: dist.ProcessGroup, num_experts: int) -> None:
        self.group = group
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        if num_experts % self.num_ranks:
            raise ValueError(f"{num_experts} experts cannot be shared equally by {self.num_ranks} ranks")
        self.num_experts = num_experts
        self.num_local = num_experts // self.num_ranks
        self.first = self.rank * self.num_local

    def __call__(
        self,
        rows: torch.Tensor,
        ends: torch.Tensor,
        experts: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """`experts(rows, ends)` over all: rows [M, D] sorted by expert, those of e ending at ends[e] (int32 [E]).

        Here `experts` only ever sees the rows, from all ranks, of the experts that this rank holds. Each expert's rows
        come in the order of the ranks, so the result does not depend on the network.
        """
        sent = ends.diff(prepend=ends.new_zeros(1)).long().view(self.num_ranks, self.num_local)
        received = torch.empty_like(sent)  # [from rank, own expert]
        dist.all_to_all_single(received, sent, group=self.group)
        sizes = sent.sum(1).tolist(), received.sum(1).tolist()
        arrived = _Travel.apply(rows, *sizes, self.group)
        assert isinstance(arrived, torch.Tensor)
        expert = torch.arange(self.num_local, device=rows.device).repeat(self.num_ranks)
        order = expert.repeat_interleave(received.flatten()).argsort(stable=True)
        outputs = experts(arrived.index_select(0, order), received.sum(0).cumsum(0).to(torch.int32))
        unsorted = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        returned = _Travel.apply(outputs.index_select(0, unsorted), sizes[1], sizes[0], self.group)
        assert isinstance(returned, torch.Tensor)
        return returned

    def part_of(self, whole: torch.Tensor) -> torch.Tensor:
        """Where this rank's experts are in a stack of all of them, [E, ...]; a view."""
        return whole[self.first : self.first + self.num_local]

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """All experts [E, ...] from every rank's own [num_local, ...], contiguous."""
        whole = part.new_empty(self.num_experts, *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=self.group)
        return whole


def share_experts(module: nn.Module, group: dist.ProcessGroup) -> list[nn.Parameter]:
    """Leaves this rank its experts: puts new, empty parameters in the place of all stacks, and returns them.

    Raises ValueError when the ranks of the group cannot share the experts equally.
    """
    shared = []
    for part in module.modules():
        for name in ("gate_up_proj", "down_proj"):
            stack = getattr(part, name, None)
            if not isinstance(stack, nn.Parameter) or stack.dim() != 3:
                continue
            exchange = ExpertExchange(group, stack.shape[0])
            own = nn.Parameter(torch.empty_like(exchange.part_of(stack)), requires_grad=stack.requires_grad)
            setattr(own, _MARK, exchange)
            setattr(part, name, own)
            shared.append(own)
    return shared


def exchange_of(parameter: object) -> ExpertExchange | None:
    """Through which the ranks hold a stack of experts together; None for a parameter that is not shared out."""
    return getattr(parameter, _MARK, None)


_MARK = "expert_exchange"


class _Travel(torch.autograd.Function):
    """All-to-all of rows [sum(sent), D]; gradients travel the other way."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup):
        ctx.sizes, ctx.group = (sent, received), group
        return _all_to_all(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor):
        sent, received = ctx.sizes
        return _all_to_all(grads[0], received, sent, ctx.group), None, None, None


def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived
