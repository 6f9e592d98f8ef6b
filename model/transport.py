"""Weights on their way between processes: buckets packed into one buffer, and a group that broadcasts them.

A transfer is a stream of buckets that describe themselves, so a receiver needs to know nothing beforehand.
Descriptions go through the group's store, which waits no longer than it is told to; bytes go through NCCL, or gloo
without a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

_ALIGNMENT = 256  # bytes; what device allocators align to, and enough for any dtype
_POLL_S, _LONGEST_POLL_S = 0.0001, 0.005
_LOOK_S = 0.5
"""How often a process that waits looks whether its group was abandoned, and while the group meets, who is there."""
_ABANDONED = "abandoned"
_END, _ABSENT = "end", "?"
"""No descriptions of buckets: of what follows the last one, and of what is not there yet."""
_KEPT_BUCKETS = 1024
"""Descriptions that are not read or written anew, some kilobytes each; a model of half a terabyte has as many."""
NUM_STAGED = 3
"""Buckets that a sender has packed at a time: with two, the group waits for the CPU that packs the next one whenever a
small bucket is all that is on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One tensor of a packed bucket."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # torch's name for it
    offset: int  # in bytes, from the beginning of the buffer

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, *, offset: int) -> Slot:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return cls(name=name, shape=tuple(tensor.shape), dtype=dtype, offset=offset)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """What a packed buffer holds. Updates are cut alike, so buckets are kept, and what is made of them with them."""

    slots: tuple[Slot, ...]
    num_bytes: int  # of the buffer, gaps included

    @staticmethod
    def of(tensors: Mapping[str, torch.Tensor]) -> Bucket:
        return _bucket_of(tuple([(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]))

    @staticmethod
    def from_json(text: str | bytes) -> Bucket:
        return _bucket_from(text)

    def to_json(self) -> str:
        return self._json

    @cached_property
    def _json(self) -> str:
        return json.dumps([self.num_bytes, [[slot.name, slot.shape, slot.dtype, slot.offset] for slot in self.slots]])

    def pack(self, tensors: Mapping[str, torch.Tensor], buffer: torch.Tensor) -> None:
        """Copies the tensors into a uint8 ``buffer`` of at least ``num_bytes``."""
        alike = defaultdict(list)  # for one launch each
        for slot, view in zip(self.slots, self._views(buffer), strict=True):
            alike[slot.dtype].append((view, tensors[slot.name].detach()))
        for pairs in alike.values():
            torch._foreach_copy_([view for view, _ in pairs], [tensor for _, tensor in pairs])  # pyright: ignore[reportPrivateImportUsage]

    def unpack(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of the packed tensors, by name."""
        return {slot.name: view for slot, view in zip(self.slots, self._views(buffer), strict=True)}

    def _views(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        octets = buffer[: self.num_bytes]
        if len(octets) < self.num_bytes:  # as_strided looks no further than the memory behind it
            raise ValueError(f"a bucket of {self.num_bytes} bytes does not lie in a buffer of {len(octets)}")
        typed = {dtype: octets[: len(octets) // dtype.itemsize * dtype.itemsize].view(dtype) for dtype in self._dtypes}
        for dtype, shape, strides, first in self._layout:
            whole = typed[dtype]
            yield whole.as_strided(shape, strides, whole.storage_offset() + first)

    @cached_property
    def _dtypes(self) -> list[torch.dtype]:
        return list({dtype: None for dtype, *_ in self._layout})

    @cached_property
    def _layout(self) -> list[tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]]:
        """Of every slot its dtype, shape, strides and first element, counted in elements of its dtype."""
        dtypes = [getattr(torch, slot.dtype) for slot in self.slots]
        return [
            (dtype, slot.shape, _row_major(slot.shape), slot.offset // dtype.itemsize)
            for slot, dtype in zip(self.slots, dtypes, strict=True)
        ]


@functools.lru_cache(maxsize=_KEPT_BUCKETS)
def _bucket_of(tensors: tuple[tuple[str, torch.Size, torch.dtype], ...]) -> Bucket:
    slots, offset = [], 0
    for name, shape, dtype in tensors:
        slot = Slot(name=name, shape=tuple(shape), dtype=str(dtype).removeprefix("torch."), offset=offset)
        slots.append(slot)
        offset += -(-slot.num_bytes // _ALIGNMENT) * _ALIGNMENT
    return Bucket(slots=tuple(slots), num_bytes=offset)


@functools.lru_cache(maxsize=_KEPT_BUCKETS)
def _bucket_from(text: str | bytes) -> Bucket:
    num_bytes, slots = json.loads(text)
    return Bucket(
        num_bytes=num_bytes,
        slots=tuple(Slot(name=n, shape=tuple(shape), dtype=d, offset=at) for n, shape, d, at in slots),
    )


def _row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


class StagingBuffers:
    """Device buffers that buckets are packed into in turn; each is made once, and again only for a larger bucket."""

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(0, dtype=torch.uint8, device=device) for _ in range(count)]
        self._numbers = [0] * count
        self._turn = 0

    @property
    def number(self) -> int:
        """Of the buffer that :meth:`pack` returned last: another one has another number, be it at the same address."""
        return self._numbers[self._turn]

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> tuple[Bucket, torch.Tensor]:
        """The bucket, and what holds it once the current stream is done; overwritten ``count`` calls later."""
        bucket = Bucket.of(tensors)
        self._turn = (self._turn + 1) % len(self._buffers)
        if self._buffers[self._turn].numel() < bucket.num_bytes:
            # Gone before its successor is made, for which there may be no memory.
            self._buffers[self._turn] = torch.empty(0, dtype=torch.uint8, device=self._device)
            self._buffers[self._turn] = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self._device)
            self._numbers[self._turn] = max(self._numbers) + 1
        buffer = self._buffers[self._turn][: bucket.num_bytes]
        bucket.pack(tensors, buffer)
        return bucket, buffer


def open_store(host: str, size: int | None = None) -> TCPStore:
    """The store of a group of ``size``, on a free port of this process; ``store.port`` says which."""
    # Left to itself it would listen on every interface, to anyone.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, 0), family=family)
    port = listener.getsockname()[1]
    return TCPStore(host, port, size, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def abandon(host: str, port: int) -> None:
    """Lets a group know, from any process, that a partner is gone: whoever joins, and the sender, stop waiting."""
    with contextlib.suppress(RuntimeError):  # the group itself may be gone
        store = TCPStore(host, port, None, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
        PrefixStore("weights", store).set(_ABANDONED, "1")


class BroadcastGroup:
    """Processes of which the first sends tensors to all others, beside whatever other groups they are in.

    Waits end after ``timeout_s`` with TimeoutError, or torch's DistError with a store, so that a partner that died is
    noticed; but a question to the store of a machine that vanished without a word ends when the connection does. After
    an error the group is of no use any more.
    """

    def __init__(
        self, host: str, store: TCPStore, *, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        """Joins; returns when all ``size`` processes have. ``host`` is this process's own address, for gloo."""
        self.rank = rank
        self.device = device
        self._timeout_s = timeout_s
        store.set_timeout(timedelta(seconds=timeout_s))
        self._store = PrefixStore("weights", store)
        # Whoever waits in a store holds its connection, and this one is looked at meanwhile.
        own = PrefixStore("group", store.clone())  # pyright: ignore[reportAttributeAccessIssue]
        self._meet(size)
        self._backend = self._watched(lambda: _backend(host, own, rank, size, device, timeout_s))
        self._num_rounds = 0
        self._keys: list[str] = []  # in the store, of this round
        self._old_keys: list[str] = []  # of the last one

    @classmethod
    def join(cls, host: str, port: int, **settings: Any) -> BroadcastGroup:
        """As a process that does not hold the store; ``settings`` as above."""
        timeout = timedelta(seconds=settings["timeout_s"])
        store = TCPStore(host, port, None, is_master=False, timeout=timeout, wait_for_workers=False)
        with socket.create_connection((host, port)) as route:
            own_host = route.getsockname()[0]
        return cls(own_host, store, **settings)

    def send(
        self, buckets: Iterable[Mapping[str, torch.Tensor]], *, meanwhile: Callable[[], None] = lambda: None
    ) -> int:
        """Sends one transfer from rank 0, and returns its bytes. All receivers have taken the one before to its end.

        When a bucket's turn is over, the current stream may still have its tensors to read; nothing else has.
        ``meanwhile`` is called when all buckets are on their way.
        """
        assert self.rank == 0, "only rank 0 sends"
        staging = StagingBuffers(NUM_STAGED, self.device)  # memory that is the learner's again afterwards
        number, num_bytes, under_way = -1, 0, []
        for number, tensors in enumerate(buckets):
            if len(under_way) == NUM_STAGED:
                self._wait(under_way.pop(0))
            bucket, buffer = staging.pack(tensors)
            self._publish(number, bucket.to_json())
            under_way.append(self._broadcast(buffer))
            num_bytes += sum(slot.num_bytes for slot in bucket.slots)
        self._publish(number + 1, _END)
        meanwhile()
        self._forget_last_round()
        for work in under_way:
            self._wait(work)
        self._num_rounds += 1
        return num_bytes

    def receive(self) -> Iterator[dict[str, torch.Tensor]]:
        """The buckets of one transfer, each in fresh memory; the next one is on its way while one is used."""
        number, coming = 0, self._take(0)
        while coming is not None:
            tensors, work = coming
            number += 1
            coming = self._take(number)  # before this one is there, so that nothing stands between the two
            self._wait(work)
            yield tensors
        self._num_rounds += 1

    def _take(self, number: int) -> tuple[dict[str, torch.Tensor], Any] | None:
        """What a bucket will have brought once its broadcast is over, and that; None at the transfer's end."""
        description = self._description(number)
        if description == _END.encode():
            return None
        bucket = Bucket.from_json(description)
        buffer = torch.empty(bucket.num_bytes, dtype=torch.uint8, device=self.device)
        work = self._broadcast(buffer)
        return bucket.unpack(buffer), work

    def close(self) -> None:
        """Ends the group without waiting for the others."""
        abort = getattr(self._backend, "abort", None)
        if abort is not None:
            abort()

    def _meet(self, size: int) -> None:
        """Returns when all processes are there. NCCL would wait for those that died before without looking up."""
        self._store.set(f"here/{self.rank}", "1")
        everybody = [f"here/{rank}" for rank in range(size)]
        deadline = time.monotonic() + self._timeout_s
        while not self._store.check(everybody):
            self._look(deadline)
            time.sleep(min(_LOOK_S, 0.05))

    def _watched(self, connect: Callable[[], Any]) -> Any:
        """What ``connect`` returns. Where the group is abandoned first, its thread is left to its own time-out."""
        outcome: Future[Any] = Future()

        def work() -> None:
            try:
                if self.device.type == "cuda":
                    torch.cuda.set_device(self.device)  # each thread has its own
                outcome.set_result(connect())
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=work, name="weight group", daemon=True).start()
        deadline = time.monotonic() + self._timeout_s
        while True:
            with contextlib.suppress(FutureTimeout):
                return outcome.result(_LOOK_S)
            self._look(deadline)

    def _look(self, deadline: float) -> None:
        """Raises TimeoutError when there is no use in waiting any longer."""
        if time.monotonic() > deadline:
            raise TimeoutError(f"a weight transfer stood still for {self._timeout_s:.0f} s")
        if self._store.check([_ABANDONED]):
            raise TimeoutError("a weight transfer was given up: a partner is gone")

    def _publish(self, number: int, description: str) -> None:
        self._store.set(self._key(number), description)
        self._keys.append(self._key(number))

    def _description(self, number: int) -> bytes:
        found, key = b"", self._key(number)

        def is_there() -> bool:
            # A question in one round trip, where get() takes two and check() before it a third: what is there stays,
            # and what is absent does not come to be.
            nonlocal found
            found = self._store.compare_set(key, _ABSENT, _ABSENT)
            return found not in (b"", _ABSENT.encode())

        self._until(is_there)
        return found

    def _forget_last_round(self) -> None:
        for key in self._old_keys:
            self._store.delete_key(key)
        self._old_keys, self._keys = self._keys, []

    def _key(self, number: int) -> str:
        return f"{self._num_rounds}/{number}"

    def _broadcast(self, buffer: torch.Tensor) -> Any:
        options = torch.distributed.BroadcastOptions()  # pyright: ignore[reportPrivateImportUsage]
        options.rootRank, options.rootTensor = 0, 0
        return self._backend.broadcast([buffer], options)

    def _wait(self, work: Any) -> None:
        """Until the bytes are there. Polls, because NCCL's own wait is for the stream and not for the clock."""
        self._until(work.is_completed)
        work.wait()

    def _until(self, done: Callable[[], bool]) -> None:
        """Raises TimeoutError when the group is of no use any more before that."""
        began = time.monotonic()
        look = began + _LOOK_S
        while not done():
            now = time.monotonic()
            if now > look:
                look = now + _LOOK_S
                self._look(began + self._timeout_s)
            time.sleep(min(max(_POLL_S, (now - began) / 20), _LONGEST_POLL_S))


def _backend(host: str, store: Store, rank: int, size: int, device: torch.device, timeout_s: float) -> Any:
    # The backend's own watchdog would end the process; it comes after ours, which says what happened.
    timeout = timedelta(seconds=2 * timeout_s)
    if device.type == "cuda":
        nccl: Any = torch.distributed.ProcessGroupNCCL  # pyright: ignore[reportAttributeAccessIssue]
        options = nccl.Options()
        options._timeout = timeout
        options.is_high_priority_stream = True  # what fills the GPU meanwhile, as checksums do, goes on beside it
        backend = nccl(store, rank, size, options)
        backend._set_sequence_number_for_group()
        backend.eager_connect_single_device(device)
        return backend
    gloo: Any = torch.distributed.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timeout
    return gloo(store, rank, size, options)
