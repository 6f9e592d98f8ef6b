"""A learner rank's end of a weight transfer: packed buckets over a group, or offered in this rank's GPU memory.

Nothing is ever whole but one bucket, however the ranks have partitioned the model. Checksums are taken of the same
tensors that are sent, on the device, while they are whole.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_tensor

from model.checksum import Checksums, SumTables
from model.transport import BroadcastGroup, StagingBuffers, open_store

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A bucket in a buffer of each offering rank, for the engine workers on the ranks' GPUs."""

    bucket: str  # `model.transport.Bucket` as JSON
    handles: dict[str, str]  # by the GPU's UUID


class WeightSender:
    """One rank's. ``rank`` 0 speaks for all; the others take part in what makes tensors whole."""

    def __init__(self, *, rank: int, device: torch.device) -> None:
        self.rank = rank
        self.device = device
        self._store: Any = None
        self._group: BroadcastGroup | None = None
        self._offering: Generator[Bucket] | None = None
        self._summing: Summing | None = None  # of what is offered
        self._staging: StagingBuffers | None = None
        self._handles: dict[int, str] = {}  # of exported staging buffers, by their numbers
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
        """The next bucket of an update, begun with ``buckets`` and continued with None; at the end, what was offered.

        An offer stands until the call after the next one.
        """
        if buckets is not None:
            self._num_bytes = 0
            self._summing = Summing(self._tables, resident) if self.rank == 0 else None
            self._offering = self._summing.of(buckets) if self._summing else (tensors for tensors in buckets)
        assert self._offering is not None, "no update has begun"
        tensors = next(self._offering, None)
        if tensors is None:
            checksums = {}
            if self._summing is not None:  # the engine loads the last bucket meanwhile
                self._summing.end()
                checksums = self._summing.result()
            self._offering = self._summing = None
            if self.device.type == "cuda":  # the engine on this GPU takes memory for its cache next
                torch.cuda.ipc_collect()  # buffers that were outgrown, as far as engines have let go of them
                torch.cuda.empty_cache()
            return Sent(num_bytes=self._num_bytes, checksums=checksums)
        self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        self._staging = self._staging or StagingBuffers(NUM_OFFERED, self.device)
        bucket, buffer = self._staging.pack(tensors)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # whoever is told of the buffer reads it at once
        uuid = str(torch.cuda.get_device_properties(self.device).uuid)
        return Offer(bucket=bucket.to_json(), handles={uuid: self._handle(self._staging.number, buffer)})

    def drop_offer(self) -> None:
        """Ends an update that broke off: until then the parameters of its last bucket stay whole."""
        if self._offering is not None:
            self._offering.close()
            self._offering = self._summing = None

    def _leave(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None

    def _handle(self, number: int, buffer: torch.Tensor) -> str:
        """Exports a staging buffer once: every export is counted until a receiver lets go of it.

        By number: an outgrown buffer's address may become another's, whose memory the old handle does not open.
        """
        if number not in self._handles:
            whole = torch.empty(0, dtype=torch.uint8, device=buffer.device).set_(buffer.untyped_storage())
            self._handles[number] = base64.b64encode(pickle.dumps(reduce_tensor(whole)[1])).decode()
        return self._handles[number]


class Summing:
    """Takes the checksums of an update in the shade of its transfer.

    Of what lies whole on this rank anyway all at once, behind the last bucket, when nothing waits to be packed any
    more; else of each bucket when the next one is asked for, and it is on its way.
    """

    def __init__(self, tables: SumTables, resident: Resident) -> None:
        self._sums = Checksums(tables)
        self._resident = resident
        self._everything: Bucket | None = None

    def of(self, buckets: Iterator[Bucket]) -> Generator[Bucket]:
        """The buckets as they are."""
        begun = False
        for tensors in buckets:
            yield tensors
            if not begun:
                begun, self._everything = True, self._resident()  # engines are still getting ready
            if self._everything is None:
                self._sums.add(tensors)

    def end(self) -> None:
        """Comes when all buckets are on their way."""
        if self._everything is not None:
            self._sums.add(self._everything)

    def result(self) -> dict[str, int]:
        return self._sums.result()
