"""How much of a step's gradient comes from each domain, measured on the backward pass that happens anyway.

A domain's whole gradient would take a backward pass of its own. Measured is the gradient of a matrix M that is not
there, at M = 0, applied to the last hidden states in front of the head, h -> h + M h:

    G_d = sum over the sampled tokens t of domain d of  g_t h_t^T        g_t = dL/dh_t, all terms of the loss

It is linear in the loss like every parameter's gradient: tokens that pull in opposite directions cancel, and parts of a
step on several ranks and in several micro-batches add up. Its norm is taken of a projection of its rows to at most
``MAX_ROWS`` random directions, the same on all ranks, which is exact for hidden states that are no wider and
otherwise off by about 1 / sqrt(2 MAX_ROWS). The cost is one matrix product of [MAX_ROWS, tokens] by [tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rl.metrics import Mean
from trainer.pack import Microbatch

MAX_ROWS = 128


class DomainGradients:
    """Collects over the micro-batches of an optimizer step; :meth:`shares` ends it."""

    def __init__(self, domains: Sequence[str], hidden_size: int, device: torch.device) -> None:
        self.domains = tuple(domains)
        self._directions = directions(hidden_size).to(device)
        self._sums = torch.zeros(len(self.domains), self._directions.shape[1], hidden_size, device=device)
        self._of_rows = torch.zeros(0, dtype=torch.long, device=device)

    def expect(self, micro: Microbatch) -> None:
        """The next forward pass is over ``micro``."""
        of_sequences = [self.domains.index(domain) if domain in self.domains else -1 for domain in micro.domains]
        of_tokens = np.repeat(np.array(of_sequences, np.int64), np.diff(micro.cu_seqlens))
        self._of_rows = torch.tensor(of_tokens[micro.sampled], device=self._sums.device)

    def observe(self, hidden: Tensor) -> None:
        """``hidden`` [R, D] are the states of the R sampled tokens, on which the loss will depend."""
        if hidden.requires_grad and len(hidden):
            of_rows, states = self._of_rows, hidden.detach()
            hidden.register_hook(lambda gradient: self._add(of_rows, states, gradient))

    def shares(self) -> dict[str, Mean]:
        """``grad_share/<domain>``, the same on every rank; nothing where the whole gradient is 0. Starts anew."""
        dist.all_reduce(self._sums)
        norms = self._sums.flatten(1).norm(dim=1).tolist()
        self._sums.zero_()
        total = sum(norms)
        if not total:
            return {}
        return {f"grad_share/{name}": Mean(norm / total, 1) for name, norm in zip(self.domains, norms, strict=True)}

    @torch.no_grad()
    def _add(self, of_rows: Tensor, states: Tensor, gradient: Tensor) -> None:
        for number in range(len(self.domains)):
            rows = (of_rows == number).nonzero().squeeze(1)
            projected = gradient[rows].float() @ self._directions
            self._sums[number] += projected.T @ states[rows].float()


def directions(hidden_size: int) -> Tensor:
    """float32 [hidden_size, K] with orthogonal columns on average, which keeps the squared norm of a row on average."""
    if hidden_size <= MAX_ROWS:
        return torch.eye(hidden_size)
    signs = torch.randint(0, 2, (hidden_size, MAX_ROWS), generator=torch.Generator().manual_seed(0))
    return (2.0 * signs - 1.0) / MAX_ROWS**0.5
