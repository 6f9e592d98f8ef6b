"""What an engine remembers of the sequences in its slots: one numpy row a slot, written for all of them at once."""

from __future__ import annotations

import numpy as np

from rl.sample import Kept, NDArray
from rl.selections import Selections
from rollout.engine import Completion, Finish, Request, truncates
from rollout.sampler import Draws, SamplingRows

_NO_STOP = -1


class SlotTable:
    """The sequences in `num_slots` slots of `max_context` tokens. S slots, T = max_context.

    route_shape: (moe_layers, top_k) of the routes to keep, or None; num_experts decides their dtype.
    selection_shape: (layers, index_topk) of the selections to keep, or None.
    """

    def __init__(
        self,
        num_slots: int,
        max_context: int,
        *,
        route_shape: tuple[int, int] | None,
        num_experts: int,
        selection_shape: tuple[int, int] | None = None,
    ) -> None:
        shape = (num_slots, max_context)
        self.num_slots = num_slots
        self.max_context = max_context
        self.active = np.zeros(num_slots, bool)
        self.lengths = np.zeros(num_slots, np.int64)  # tokens held, prompt and generated; 0 for an idle slot
        self.tokens = np.zeros(shape, np.int32)
        self.sampling = SamplingRows.empty(num_slots)
        self.routes: NDArray | None = None  # [S, T, moe_layers, top_k]
        if route_shape is not None:
            self.routes = np.zeros((*shape, *route_shape), np.uint8 if num_experts <= 256 else np.uint16)
        self.selections: NDArray | None = None  # [S, T - index_topk, layers, index_topk], from position index_topk on
        if selection_shape is not None:
            dtype = np.uint16 if max_context <= 1 << 16 else np.uint32
            self.selections = np.zeros((num_slots, max_context - selection_shape[1], *selection_shape), dtype)
        self._logprobs = np.zeros(shape, np.float32)
        self._versions = np.zeros(shape, np.int32)
        self._limits = np.zeros(num_slots, np.int64)
        self._stops = np.full((num_slots, 1), _NO_STOP, np.int32)
        self._requests: list[Request | None] = [None] * num_slots
        self._kept: list[list[NDArray]] = [[] for _ in range(num_slots)]

    def request(self, slot: int) -> Request:
        request = self._requests[slot]
        assert request is not None, f"slot {slot} is idle"
        return request

    def assign(self, slot: int, request: Request) -> None:
        """Puts a request's prompt into an idle slot."""
        num_prompt = len(request.token_ids)
        self._requests[slot] = request
        self._kept[slot] = []
        self.active[slot] = True
        self.lengths[slot] = num_prompt
        self.tokens[slot, :num_prompt] = request.token_ids
        self._limits[slot] = min(num_prompt + request.sampling.max_tokens, self.max_context)
        self._set_stops(slot, request.stop_token_ids)
        self.sampling.set(slot, request.sampling, request.seed)

    def append(self, slots: NDArray, draws: Draws, version: int) -> list[tuple[int, Finish]]:
        """Appends one drawn token to each slot (int64 [B]); returns the slots whose sequences ended with it."""
        at = self.lengths[slots]
        self.tokens[slots, at] = draws.token_ids
        self._logprobs[slots, at] = draws.logprobs
        self._versions[slots, at] = version
        self.lengths[slots] = at + 1
        self._keep(slots, draws)
        stopped = (draws.token_ids[:, None] == self._stops[slots]).any(axis=1)
        ended = np.flatnonzero(stopped | (at + 1 >= self._limits[slots]))
        return [(int(slots[row]), Finish.STOP if stopped[row] else Finish.LENGTH) for row in ended]

    def release(self, slot: int, finish: Finish) -> Completion:
        """Frees the slot and returns what was generated in it."""
        request = self.request(slot)
        begin, end = len(request.token_ids), int(self.lengths[slot])
        completion = Completion(
            token_ids=self.tokens[slot, begin:end].copy(),
            logprobs=self._logprobs[slot, begin:end].copy(),
            versions=self._versions[slot, begin:end].copy(),
            kept=Kept.from_rows(self._kept[slot]) if truncates(request.sampling) else None,
            routes=None if self.routes is None else self.routes[slot, :end].copy(),
            routed=None if self.routes is None else np.arange(end) < end - 1,
            selections=self._selections(slot, end),
            finish=finish,
        )
        if completion.routes is not None:
            completion.routes[end - 1] = 0  # never fed; the slot's previous sequence may have left its own here
        self._requests[slot] = None
        self._kept[slot] = []
        self.active[slot] = False
        self.lengths[slot] = 0
        return completion

    def never_started(self, request: Request) -> Completion:
        """The completion of a request that was aborted before it had a slot."""
        num_prompt = len(request.token_ids)
        routes = None if self.routes is None else np.zeros((num_prompt, *self.routes.shape[2:]), self.routes.dtype)
        return Completion(
            token_ids=np.zeros(0, np.int32),
            logprobs=np.zeros(0, np.float32),
            versions=np.zeros(0, np.int32),
            kept=Kept.from_rows([]) if truncates(request.sampling) else None,
            routes=routes,
            routed=None if routes is None else np.zeros(num_prompt, bool),
            selections=self._selections(0, num_prompt, num_fed=0),
            finish=Finish.ABORT,
        )

    def _selections(self, slot: int, num_tokens: int, num_fed: int | None = None) -> Selections | None:
        """Of the first `num_tokens` tokens in a slot, of which all but the last were fed unless `num_fed` says else."""
        if self.selections is None:
            return None
        top_k, num_fed = self.selections.shape[-1], num_tokens - 1 if num_fed is None else num_fed
        order = np.arange(num_tokens)
        recorded = (order >= top_k) & (order < num_fed)
        return Selections.of(self.selections[slot, : np.count_nonzero(recorded)], recorded)

    def _keep(self, slots: NDArray, draws: Draws) -> None:
        if len(draws.kept_ids) == 0:
            return
        bounds = draws.kept_offsets.tolist()
        for row, slot in enumerate(slots.tolist()):
            if bounds[row] < bounds[row + 1]:
                self._kept[slot].append(draws.kept_ids[bounds[row] : bounds[row + 1]])

    def _set_stops(self, slot: int, stop_token_ids: tuple[int, ...]) -> None:
        missing = len(stop_token_ids) - self._stops.shape[1]
        if missing > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, missing)), constant_values=_NO_STOP)
        self._stops[slot] = _NO_STOP
        self._stops[slot, : len(stop_token_ids)] = stop_token_ids
