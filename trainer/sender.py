"""A learner rank's end of a weight transfer: packed buckets over a group, or offered in this rank's GPU memory.

Nothing is ever whole but one bucket, however the ranks have partitioned the model. Checksums are taken of the same
tensors that are sent, on the device, while they are whole.
"""

from __future__ import annotations

import base64
import pickle
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from model.checksum import Checksums, SumTables
from model.transport import BroadcastGroup, Slot, StagingBuffers, open_store
from model.transport import Bucket as PackedBucket

NUM_OFFERED = 2
"""Buffers of a rank that offers buckets: one is filled while an engine reads the other. They stay."""

Bucket = Mapping[str, torch.Tensor]
Resident = Callable[[], Bucket | None]
"""All of an update's tensors, where they lie whole on this rank anyway; else None."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What left the learner in one update."""

    num_bytes: int
    checksums: dict[str, int]  # `model.checksums` of the tensors, by in-memory name


Part = tuple[int, str]
"""The number of a bucket, and the handle of the memory that holds it."""
_MOST_HANDLES = 512
"""Pieces of memory that are exported; from a thousand on torch waits for the GPU where it otherwise leaves an event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Weights in the memory of each offering rank, for the engine workers on the ranks' GPUs."""

    buckets: list[str]  # `model.transport.Bucket` as JSON; ranks mostly have the same ones
    parts: dict[str, list[Part]]  # by the GPU's UUID
    stays: bool = False  # until the update has ended: the parameters themselves, all of them

    @classmethod
    def joined(cls, offers: Sequence[Offer]) -> Offer:
        """Those of all ranks. Raises ValueError where some stay and others do not."""
        if any(offer.stays != offers[0].stays for offer in offers):
            raise ValueError("some ranks have all weights whole and others do not")
        numbers = {bucket: number for number, bucket in enumerate({b: None for of in offers for b in of.buckets})}
        parts = {
            uuid: [(numbers[offer.buckets[number]], handle) for number, handle in of_gpu]
            for offer in offers
            for uuid, of_gpu in offer.parts.items()
        }
        return cls(buckets=list(numbers), parts=parts, stays=offers[0].stays)


