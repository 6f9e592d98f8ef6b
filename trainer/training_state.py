"""The optimizer's state of one rank as named stretches of whole parameters, which any number of ranks can read.

DeepSpeed writes shards that fit the same number of ranks only, by ``torch.save``. Here every rank writes what it alone
holds, fp32 weights and their two moments, as safetensors under ``<what>/<parameter>/<first element>``; a rank reads
what overlaps with what it is to hold, whatever wrote it. Weights of lower precision are the fp32 ones, rounded.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from model.expert_exchange import exchange_of
from rl.errors import DataError

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Consecutive elements of one trained parameter, where the optimizer keeps them."""

    name: str
    start: int  # place of the first one in the flattened whole parameter, with the experts of all ranks
    length: int
    flat: Tensor  # fp32; what the optimizer updates, with other parameters in it
    offset: int  # place of the first one in there

    def view(self, tensor: Tensor) -> Tensor:
        """The piece's part of a tensor that is laid out like ``flat``: that itself, or one of its moments."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.length)

    def key(self, what: str) -> str:
        return f"{what}/{self.name}/{self.start}"


def pieces(module: nn.Module, optimizer: Any, zero_stage: int) -> Iterator[Piece]:
    """What this rank's optimizer updates; ``optimizer`` is DeepSpeed's, or the plain one at stage 0."""
    locate = _PLACES[zero_stage]
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        flat, offset, start, length = locate(parameter, optimizer)
        if exchange := exchange_of(parameter):
            start += exchange.rank * getattr(parameter, "ds_numel", parameter.numel())
        if length:
            yield Piece(name=name, start=start, length=length, flat=flat, offset=offset)


_Place = tuple[Tensor, int, int, int]


def _whole(parameter: nn.Parameter, _: Any) -> _Place:
    return parameter, 0, 0, parameter.numel()


def _in_flat_group(parameter: nn.Parameter, optimizer: Any) -> _Place:
    """Stages 1 and 2: all parameters of a group lie in one tensor, which the ranks cut into equal parts."""
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return parameter, 0, 0, 0  # in another rank's part
    # DeepSpeed runs bfloat16 at stage 1 by a class of its own, with another name for the same.
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return flats[mapping.param_group_index], here.start, there.start, there.numel


def _in_partition(parameter: nn.Parameter, optimizer: Any) -> _Place:
    """Stage 3: every parameter is cut into equal parts, the last of which is padded."""
    group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = getattr(parameter, "ds_zero_partition_rank") * length  # noqa: B009
    left = getattr(parameter, "ds_numel") - start  # noqa: B009
    return optimizer.fp32_partitioned_groups_flat[group], offset, start, max(0, min(length, left))


_PLACES = {0: _whole, 1: _in_flat_group, 2: _in_flat_group, 3: _in_partition}


def moments_of(optimizer: Any, flat: Tensor) -> Mapping[str, Tensor]:
    """The optimizer's state of ``flat``; empty before its first step."""
    plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return plain.state.get(flat, {})


def copy_state(held: Iterable[Piece], optimizer: Any) -> dict[str, Tensor]:
    """Copies of the pieces in host memory, by the names they have in a file."""
    copies: dict[str, Tensor] = {}
    for piece in held:
        state = moments_of(optimizer, piece.flat)
        tensors = {WEIGHT: piece.flat} | {moment: state[moment] for moment in MOMENTS if moment in state}
        for what, tensor in tensors.items():
            copies[piece.key(what)] = piece.view(tensor).to("cpu", copy=True)
    return copies


@torch.no_grad()
def restore_state(held: Iterable[Piece], optimizer: Any, saved: SavedState, num_updates: float) -> None:
    """Fills the pieces from a checkpoint, and the optimizer's count of its updates."""
    plain: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    for piece in held:
        saved.fill(WEIGHT, piece, piece.view(piece.flat))
        if not num_updates:
            continue
        state = plain.state[piece.flat]
        if not state:
            fused = bool(plain.defaults.get("fused"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=piece.flat.device if fused else "cpu")
            state |= {moment: torch.zeros_like(piece.flat) for moment in MOMENTS}
        state["step"].fill_(num_updates)
        for moment in MOMENTS:
            saved.fill(moment, piece, piece.view(state[moment]))


def num_updates(held: Iterable[Piece], optimizer: Any) -> float:
    """How often the optimizer has updated every weight; 0 on a rank that holds none."""
    counts = {float(moments_of(optimizer, piece.flat).get("step", 0.0)) for piece in held}
    assert len(counts) <= 1, f"parameters were updated differently often: {sorted(counts)}"
    return max(counts, default=0.0)


class SavedState:
    """The files that the ranks of a learner wrote, as one state.

    Raises DataError where something that is asked for is missing, or a file is not safetensors.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open = ExitStack()
        self._starts: dict[str, list[int]] = {}  # by "<what>/<parameter>", ascending
        self._files: dict[str, Any] = {}  # by whole key

    def __enter__(self) -> SavedState:
        try:
            paths = sorted(self.directory.glob("rank_*.safetensors"))
            self.headers = [self._add(self._open.enter_context(safetensors.safe_open(path, "pt"))) for path in paths]
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise DataError(f"{self.directory}: a rank's file cannot be read: {error}") from error
        if not self.headers or len(self.headers) != self.headers[0].get("ranks"):
            raise DataError(f"{self.directory} holds the files of {len(self.headers)} learner ranks, not of all")
        for starts in self._starts.values():
            starts.sort()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _add(self, file: Any) -> dict[str, Any]:
        for key in file.keys():  # noqa: SIM118  (not a dict)
            name, _, start = key.rpartition("/")
            self._files[key] = file
            self._starts.setdefault(name, []).append(int(start))
        return json.loads((file.metadata() or {}).get("state", "{}"))

    @property
    def parameters(self) -> set[str]:
        """Names of the parameters that were trained."""
        return {name.partition("/")[2] for name in self._starts if name.startswith(f"{WEIGHT}/")}

    def __contains__(self, key: str) -> bool:
        return key in self._files

    def read(self, key: str) -> Tensor:
        try:
            return self._files[key].get_tensor(key)
        except (KeyError, safetensors.SafetensorError) as error:
            raise DataError(f"{self.directory} holds no {key}") from error

    def fill(self, what: str, piece: Piece, target: Tensor) -> None:
        """Copies what was saved of a stretch of a parameter into ``target``, from as many files as it takes."""
        name, end = f"{what}/{piece.name}", piece.start + piece.length
        starts, place = self._starts.get(name, []), piece.start
        index = max(0, bisect.bisect_right(starts, place) - 1)
        for start in starts[index:]:
            if start > place or place == end:
                break
            key = f"{name}/{start}"
            saved = self._files[key].get_slice(key)
            stop = min(end, start + saved.get_shape()[0])
            if stop > place:
                target[place - piece.start : stop - piece.start].copy_(saved[place - start : stop - start])
                place = stop
        if place < end:
            raise DataError(f"{self.directory}: {name} is not there from element {place} on")
