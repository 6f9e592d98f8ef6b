"""Where vLLM keeps the tensors of a model, one worker's part of each, and what the parts amount to.

vLLM stacks matrices that read the same input into one parameter, and cuts parameters over its workers. This module says
so a second time, on purpose: it shares nothing with vLLM's own loader, so what it finds in an engine is evidence about
what that loader did. A wrong guess about a place cannot pass: places count in the checksums.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch

from model.checksum import Piece, hash_description

_STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "wk_weights_proj": ("wk", "weights_proj"),
}
"""A module of vLLM, and the modules whose rows it holds, in this order."""

_HOSTS = {part: host for host, parts in _STACKED.items() for part in parts}
_EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
_PADDED = ("embed_tokens", "lm_head")
"""Vocabularies are padded with further rows, then cut into equal parts."""

Shapes = Mapping[str, Sequence[int]]


class LayoutError(ValueError):
    """An engine holds a tensor in no way that is known; names the tensor."""


class Coverage:
    """How what an engine's workers hold makes up whole tensors: settled once, for all updates that lie alike."""

    def __init__(
        self, workers: Sequence[Sequence[tuple[str, Piece]]], tensors: Mapping[str, tuple[Sequence[int], str]]
    ) -> None:
        """``workers``: the parts that each holds, in the order of its sums; ``tensors``: {name: (shape, dtype)}."""
        places: dict[str, dict[Piece, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
        for worker, parts in enumerate(workers):
            for index, (name, piece) in enumerate(parts):
                places[name][piece].append((worker, index))
        self._held_once: list[tuple[str, int, list[tuple[int, int]]]] = []
        self._copied: list[tuple[str, int, list[list[tuple[int, int]]]]] = []
        for name, (shape, dtype) in tensors.items():
            copies = places.get(name, {})
            if not _covers(shape, copies):
                continue
            description, pieces = hash_description(tuple(shape), getattr(torch, dtype)), list(copies.values())
            if all(len(holders) == 1 for holders in pieces):
                self._held_once.append((name, description, [holder for holders in pieces for holder in holders]))
            else:
                self._copied.append((name, description, pieces))

    def checksums(self, sums: Sequence[Sequence[int]], left_out: Collection[str] = ()) -> dict[str, int]:
        """`model.checksums` of the tensors, from each worker's :func:`model.checksum.word_sums` of its parts.

        A tensor is left out, so that it does not pass for verified, where its parts leave gaps or overlap, where copies
        of a part on two workers differ, and where it is to be.
        """
        found = {
            name: (description + sum([sums[worker][index] for worker, index in holders])) % (1 << 64)
            for name, description, holders in self._held_once
        }
        for name, description, pieces in self._copied:
            copies = [{sums[worker][index] for worker, index in holders} for holders in pieces]
            if all(len(values) == 1 for values in copies):
                found[name] = (description + sum(values.pop() for values in copies)) % (1 << 64)
        for name in left_out:
            found.pop(name, None)
        return found


def held_parts(
    live: Mapping[str, torch.Tensor], shapes: Shapes, *, rank: int, size: int
) -> Iterator[tuple[str, Piece, torch.Tensor]]:
    """(our name, place in our tensor, view of the live one) of everything that worker ``rank`` of ``size`` holds.

    Raises LayoutError when the engine has nothing of a name, or nothing of a fitting shape.
    """
    for name, shape in shapes.items():
        path, _, kind = name.rpartition(".")
        module = path.rpartition(".")[2]
        if module == "experts":
            parts = _expert_parts(name, _find_experts(live, path, kind), shape, rank, size)
        elif module in _PADDED and name in live:
            parts = _vocabulary_parts(name, live[name], shape, rank, size)
        elif name in live:
            parts = iter([_cut(name, live[name], shape, rank, size)])
        elif module in _HOSTS:
            parts = iter([_stacked_part(name, live, shapes, rank, size)])
        else:
            raise LayoutError(f"the engine has no tensor that holds {name}")
        for piece, tensor in parts:
            if tensor.numel():
                yield name, piece, tensor


def _find_experts(live: Mapping[str, torch.Tensor], path: str, kind: str) -> torch.Tensor:
    # The module in between has had several names, and more than one at a time.
    held = {
        tensor.data_ptr(): tensor
        for key, tensor in live.items()
        if key.startswith(f"{path}.") and key.endswith(f".{_EXPERTS[kind]}")
    }
    if len(held) != 1:
        raise LayoutError(f"the engine has no tensor that holds {path}.{kind}")
    return next(iter(held.values()))


def _expert_parts(
    name: str, tensor: torch.Tensor, shape: Sequence[int], rank: int, size: int
) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Expert parallel gives a worker some experts whole, tensor parallel a slice of every expert."""
    num_experts, rows, _ = shape
    if tensor.shape[1:] == tuple(shape[1:]):
        count, rest = divmod(num_experts, size)
        start, length = rank * count + min(rank, rest), count + (rank < rest)
        if len(tensor) == num_experts:
            start, length = 0, num_experts
        if len(tensor) != length:
            raise _misfit(name, tensor, shape)
        yield Piece(shape=tuple(shape), start=start, length=length), tensor
    elif name.endswith("gate_up_proj"):
        half = tensor.shape[1] // 2
        if (len(tensor), 2 * half * size, tensor.shape[2]) != tuple(shape):
            raise _misfit(name, tensor, shape)
        for first_row, part in zip((0, rows // 2), tensor.split(half, dim=1), strict=True):
            yield Piece(shape=tuple(shape), axis=1, start=first_row + rank * half, length=half), part
    else:
        yield _cut(name, tensor, shape, rank, size)


def _vocabulary_parts(
    name: str, tensor: torch.Tensor, shape: Sequence[int], rank: int, size: int
) -> Iterator[tuple[Piece, torch.Tensor]]:
    rows = len(tensor)
    if rows * size < shape[0] or tensor.shape[1:] != tuple(shape[1:]):
        raise _misfit(name, tensor, shape)
    start = min(rank * rows, shape[0])
    length = min(start + rows, shape[0]) - start
    yield Piece(shape=tuple(shape), start=start, length=length), tensor[:length]


def _stacked_part(
    name: str, live: Mapping[str, torch.Tensor], shapes: Shapes, rank: int, size: int
) -> tuple[Piece, torch.Tensor]:
    path, _, kind = name.rpartition(".")
    owner, _, module = path.rpartition(".")
    host = _HOSTS[module]
    stacked = live.get(f"{owner}.{host}.{kind}")
    parts = [f"{owner}.{part}.{kind}" for part in _STACKED[host]]
    if stacked is None or any(part not in shapes for part in parts):
        raise LayoutError(f"the engine has no tensor that holds {name}")
    rows = [shapes[part][0] for part in parts]
    held = _rows_held(rows, len(stacked), size, attention=host == "qkv_proj")
    if held is None:
        raise LayoutError(f"{owner}.{host}.{kind} has {len(stacked)} rows, which are no part of {sum(rows)}")
    index = parts.index(name)
    begin = sum(held[:index])
    copies = held[index] * size // rows[index]  # workers that hold the same rows
    piece = Piece(shape=tuple(shapes[name]), start=rank // copies * held[index], length=held[index])
    return piece, stacked[begin : begin + held[index]]


def _rows_held(rows: Sequence[int], num_held: int, size: int, *, attention: bool) -> list[int] | None:
    """Of every stacked matrix, the rows in one worker's ``num_held``; None when they cannot be told."""
    if num_held == sum(rows):
        return list(rows)
    if num_held * size == sum(rows) and all(count % size == 0 for count in rows):
        return [count // size for count in rows]
    if not attention or rows[0] % size:
        return None
    # With more workers than key-value heads, each head is on several of them.
    queries, (keys, values) = rows[0] // size, rows[1:]
    held_keys, rest = divmod((num_held - queries) * keys, keys + values)
    held = [queries, held_keys, num_held - queries - held_keys]
    fits = rest == 0 and held_keys > 0 and keys % held_keys == 0 and (held_keys * size) % keys == 0
    return held if fits else None


def _cut(name: str, tensor: torch.Tensor, shape: Sequence[int], rank: int, size: int) -> tuple[Piece, torch.Tensor]:
    """A tensor that is whole on every worker, or cut along one axis into equal parts."""
    whole = tuple(shape) or (1,)
    held = tuple(tensor.shape) or (1,)
    different = [axis for axis in range(len(whole)) if len(held) == len(whole) and held[axis] != whole[axis]]
    if held == whole:
        return Piece.whole(whole), tensor
    if len(different) != 1 or held[different[0]] * size != whole[different[0]]:
        raise _misfit(name, tensor, shape)
    (axis,) = different
    return Piece(shape=whole, axis=axis, start=rank * held[axis], length=held[axis]), tensor


def _misfit(name: str, tensor: torch.Tensor, shape: Sequence[int]) -> LayoutError:
    return LayoutError(f"{name} has shape {tuple(shape)}, but the engine holds {tuple(tensor.shape)}")


def _covers(shape: Sequence[int], pieces: Iterable[Piece]) -> bool:
    """Whether pieces of a tensor leave no gap and do not overlap. They are cut along one axis, all along the same."""
    pieces = list(pieces)
    whole = tuple(shape) or (1,)
    if len({(piece.axis, piece.shape) for piece in pieces}) != 1 or pieces[0].shape != whole:
        return False
    end = 0
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start != end:
            return False
        end += piece.length
    return end == whole[pieces[0].axis]


def absorbed_parts(
    kv_b: torch.Tensor, w_uk_t: torch.Tensor, w_uv: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The matrices that decoding uses in place of kv_b_proj, each with the view of it that it is made of.

    kv_b [H * (nope + v), latent], w_uk_t [H, nope, latent], w_uv [H, latent, v].
    """
    heads, nope, latent = w_uk_t.shape
    rows = kv_b.view(heads, -1, latent)
    return (w_uk_t, rows[:, :nope]), (w_uv, rows[:, nope:].transpose(1, 2))