class WeightSender:
    """One rank's. ``rank`` 0 speaks for all; the others take part in what makes tensors whole."""

    def __init__(self, *, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.device = device
        self._store: Any = None
        self._group: BroadcastGroup | None = None
        self._offering: Generator[Offer] | None = None
        self._summing: Summing | None = None  # of what is offered
        self._staging: StagingBuffers | None = None
        self._handles: dict[int, str] = {}  # of exported staging buffers, by their numbers
        self._exports = Exports()  # of memory that parameters lie in
        self._tables = SumTables()  # parameters that no other rank has a part of stay where they are
        self._num_bytes = 0

    def open(self, host: str) -> int:
        """On rank 0: opens a group that engines can join at ``host``, in place of the last one; returns the port."""
        self._leave()
        self._store = open_store(host)
        return self._store.port

    def join(self, host: str, *, size: int, timeout_s: float) -> None:
        """On rank 0: waits until all ``size`` processes are there."""
        self._group = BroadcastGroup(host, self._store, rank=0, size=size, device=self.device, timeout_s=timeout_s)

    def send(self, buckets: Iterator[Bucket], resident: Resident = lambda: None) -> Sent | None:
        """Broadcasts an update. Ranks other than 0 go through the buckets, send nothing and return None."""
        if self.rank != 0:
            for _ in buckets:
                pass
            return None
        assert self._group is not None, "join() comes first"
        summing = Summing(self._tables, resident)
        try:
            num_bytes = self._group.send(summing.of(buckets), meanwhile=summing.end)
        except Exception:
            self._leave()  # a broadcast that nobody takes keeps the GPU from whatever waits for all of it
            for _ in buckets:  # the other ranks go through them all, and make tensors whole together with this one
                pass
            raise
        return Sent(num_bytes=num_bytes, checksums=summing.result())

    def offer(self, buckets: Iterator[Bucket] | None, resident: Resident = lambda: None) -> Offer | Sent:
        """The next part of an update, begun with ``buckets`` and continued with None; at the end, what was offered.

        All of it at once where weights lie whole on this rank, in few enough pieces of memory; else the next bucket,
        which stands until the call after the next one.
        """
        if buckets is not None:
            self._num_bytes, weights = 0, resident()
            self._summing = Summing(self._tables, lambda: weights) if self.rank == 0 else None
            self._offering = self._offers(buckets, weights)
        assert self._offering is not None, "no update has begun"
        offer = next(self._offering, None)
        if offer is not None:
            return offer
        checksums = {} if self._summing is None else self._summing.result()
        self._offering = self._summing = None
        if self.device.type == "cuda":  # the engine on this GPU takes memory for its cache next
            torch.cuda.ipc_collect()  # what was outgrown, as far as engines have let go of it
            torch.cuda.empty_cache()
        return Sent(num_bytes=self._num_bytes, checksums=checksums)

    def drop_offer(self) -> None:
        """Ends an update that broke off: until then the parameters of its last bucket stay whole."""
        if self._offering is not None:
            self._offering.close()
            self._offering = self._summing = None

    def _offers(self, buckets: Iterator[Bucket], weights: Bucket | None) -> Generator[Offer]:
        pieces = None if weights is None else by_memory(weights)
        if pieces is not None:
            self._num_bytes = sum(slot.num_bytes for bucket, _ in pieces for slot in bucket.slots)
            self._staging, self._handles = None, {}
            handles = self._exports.of([memory for _, memory in pieces])
            described = [bucket.to_json() for bucket, _ in pieces]
            offer = self._offer(described, handles, stays=True)
            if self._summing is not None:  # engines are still getting ready; what they read takes the GPU's memory too
                self._summing.end()
            yield offer
            return
        self._exports = Exports()
        for tensors in self._summing.of(buckets) if self._summing else buckets:
            self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            self._staging = self._staging or StagingBuffers(NUM_OFFERED, self.device)
            bucket, buffer = self._staging.pack(tensors)
            yield self._offer([bucket.to_json()], [self._handle(self._staging.number, buffer)])
        if self._summing is not None:  # the engine loads what was offered last meanwhile
            self._summing.end()

    def _offer(self, buckets: list[str], handles: list[str], *, stays: bool = False) -> Offer:
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # whoever is told of it reads it at once
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        return Offer(buckets=buckets, parts={uuid: list(enumerate(handles))}, stays=stays)

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _handle(self, number: int, buffer: torch.Tensor) -> str:
        """Exports a staging buffer once: every export is counted until a receiver lets go of it.

        By number: an outgrown buffer's address may become another's, whose memory the old handle does not open.
        """
        if number not in self._handles:
            self._handles[number] = _exported(buffer.untyped_storage())
        return self._handles[number]


def by_memory(weights: Bucket) -> list[tuple[PackedBucket, torch.UntypedStorage]] | None:
    """What lies in each piece of memory, and that; None where there are too many, or a tensor is empty or has gaps."""
    slots: dict[int, list[Slot]] = {}
    memory: dict[int, torch.UntypedStorage] = {}
    for name, tensor in weights.items():
        if not tensor.is_contiguous() or not tensor.numel():
            return None
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        memory[place] = storage
        slots.setdefault(place, []).append(Slot.of(name, tensor, offset=tensor.data_ptr() - place))
    if len(memory) > _MOST_HANDLES:
        return None
    return [
        (PackedBucket(slots=tuple(slots[place]), num_bytes=storage.nbytes()), storage)
        for place, storage in memory.items()
    ]


class Exports:
    """Handles of pieces of memory, each exported once: every export is counted until a receiver lets go of it."""

    def __init__(self) -> None:
        self._handles: dict[int, tuple[weakref.ref[torch.UntypedStorage], str]] = {}  # by address

    def of(self, pieces: Sequence[torch.UntypedStorage]) -> list[str]:
        """Of each, which is there once; and forgets what is none of these."""
        kept = {}
        for memory in pieces:
            at = memory.data_ptr()
            of, handle = self._handles.get(at, (None, ""))
            if of is None or of() is not memory:  # at the address of another one, which is gone
                of, handle = weakref.ref(memory), _exported(memory)
            kept[at] = of, handle
        self._handles = kept
        return [handle for _, handle in kept.values()]


def _exported(memory: torch.UntypedStorage) -> str:
    whole = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory)
    return base64.b64encode(pickle.dumps(reduce_tensor(whole)[1])).decode()


class Summing:
    """Takes the checksums of an update in the shade of its transfer.

    Of what lies whole on this rank anyway all at once, when nothing waits to be packed: behind the last bucket, or
    where there are none. Else of each bucket when the next one is asked for, and it is on its way.
    """

    def __init__(self, tables: SumTables, resident: Resident) -> None:
        self._sums = Checksums(tables)
        self._resident = resident

    @cached_property
    def _everything(self) -> Bucket | None:
        return self._resident()

    def of(self, buckets: Iterator[Bucket]) -> Iterator[Bucket]:
        """The buckets as they are."""
        for tensors in buckets:
            yield tensors
            if self._everything is None:  # looked for behind the first bucket at the earliest: engines get ready now
                self._sums.add(tensors)

    def end(self) -> None:
        """Comes when all buckets are on their way."""
        if self._everything is not None:
            self._sums.add(self._everything)

    def result(self) -> dict[str, int]:
        return self._sums.result()
