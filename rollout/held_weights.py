"""What one engine worker holds of an update: where it lies, what it adds up to, and how an update is written into it.

Knows nothing of vLLM but its names; `rollout.vllm_transfer` has one for a worker's model.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from model.checksum import LiveSums, Piece
from rl.sample import NDArray
from rollout.vllm_layout import Coverage, absorbed_parts, held_parts

Described = Mapping[str, tuple[tuple[int, ...], str]]
"""{name: (shape, dtype by torch's name)} of the tensors of an update."""
Taken = tuple[NDArray, list[str]]
"""The sums of a worker's parts, int64, and the names of kv_b_proj of which decoding uses something else."""
_MOST_PLACES = 1_000_000
_LARGE = 1 << 30
"""Bytes of a worker's parts from which on each bucket is added up while the next one is on its way. Of fewer, one
launch for all at the end takes less than one for each."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker holds after an update, as plain data."""

    key: str  # of the description
    sums: bytes  # int64 of `model.checksum.word_sums`, one a part
    unabsorbed: list[str]  # of kv_b_proj, whose matrices for decoding are not made of it
    description: tuple[Any, Any] | None  # (tensors, parts), where it is not known already

    def plain(self) -> tuple[Any, ...]:
        return self.key, self.sums, self.unabsorbed, self.description


class Verifier:
    """`model.checksums` of what an engine holds, out of its workers' answers."""

    def __init__(self) -> None:
        self._coverage: dict[tuple[str, ...], Coverage] = {}  # the last one
        self._descriptions: dict[str, tuple[Any, Any]] = {}

    @property
    def known(self) -> list[str]:
        """The keys of the descriptions that answers may leave out."""
        return list(self._descriptions)

    def checksums(self, answers: Sequence[Answer]) -> dict[str, int]:
        """Without tensors that the workers do not hold completely and consistently."""
        keys = tuple(answer.key for answer in answers)
        if keys not in self._coverage:
            self._descriptions |= {answer.key: answer.description for answer in answers if answer.description}
            self._descriptions = {key: self._descriptions[key] for key in keys}
            self._coverage = {keys: self._cover(keys)}
        sums = [np.frombuffer(answer.sums, dtype=np.int64).tolist() for answer in answers]
        left_out = {name for answer in answers for name in answer.unabsorbed}
        return self._coverage[keys].checksums(sums, left_out)

    def _cover(self, keys: Sequence[str]) -> Coverage:
        described = [self._descriptions[key] for key in keys]
        workers = [
            [
                (name, Piece(shape=tuple(shape), axis=axis, start=start, length=length))
                for name, shape, axis, start, length in parts
            ]
            for _, parts in described
        ]
        return Coverage(workers, described[0][0])


class Census:
    """The modules and tensors of a model, and where they lie, at one time."""

    def __init__(self, model: nn.Module) -> None:
        holders = [holder for m in model.modules() for holder in (m._modules, m._parameters, m._buffers)]
        self._empty = [holder for holder in holders if not holder]
        self._holders = [holder for holder in holders if holder]
        self._sizes = list(map(len, self._holders))
        self._names, self._held = list(itertools.chain(*self._holders)), list(self._values())
        self._tensors = [value for value in self._held if isinstance(value, torch.Tensor)]
        self._places = self._now()

    def holds(self) -> bool:
        """Whether every module still has the same modules, and the same tensors of the same shape at the same address.

        For every read and write of kept views: those of tensors that were replaced would read what nobody uses.
        """
        return (
            not any(self._empty)
            and list(map(len, self._holders)) == self._sizes
            and all(map(operator.is_, self._values(), self._held))
            and list(itertools.chain(*self._holders)) == self._names
            and self._now() == self._places
        )

    def _values(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(holder.values() for holder in self._holders)

    def _now(self) -> list[tuple[Any, ...]]:
        with torch._C.DisableTorchFunctionSubclass():  # vLLM's parameters look at every call
            return [(tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in self._tensors]


def lie_apart(views: Iterable[torch.Tensor]) -> bool:
    """Whether no two of them have a byte in common; False as well where telling takes more than a million places."""
    begins, ends = [], []
    for view in views:
        inner = view.dim()  # the axes from here on lie in one piece
        while inner and view.stride(inner - 1) == math.prod(view.shape[inner:]):
            inner -= 1
        if math.prod(view.shape[:inner]) > _MOST_PLACES:
            return False
        if not view.numel():
            continue
        steps = [
            np.arange(size) * stride for size, stride in zip(view.shape[:inner], view.stride()[:inner], strict=True)
        ]
        at = functools.reduce(np.add.outer, steps, np.zeros((), np.int64)).reshape(-1) * view.element_size()
        begins.append(view.data_ptr() + at)
        ends.append(begins[-1] + math.prod(view.shape[inner:]) * view.element_size())
    if not begins:
        return True
    begin, end = np.concatenate(begins), np.concatenate(ends)
    order = np.argsort(begin)
    return bool((end[order][:-1] <= begin[order][1:]).all())


def live_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """With duplicates: a module that two others hold has a name in each."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


class HeldWeights:
    """Of worker ``rank`` of ``size``. It keeps views of live tensors: :meth:`is_live` comes before any use of them."""

    def __init__(self, live: Mapping[str, torch.Tensor], tensors: Described, *, rank: int, size: int) -> None:
        """Raises `rollout.vllm_layout.LayoutError` as `held_parts` does."""
        self.tensors = dict(tensors)
        shapes = {name: shape for name, (shape, _) in tensors.items()}
        self.parts = list(held_parts(live, shapes, rank=rank, size=size))
        self._all = np.arange(len(self.parts))
        self._is_large = sum(view.nbytes for _, _, view in self.parts) >= _LARGE
        self._sums: dict[tuple[str, ...], tuple[NDArray, LiveSums]] = {}  # of the parts of an update's buckets
        self._written: list[tuple[NDArray, torch.Tensor]] = []  # their numbers and sums, as they were written
        self._complete: list[NDArray] = []  # such numbers, that were those of all parts
        self._standing: tuple[Mapping[str, torch.Tensor], list[Any]] | None = None  # what stays, and its copies
        self._absorbed: list[tuple[str, list[tuple[torch.Tensor, torch.Tensor]]]] = []
        self._census: Census | None = None
        self._matrices: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []
        self.knows_absorbed = True
        """Whether of everything that decoding uses in place of kv_b_proj it is known what it is made of."""

    @classmethod
    def of_model(cls, model: nn.Module, tensors: Described, *, rank: int, size: int) -> HeldWeights:
        held = cls(live_tensors(model), tensors, rank=rank, size=size)
        held._census = Census(model)
        names = {view.data_ptr(): name for name, _, view in held.parts}
        for module in model.modules():
            if isinstance(getattr(module, "W_UK_T", None), torch.Tensor):
                held._note_absorbed(names, module)
        return held

    def _note_absorbed(self, names: Mapping[int, str], module: Any) -> None:
        name = names.get(module.kv_b_proj.weight.data_ptr())
        if name is None:
            self.knows_absorbed = False
            return
        self._matrices.append((module, module.W_UK_T, module.W_UV))
        pairs = absorbed_parts(module.kv_b_proj.weight, module.W_UK_T, module.W_UV)
        # What is a view of kv_b_proj cannot differ from it.
        self._absorbed.append((name, [(made, of) for made, of in pairs if _place(made) != _place(of)]))

    def is_of(self, tensors: Described) -> bool:
        """Whether it is what the model holds of these tensors."""
        return self.tensors == tensors and self.is_live()

    def is_live(self) -> bool:
        """Whether all modules and tensors of the model are those that are kept."""
        kept = all(module.W_UK_T is w_uk_t and module.W_UV is w_uv for module, w_uk_t, w_uv in self._matrices)
        return kept and self._census is not None and self._census.holds()

    @cached_property
    def _description(self) -> tuple[Any, Any]:
        parts = [[name, list(p.shape), p.axis, p.start, p.length] for name, p, _ in self.parts]
        return self.tensors, parts

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(repr(self._description).encode()).hexdigest()

    def take(self) -> Taken:
        """Of what the parts hold now."""
        return self._read([(self._all, self._live_sums.sums())])

    def begin(self) -> None:
        """What is written from now on makes up an update."""
        self._written = []

    def take_written(self) -> Taken:
        """As :meth:`take`, of an update that was just written.

        From sums that were taken as it came in, unless they may not be what lies there now: a part was not written, or
        twice, or shares its memory.
        """
        written, self._written = self._written, []
        if not written or not self._lie_apart:
            return self.take()
        return self._read(written) if self._are_all([numbers for numbers, _ in written]) else self.take()

    def _are_all(self, numbers: list[NDArray]) -> bool:
        """Whether every part is among them, once."""
        if len(numbers) == len(self._complete) and all(map(operator.is_, numbers, self._complete)):
            return True
        if not np.array_equal(np.sort(np.concatenate(numbers)), self._all):
            return False
        self._complete = numbers
        return True

    def _read(self, sums: Sequence[tuple[NDArray, torch.Tensor]]) -> Taken:
        """Sums of all parts, by their numbers, and which matrices for decoding differ: one wait for all."""
        names, differ = [], []
        for name, pairs in self._absorbed:
            for made, of in pairs:
                names.append(name)
                differ.append((made != of).any())
        flags = [torch.stack(differ).to(torch.int64)] if differ else []
        values = _joined([*(of_some for _, of_some in sums), *flags]).cpu().numpy()
        in_order = np.empty(len(self.parts), np.int64)
        in_order[np.concatenate([numbers for numbers, _ in sums])] = values[: len(self.parts)]
        unabsorbed = {name: None for name, flag in zip(names, values[len(self.parts) :], strict=True) if flag}
        return in_order, list(unabsorbed)

    @cached_property
    def _live_sums(self) -> LiveSums:
        return self._sums_of(self._all)

    def _sums_of(self, numbers: Iterable[int]) -> LiveSums:
        parts = [self.parts[number] for number in numbers]
        return LiveSums((view, piece, getattr(torch, self.tensors[name][1])) for name, piece, view in parts)

    @cached_property
    def _lie_apart(self) -> bool:
        made = [made for _, pairs in self._absorbed for made, _ in pairs]
        return lie_apart([*(view for _, _, view in self.parts), *made])

    def answer(self, known: Collection[str], taken: Taken | None = None) -> Answer:
        """``known``: keys of descriptions that need not be told again."""
        sums, unabsorbed = taken or self.take()
        description = None if self.key in known else self._description
        return Answer(self.key, sums.tobytes(), unabsorbed, description)

    def write(self, tensors: Mapping[str, torch.Tensor], *, flowing: bool = False, stays: bool = False) -> None:
        """Copies the worker's parts of whole tensors to where it holds them.

        ``flowing``: whether more is on its way meanwhile; a large worker adds up what lies there now, then. ``stays``:
        whether the same mapping may come again. Raises ValueError for a tensor that is none of these, or has another
        shape or dtype.
        """
        if self._standing is None or self._standing[0] is not tensors:
            self._standing = tensors, list(self._copies(tensors))
        for targets, sources in self._standing[1]:
            torch._foreach_copy_(targets, sources)  # pyright: ignore[reportPrivateImportUsage]
        if not stays:
            self._standing = None
        if flowing and self._is_large:
            numbers, sums = self._bucket_of(tuple(tensors))
            if len(numbers):
                self._written.append((numbers, sums.sums()))

    def _copies(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Targets and sources, of as few launches as they take."""
        alike, others = defaultdict(list), []
        for name, tensor in tensors.items():
            described = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            if self.tensors.get(name) != described:
                raise ValueError(f"weight update: {name} came as {described}, but before as {self.tensors.get(name)}")
            for target, piece in self._targets[name]:
                source = tensor
                if piece is not None:
                    source = tensor.reshape(piece.shape).narrow(piece.axis, piece.start, piece.length)
                fast = source.dtype == target.dtype and source.is_contiguous() and target.is_contiguous()
                (alike[source.dtype] if fast else others).append((target, source))
        for pairs in filter(None, [*alike.values(), others]):
            yield [target for target, _ in pairs], [source for _, source in pairs]

    def _bucket_of(self, names: tuple[str, ...]) -> tuple[NDArray, LiveSums]:
        """The numbers of these tensors' parts, and their sums; kept, as updates are cut alike."""
        if names not in self._sums:
            if len(self._sums) > len(self.tensors):  # they are not
                self._sums = {}
            numbers = [number for name in names for number in self._numbers[name]]
            self._sums[names] = np.array(numbers, np.int64), self._sums_of(numbers)
        return self._sums[names]

    @cached_property
    def _numbers(self) -> dict[str, list[int]]:
        numbers = {name: [] for name in self.tensors}  # a worker may hold nothing of one
        for number, (name, _, _) in enumerate(self.parts):
            numbers[name].append(number)
        return numbers

    @cached_property
    def _targets(self) -> dict[str, list[tuple[torch.Tensor, Piece | None]]]:
        """Of every tensor where its parts go, and which they are; None for the whole tensor."""
        targets = {name: [] for name in self.tensors}  # a worker may hold nothing of one
        for name, piece, view in self.parts:
            is_whole = piece.shard_shape == self.tensors[name][0]
            targets[name].append((view.view(piece.shard_shape), None if is_whole else piece))
        return targets

    def absorb(self) -> None:
        """Makes the matrices that decoding uses in place of kv_b_proj of what was written, where they lie apart."""
        for made, of in itertools.chain.from_iterable(pairs for _, pairs in self._absorbed):
            made.copy_(of)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
