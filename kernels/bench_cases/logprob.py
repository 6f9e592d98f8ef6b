"""Log-probabilities of sampled tokens: against the plain-torch reference, and cross-entropy in chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import kernels
from kernels import reference
from kernels.bench import Call, Case, Setup

VOCAB = 129_280
LogProbs = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _kept(targets: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets of `size` random ids, the target in place of the first, sorted."""
    ids = torch.randint(VOCAB // size, (targets.shape[0], size), device="cuda")
    ids += torch.arange(size, device="cuda") * (VOCAB // size)  # one id from each of `size` stripes: no id twice
    stripe = (targets // (VOCAB // size)).clamp(max=size - 1).unsqueeze(1)
    ids.scatter_(1, stripe, targets.unsqueeze(1))
    offsets = torch.arange(targets.shape[0] + 1, device="cuda") * size
    return ids.int().flatten(), offsets


def _in_chunks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int = 2048) -> torch.Tensor:
    pairs = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    return torch.cat([-F.cross_entropy(F.linear(h, weight).float(), t, reduction="none") for h, t in pairs])


def _setup(num_tokens: int, dim: int, kept_size: int, *, backward: bool) -> Setup:
    hidden = torch.randn(num_tokens, dim, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(VOCAB, dim, device="cuda", dtype=torch.bfloat16) * 2 * dim**-0.5
    targets = torch.randint(VOCAB, (num_tokens,), device="cuda")
    kept = _kept(targets, kept_size) if kept_size else (None, None)
    upstream = torch.randn(num_tokens, device="cuda")

    def call(logprobs: LogProbs, dtype: torch.dtype = torch.bfloat16) -> Call:
        inputs = [tensor.to(dtype).detach().requires_grad_(backward) for tensor in (hidden, weight)]

        def run() -> list[torch.Tensor]:
            values = logprobs(*inputs)
            return [values, *torch.autograd.grad(values, inputs, upstream)] if backward else [values]

        return run

    ours = call(lambda h, w: kernels.kept_logprobs(h, w, targets, *kept)[0])
    plain: LogProbs = lambda h, w: reference.kept_logprobs(h, w, targets, *kept)[0]  # noqa: E731
    peers: dict[str, Call] = {"reference": call(plain)}
    if not kept_size:
        peers["cross_entropy in chunks"] = call(lambda h, w: _in_chunks(h, w, targets))
    columns = kept_size or VOCAB
    return Setup(
        ours=ours,
        peers=peers,
        exact=call(plain, torch.float32),
        flops=2.0 * num_tokens * dim * columns * (3 if backward else 1),
    )


def cases() -> list[Case]:
    """Log-probabilities of N tokens over the vocabulary or over kept sets, with hidden size D."""
    shapes = [(16384, 2048, 0), (16384, 2048, 32), (4096, 7168, 0)]
    return [
        Case(
            name=f"logprob.{'train' if backward else 'forward'}",
            shape=f"N={n} D={d} V={VOCAB} kept={kept or 'all'}",
            build=lambda n=n, d=d, kept=kept, backward=backward: _setup(n, d, kept, backward=backward),
        )
        for n, d, kept in shapes
        for backward in (False, True)
    ]
