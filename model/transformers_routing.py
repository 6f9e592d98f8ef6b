"""Keep Routing for the routers of transformers' modules, whatever their formula.

A router of any family ends in a top-k over its experts, and weighs the experts it chose by what it gathers from its own
scores. So one intervention serves them all: while a router runs, its last word on which experts, the indices of that
top-k, is the recording's, and the values are the scores there. Everything around it (softmax or sigmoid, groups,
normalisation, scaling) is the router's own code on live scores, with their gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import kernels

_TOP_K = (torch.topk, torch.Tensor.topk)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """A router as a trial forward found it."""

    name: str  # of the module
    num_experts: int
    top_k: int
    call: int  # which of its top-k calls chooses the experts, from 0


class RouterTrial(TorchFunctionMode):
    """Finds the routers of a model in one forward on the meta device: modules that return the indices of a top-k.

    Use as a context around the forward; `specs` are in the order in which routers ran.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.specs: list[RouterSpec] = []
        self._calls: list[tuple[torch.Tensor, int, int]] = []  # indices, experts, k; of the modules that run now
        self._starts: list[int] = []
        self._hooks = [
            hook
            for name, part in module.named_modules()
            for hook in (
                part.register_forward_pre_hook(lambda *_: self._starts.append(len(self._calls))),
                part.register_forward_hook(lambda _, __, output, name=name: self._leave(name, output)),
            )
        ]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _TOP_K:
            self._calls.append((result.indices, args[0].shape[-1], result.indices.shape[-1]))
        return result

    def _leave(self, name: str, output: Any) -> None:
        start = self._starts.pop()
        returned = {id(part) for part in output} if isinstance(output, tuple) else set()
        for call, (indices, num_experts, top_k) in enumerate(self._calls[start:]):
            if id(indices) in returned:
                self.specs.append(RouterSpec(name=name, num_experts=num_experts, top_k=top_k, call=call))
        del self._calls[start:]


class Tap:
    """One router's choices: what to replay, and what was chosen. Set before a forward, and valid until the next one.

    So a layer that the backward pass computes again routes as it did the first time.
    """

    def __init__(self, router: nn.Module, spec: RouterSpec) -> None:
        self.spec = spec
        self.replay: torch.Tensor | None = None  # int64 [N, top_k]
        self.recorded: torch.Tensor | None = None  # bool [N, 1], rows to replay; None for all of them
        self.chosen: torch.Tensor | None = None  # int64 [N, top_k]
        self._running: list[_Choosing] = []
        router.register_forward_pre_hook(self._enter)
        router.register_forward_hook(self._leave, always_call=True)

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """The experts of scores [N, num_experts]: recorded ones, and live ones elsewhere."""
        if self.replay is None:
            self.chosen = highest(scores, self.spec.top_k)
        elif self.recorded is None:
            self.chosen = self.replay
        else:
            self.chosen = torch.where(self.recorded, self.replay, highest(scores, self.spec.top_k))
        return self.chosen

    def _enter(self, *_: Any) -> None:
        self._running.append(_Choosing(self))
        self._running[-1].__enter__()

    def _leave(self, *_: Any) -> None:
        self._running.pop().__exit__(None, None, None)


class _Choosing(TorchFunctionMode):
    """Answers the top-k calls of one router for the length of its forward."""

    def __init__(self, tap: Tap) -> None:
        super().__init__()
        self._tap = tap
        self._num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _TOP_K:
            return func(*args, **(kwargs or {}))
        return self._top_k(*args, **(kwargs or {}))

    def _top_k(self, scores: torch.Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
        if dim not in (-1, scores.dim() - 1) or not largest:
            raise ValueError(f"router {self._tap.spec.name} takes its top-k over dimension {dim}, not the last")
        is_choice = self._num_calls == self._tap.spec.call
        self._num_calls += 1
        indices = self._tap.choose(scores) if is_choice else highest(scores, k)
        return torch.return_types.topk((scores.gather(-1, indices), indices))  # pyright: ignore[reportAttributeAccessIssue]


def highest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """int64 [..., k]: the indices of the highest scores, ties to the lowest index, ascending."""
    # A token that is not finite has experts too: the loss shows what is wrong with it, an index of -1 does not.
    return kernels.topk_indices(scores.detach().float().nan_to_num(nan=0.0), k)


def taps_of(module: nn.Module, specs: Sequence[RouterSpec]) -> Iterator[Tap]:
    """Puts a tap on every router that a trial has found."""
    return (Tap(module.get_submodule(spec.name), spec) for spec in specs)
