"""The embedded engine: continuous batching over the slots of a latent cache, in this process, on any torch device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from model import CacheView, KeySelection, LanguageModel, SlotCache
from model.checksum import checksums
from rl.errors import DataError
from rl.sample import NDArray
from rollout.engine import Completion, EngineStats, Finish, Request, check_window
from rollout.freed_memory import release_freed_memory
from rollout.prefix import PrefixIndex
from rollout.sampler import sample
from rollout.schema import SchemaGuide, SchemaReader
from rollout.slots import SlotTable

Finished = list[tuple[str, Completion]]
"""Completions with the ids of their requests."""

ROW_MULTIPLE = 16
"""Rows of a forward pass are padded to a multiple of this; see "Batch independence" below."""

PREFILL_TOKENS = 2048
"""Tokens of one prefill call, padding included; longer prompts are prefilled in chunks."""


class TorchEngine:
    """Generates up to `max_num_seqs` sequences of at most `max_context` tokens at a time; call :meth:`step` to advance.

    A step admits waiting requests to free slots, prefills their prompts (siblings of one prompt share one prefill),
    and decodes one token for every active sequence. Weights change only in :meth:`commit`, so between two steps.

    Batch independence. A request's random numbers are a function of its seed and of positions, every operation
    treats rows separately, and a slot shows nothing of the sequence before. What is left is the rounding of matrix
    products, whose kernels may differ with the number of rows: rows are padded to multiples of ROW_MULTIPLE, here and
    in each expert (`model.moe`), from which on the libraries we measured (CPU, fp32) give each row the same bits
    whatever is beside it. Where a library does not, logits in different company agree to rounding, and tokens are the
    same unless a draw or a top-k choice falls into that gap.

    Sleep. Between :meth:`sleep` and the wake that follows there is no cache, and perhaps no weights: nothing steps, and
    requests wait. What was being generated has its cache computed again when it goes on, by the weights of then.
    """

    def __init__(
        self,
        module: LanguageModel,
        *,
        max_num_seqs: int,
        max_context: int,
        version: int = 0,
        prefill_tokens: int = PREFILL_TOKENS,
        record_selections: bool = False,
        schemas: SchemaReader | None = None,
    ) -> None:
        """`record_selections`: whether completions tell what sparse attention kept (Keep Selection).

        `schemas`: reads the schemas of requests that have one; without it there may be none.
        """
        outline = module.outline
        self.module = module.eval().requires_grad_(False)
        self.max_num_seqs = max_num_seqs
        self.max_context = max_context
        self.version = version
        num_slots = -(-max_num_seqs // ROW_MULTIPLE) * ROW_MULTIPLE
        self._device = module.lm_head.weight.device
        self._cache: SlotCache | None = module.new_cache(num_slots, max_context)  # None while it sleeps
        self._given_up: list[tuple[torch.UntypedStorage, int]] = []  # storages of weights, and the bytes they had
        self._table = SlotTable(
            num_slots,
            max_context,
            route_shape=(len(outline.moe_layers), outline.experts_per_token) if outline.moe_layers else None,
            num_experts=outline.num_experts,
            selection_shape=_selection_shape(module, max_context) if record_selections else None,
        )
        self._schemas = schemas
        self._guides: dict[str, SchemaGuide] = {}  # of requests that have a schema, by their ids
        self._prefill_tokens = prefill_tokens
        self._free = deque(range(max_num_seqs))  # the slot idle for longest comes first
        self._waiting: deque[Request] = deque()
        self._ids: set[str] = set()
        self._prefixes = PrefixIndex(num_slots)
        self._tensors = dict(module.named_weights())
        self._staged: dict[str, torch.Tensor] = {}
        self._num_generated = self._num_prompt = self._num_prefilled = self._num_steps = 0
        self._busy_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._ids)

    @property
    def is_asleep(self) -> bool:
        return self._cache is None

    @property
    def num_bytes(self) -> int:
        """Of the weights and the cache that it holds now."""
        stores = () if self._cache is None else self._cache.stores
        storages = {tensor.untyped_storage()._cdata: tensor for tensor in (*self._tensors.values(), *stores)}
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    def submit(self, *requests: Request) -> None:
        """Queues requests, all of them or none.

        Raises DataError, naming the request, for a prompt that does not fit the window or holds ids that the
        vocabulary lacks, or a schema that cannot be followed, and ValueError for an id that is in use.
        """
        for request in requests:
            self._check(request)
        guides = {request.id: self._guide(request) for request in requests if request.schema is not None}
        names = [request.id for request in requests]
        for name in names:
            if name in self._ids or names.count(name) > 1:
                raise ValueError(f"request {name}: the id is in use")
        self._ids.update(names)
        self._guides.update(guides)
        self._waiting.extendleft(request for request in reversed(requests) if request.urgent)
        self._waiting.extend(request for request in requests if not request.urgent)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Submits and steps until these requests are done; other requests' completions are lost."""
        self.submit(*requests)
        done: dict[str, Completion] = {}
        while not all(request.id in done for request in requests):
            done.update(self.step())
        return [done[request.id] for request in requests]

    @torch.inference_mode()
    def step(self) -> Finished:
        """Advances every active sequence by a token and returns the requests that are complete.

        Raises RuntimeError while the engine sleeps.
        """
        if self._cache is None:
            raise RuntimeError("the engine sleeps; it generates again after the next update, or after wake()")
        began = time.perf_counter()
        finished = self._admit()
        if self._table.active.any():
            finished += self._decode()
        self._busy_s += time.perf_counter() - began
        return finished

    def abort(self, request_ids: Sequence[str] | None = None) -> Finished:
        """Ends the named requests, or all; returns what they had generated."""
        named = self._ids.copy() if request_ids is None else self._ids.intersection(request_ids)
        ended = [(r.id, self._table.never_started(r)) for r in self._waiting if r.id in named]
        self._waiting = deque(r for r in self._waiting if r.id not in named)
        for name, _ in ended:
            self._forget(name)
        slots = [slot for slot in np.flatnonzero(self._table.active).tolist() if self._table.request(slot).id in named]
        return ended + self._release([(slot, Finish.ABORT) for slot in slots])

    def stage(self, bucket: Mapping[str, torch.Tensor]) -> None:
        """Keeps tensors for the next :meth:`commit`; they must not change until then.

        Raises ValueError naming the parameter that the model lacks or that has another shape.
        """
        for name, tensor in bucket.items():
            live = self._tensors.get(name)
            if live is None:
                raise ValueError(f"weight update: the engine's model has no parameter or buffer {name}")
            if live.shape != tensor.shape:
                raise ValueError(
                    f"weight update: {name} has shape {tuple(tensor.shape)} but the engine's is {tuple(live.shape)}"
                )
        self._staged.update(bucket)

    @torch.no_grad()
    def commit(self, version: int) -> dict[str, int]:
        """Copies what was staged into the live tensors, as `version`; returns the checksums of all live tensors.

        Active sequences keep the cache that earlier weights wrote. Prompts in the cache are not shared any more. An
        engine that sleeps wakes, and raises ValueError, naming the tensor, when it gave up one that was not staged.
        """
        if self._given_up:
            self._take_back_weights()
        for name, tensor in self._staged.items():
            self._tensors[name].copy_(tensor)
        self._staged = {}
        self._prefixes.clear()
        self.version = version
        self.wake()
        return checksums(self._tensors.items())

    def sleep(self, *, keep_weights: bool = False) -> None:
        """Gives up the cache and, unless they are kept, the memory of the weights, which only an update brings back.

        Sequences stay where they are. An engine that sleeps already goes on sleeping as it does.
        """
        if self._cache is None:
            return
        self._cache = None
        self._prefixes.clear()
        if not keep_weights:
            storages = [tensor.untyped_storage() for tensor in self._tensors.values()]
            self._given_up = [(storage, storage.nbytes()) for storage in storages]
            for storage in storages:
                storage.resize_(0)
        release_freed_memory(self._device)

    @torch.inference_mode()
    def wake(self) -> None:
        """Undoes a sleep that kept the weights; raises RuntimeError after one that did not."""
        if self._given_up:
            raise RuntimeError("the engine gave its weights up when it went to sleep; it wakes with the next update")
        if self._cache is None:
            self._cache = self.module.new_cache(self._table.num_slots, self.max_context)
            slots = np.flatnonzero(self._table.active)
            for _ in self._feed(slots, self._table.lengths[slots] - 1, record=False):  # the last one is not fed yet
                pass

    def stats(self) -> EngineStats:
        return EngineStats(
            num_generated_tokens=self._num_generated,
            num_prompt_tokens=self._num_prompt,
            num_prefilled_tokens=self._num_prefilled,
            num_decode_steps=self._num_steps,
            busy_s=self._busy_s,
            num_active=int(self._table.active.sum()),
            num_waiting=len(self._waiting),
            version=self.version,
        )

    def _check(self, request: Request) -> None:
        check_window(f"request {request.id}: the prompt", len(request.token_ids), self.max_context)
        vocab_size = self.module.outline.vocab_size
        foreign = (request.token_ids < 0) | (request.token_ids >= vocab_size)
        if foreign.any():
            raise DataError(
                f"request {request.id}: token id {request.token_ids[foreign][0]} is outside the model's vocabulary of "
                f"{vocab_size}; the tokenizer and the model do not belong together"
            )

    def _guide(self, request: Request) -> SchemaGuide:
        assert request.schema is not None
        if self._schemas is None:
            raise DataError(f"request {request.id}: the engine was started without schemas, but the request has one")
        try:
            return self._schemas.guide(request.schema)
        except ValueError as error:
            raise DataError(f"request {request.id}: {error}") from error

    def _admit(self) -> Finished:
        newcomers: list[tuple[int, bytes]] = []
        prompts: dict[bytes, list[int]] = {}  # to prefill: the first slot computes, the others copy
        while self._waiting and self._free:
            request, slot = self._waiting.popleft(), self._free.popleft()
            key = request.token_ids.tobytes()
            newcomers.append((slot, key))
            source = self._prefixes.slot(key)
            if source is None:
                self._prefixes.evict(slot)
                prompts.setdefault(key, []).append(slot)
            elif source != slot:
                self._copy_prompt(source, [slot], len(request.token_ids))
                self._prefixes.hold(key, slot)
            self._table.assign(slot, request)
            self._num_prompt += len(request.token_ids)
        if not newcomers:
            return []
        self._prefill(prompts)
        slots = np.array([slot for slot, _ in newcomers])
        return self._draw(slots, np.stack([self._prefixes.logits(key) for _, key in newcomers]))

    def _prefill(self, prompts: Mapping[bytes, list[int]]) -> None:
        """Writes the prompts' cache rows, all of them together, and indexes their last logits."""
        keys, slots = list(prompts), np.array([slots[0] for slots in prompts.values()], np.int64)
        lengths = self._table.lengths[slots]
        for begin, rows, hidden in self._feed(slots, lengths):
            ending = np.flatnonzero(lengths[rows] <= begin + hidden.shape[1])
            last = torch.from_numpy(lengths[rows[ending]] - 1 - begin).to(self._device)
            logits = self._logits(hidden[torch.from_numpy(ending).to(self._device), last])
            for row, row_logits in zip(rows[ending].tolist(), logits, strict=True):
                first, *others = prompts[keys[row]]
                self._copy_prompt(first, others, int(lengths[row]))
                for slot in (first, *others):
                    self._prefixes.hold(keys[row], slot, row_logits)

    def _feed(
        self, slots: NDArray, lengths: NDArray, *, record: bool = True
    ) -> Iterator[tuple[int, NDArray, torch.Tensor]]:
        """Writes the cache rows of the first `lengths` tokens of `slots`, chunk by chunk for all of them together.

        Yields for each chunk the position it begins at, which of `slots` take part, and their hidden states [B, Q, D].
        """
        begin = 0
        while len(rows := np.flatnonzero(lengths > begin)):
            width = max(ROW_MULTIPLE, self._prefill_tokens // len(rows) // ROW_MULTIPLE * ROW_MULTIPLE)
            width = min(width, -(-(int(lengths.max()) - begin) // ROW_MULTIPLE) * ROW_MULTIPLE)
            positions = np.arange(begin, begin + width) + np.zeros((len(rows), 1), np.int64)
            positions[positions >= lengths[rows, None]] = -1
            yield begin, rows, self._forward(slots[rows], positions, record=record)
            self._num_prefilled += int((positions >= 0).sum())
            begin += width

    def _decode(self) -> Finished:
        table = self._table
        slots = np.flatnonzero(table.active)
        num_rows = -(-len(slots) // ROW_MULTIPLE) * ROW_MULTIPLE
        if 4 * num_rows >= 3 * len(table.active):
            rows = np.arange(len(table.active))  # the whole cache in its own order is attended to without a copy
        else:
            rows = np.concatenate([slots, np.flatnonzero(~table.active)[: num_rows - len(slots)]])
        busy = np.flatnonzero(table.active[rows])
        hidden = self._forward(rows, (table.lengths[rows] - 1)[:, None])  # -1, padding, for idle slots
        self._num_steps += 1
        logits = self._logits(hidden[:, 0])
        return self._draw(rows[busy], logits if len(busy) == len(rows) else logits[busy])

    def _forward(self, slots: NDArray, positions: NDArray, *, record: bool = True) -> torch.Tensor:
        """Feeds the tokens at `positions` (int64 [B, Q], -1 for padding) of `slots`; hidden states [B, Q, D].

        Without `record` their routes and selections stay those that they were sampled with.
        """
        assert self._cache is not None
        # Reading past a sequence's end is harmless (masked), and sums over few keys, or over a number of them that is
        # not a multiple of 16, round in another order.
        lengths = -(-np.maximum(positions.max(axis=1) + 1, 2 * ROW_MULTIPLE) // ROW_MULTIPLE) * ROW_MULTIPLE
        lengths = np.minimum(lengths, self.max_context)
        view = CacheView(cache=self._cache, slots=self._tensor(slots), lengths=self._tensor(lengths))
        selection = KeySelection(own={}) if record and self._table.selections is not None else None
        output = self.module.backbone(
            self._tensor(self._table.tokens[slots[:, None], positions]),
            positions=self._tensor(positions),
            cache=view,
            record_routes=record and self._table.routes is not None,
            selection=selection,
        )
        if selection is not None and selection.own:
            self._keep_selections(slots, positions, selection.own)
        if record and self._table.routes is not None:
            assert output.routes is not None
            routes = output.routes.to(torch.int16).cpu().numpy().astype(self._table.routes.dtype)
            row, column = np.nonzero(positions >= 0)
            self._table.routes[slots[row], positions[row, column]] = routes[row, column]
        return output.hidden

    def _keep_selections(self, slots: NDArray, positions: NDArray, own: Mapping[int, torch.Tensor]) -> None:
        """Notes what every layer chose, int64 [B, Q, index_topk] each, for positions that left something out."""
        kept = self._table.selections
        assert kept is not None
        row, column = np.nonzero(positions >= kept.shape[-1])
        at = self._tensor(row), self._tensor(column)
        chosen = torch.stack([own[layer][at] for layer in range(kept.shape[-2])], dim=1)
        kept[slots[row], positions[row, column] - kept.shape[-1]] = chosen.to(torch.int32).cpu().numpy()

    def _logits(self, hidden: torch.Tensor) -> NDArray:
        """float32 [B, V] on the host, of hidden [B, D]."""
        num_rows = hidden.shape[0]
        short = -num_rows % ROW_MULTIPLE
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, short)) if short else hidden
        return self.module.lm_head(padded)[:num_rows].float().cpu().numpy()

    def _draw(self, slots: NDArray, logits: NDArray) -> Finished:
        guided = self._guided(slots)
        for row, guide in guided:
            guide.forbid(logits[row])
        draws = sample(logits, self._table.sampling.take(slots), self._table.lengths[slots])
        for row, guide in guided:
            guide.take(int(draws.token_ids[row]))
        self._num_generated += len(slots)
        return self._release(self._table.append(slots, draws, self.version))

    def _guided(self, slots: NDArray) -> list[tuple[int, SchemaGuide]]:
        """The rows of `slots` whose requests have a schema, and their guides."""
        if not self._guides:
            return []
        guides = (self._guides.get(self._table.request(slot).id) for slot in slots.tolist())
        return [(row, guide) for row, guide in enumerate(guides) if guide is not None]

    def _release(self, ended: Sequence[tuple[int, Finish]]) -> Finished:
        finished = []
        for slot, finish in ended:
            name = self._table.request(slot).id
            finished.append((name, self._table.release(slot, finish)))
            self._free.append(slot)
            self._forget(name)
        return finished

    def _forget(self, name: str) -> None:
        self._ids.remove(name)
        self._guides.pop(name, None)

    def _copy_prompt(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Gives the slots `targets` what slot `source` holds of its first `num_tokens` tokens."""
        if not targets:
            return
        slots = list(targets)
        assert self._cache is not None
        self._cache.copy(source, slots, num_tokens)
        if self._table.routes is not None:
            self._table.routes[slots, :num_tokens] = self._table.routes[source, :num_tokens]
        if (kept := self._table.selections) is not None:
            num_rows = max(0, num_tokens - kept.shape[-1])
            kept[slots, :num_rows] = kept[source, :num_rows]

    def _take_back_weights(self) -> None:
        missing = next((name for name in self._tensors if name not in self._staged), None)
        if missing is not None:
            raise ValueError(f"weight update: {missing} did not come, and the engine gave it up when it went to sleep")
        for storage, num_bytes in self._given_up:
            storage.resize_(num_bytes)
        self._given_up = []

    def _tensor(self, array: NDArray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, torch.long)


def _selection_shape(module: LanguageModel, max_context: int) -> tuple[int, int] | None:
    """Layers and keys of a selection; None in a model that never leaves a key out."""
    top_k = module.index_topk
    return None if top_k is None or top_k >= max_context else (module.outline.num_layers, top_k)
