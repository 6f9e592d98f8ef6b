"""A checkpoint on the disk: ``checkpoints/step_N/``, from which a run goes on exactly as it would have gone on.

    manifest.json          {"format", "step", "metrics": the step's row, "files": {name: {bytes, sha256}}}, written last
    run.json               the recipe, what the driver counts and draws, groups under way, checksums of the weights
    groups.safetensors     the token streams of finished groups that are not trained yet
    rank_R.safetensors     what learner rank R alone held: fp32 weights, moments, generators; none before the first step

``checkpoints/cold_start/step_N/`` is the same of step N of a cold start, and there as long as nothing of reinforcement
learning is saved.

Everything is written beside it and renamed, so a checkpoint is whole or not there. What is not in the manifest is
refused, and nothing that is read can hold code.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rl.durable import FileRecord, damage, read_json, read_tensors, sync_folder, write_json, write_tensors
from rl.errors import DataError
from rl.loop_state import Loop, LoopState
from rl.sample import Prompt

FORMAT = 1
MANIFEST, RUN, GROUPS = "manifest.json", "run.json", "groups.safetensors"
COLD_START = "cold_start"
"""The folder beside the other checkpoints for those of the cold start, whose steps count on their own."""
_OURS = re.compile(r"manifest\.json|run\.json|groups\.safetensors|rank_\d{5}\.safetensors")
_PASSING = re.compile(r"\.rank_\d+\.written(\.partial)?|\.nfs[0-9a-f]+")
"""What a network's file system may show late, or keep: a rank's word that it has written, a file that was deleted while
it was open. None of it is read."""
_READERS = 4
_DAMAGED_KEPT = 2
SHARED_DISK_S = 30.0
"""How long a network's file system may go on telling one node that a file of another one is not there."""


class Damaged(DataError):
    """A checkpoint that is not what was written; the one before it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that was found whole."""

    path: Path
    step: int
    cold_start: bool  # whose step it is; otherwise of reinforcement learning
    recipe: Mapping[str, Any]
    model_dir: Path
    """What the phase's first step started from, and in reinforcement learning what the reference is."""
    sums: Mapping[str, int]
    """Checksums of the weights, as the engines answered them, or the learner in the cold start."""
    faults: Mapping[str, int]
    loop: Mapping[str, Any] | None  # None before the first step of reinforcement learning
    has_learner: bool
    """Whether the learner had trained in this phase; otherwise it starts from ``model_dir``."""

    @property
    def run_path(self) -> Path:
        """The directory of the run that wrote it."""
        return _run_path(self.path.resolve(), cold_start=self.cold_start)

    @property
    def reached(self) -> tuple[int, int]:
        """The last step of reinforcement learning, -1 before there is any, and then that of the cold start."""
        return (-1, self.step) if self.cold_start else (self.step, 0)

    @property
    def moment(self) -> str:
        """``step 7``, or ``cold start step 7``."""
        return moment(self.step, cold_start=self.cold_start)

    def restore(self, loop: Loop, prompts: Sequence[Prompt]) -> int:
        """Puts the loop back to where it stood and returns its next step.

        Raises DataError when a prompt that is under way is not among ``prompts``, or the others have changed.
        """
        if self.loop is not None:
            loop.restore(LoopState.decode(self.loop, read_tensors(self.path / GROUPS), prompts), prompts)
        return self.step + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What the driver has to say of a step; the ranks' files come beside it."""

    step: int
    cold_start: bool = False
    recipe: Mapping[str, Any]
    model_dir: Path
    sums: Mapping[str, int]
    faults: Mapping[str, int]
    loop: LoopState | None = None

    @property
    def num_bytes(self) -> int:
        """About what the driver's files take on the disk."""
        return 0 if self.loop is None else self.loop.num_bytes

    def write(self, partial: Path) -> dict[str, FileRecord]:
        """Writes the driver's files; raises OSError when the disk does not take them."""
        loop, arrays = (None, {}) if self.loop is None else self.loop.encode()
        # A run that is moved or copied takes its own model along.
        run_path = _run_path(partial.absolute(), cold_start=self.cold_start)
        model_dir = self.model_dir.absolute()
        inside = model_dir.is_relative_to(run_path)
        values = {
            "cold_start": self.cold_start,
            "recipe": self.recipe,
            "model_dir": str(model_dir.relative_to(run_path) if inside else model_dir),
            "sums": self.sums,
            "faults": self.faults,
            "loop": loop,
        }
        return {
            RUN: write_json(partial / RUN, values),
            GROUPS: write_tensors(partial / GROUPS, arrays),
        }


def moment(step: int, *, cold_start: bool) -> str:
    """What people call it."""
    return f"cold start step {step}" if cold_start else f"step {step}"


def folder_of(checkpoints: Path, *, cold_start: bool) -> Path:
    """Where the checkpoints of a stage are."""
    return checkpoints / COLD_START if cold_start else checkpoints


def _run_path(path: Path, *, cold_start: bool) -> Path:
    return path.parents[2 if cold_start else 1]


def partial_path(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is written before it counts."""
    return checkpoints / f".step_{step}.partial"


def commit(
    checkpoints: Path, step: int, files: Mapping[str, FileRecord], metrics: Mapping[str, Any]
) -> tuple[Path, int]:
    """Makes what was written at :func:`partial_path` the checkpoint of ``step``; returns its path and its bytes.

    Raises OSError when the disk does not take it, or lacks a file that another node says it has written.
    """
    partial, path = partial_path(checkpoints, step), checkpoints / f"step_{step}"
    for name, record in files.items():
        _await_file(partial / name, record)
    values = {name: float(value) for name, value in metrics.items()}  # numpy's too
    records = {name: asdict(record) for name, record in files.items()}
    manifest = {"format": FORMAT, "step": step, "metrics": values, "files": records}
    written = write_json(partial / MANIFEST, manifest)
    sync_folder(partial)
    discard(path)
    os.rename(partial, path)
    for folder in (checkpoints, checkpoints.parent):  # which may be as new
        sync_folder(folder)
    return path, written.bytes + sum(record.bytes for record in files.values())


def adopt(saved: Saved, run_path: Path, recipe: Mapping[str, Any]) -> Saved:
    """Another run's checkpoint as one of the run at ``run_path``, whose ``recipe`` it says from now on.

    The other run may delete its own. Files are shared where the disk has hard links: none of a checkpoint is ever
    written to. Raises OSError when the disk does not take it, and DataError when it is gone meanwhile.
    """
    checkpoints = folder_of(run_path / "checkpoints", cold_start=saved.cold_start)
    partial = partial_path(checkpoints, saved.step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    manifest = _read_manifest(saved.path)
    records = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    for name in records.keys() - {RUN}:
        _share(saved.path / name, partial / name)
    values = read_json(saved.path / RUN) | {"recipe": recipe, "model_dir": str(saved.model_dir.absolute())}
    records[RUN] = write_json(partial / RUN, values)
    path, _ = commit(checkpoints, saved.step, records, manifest["metrics"])
    return replace(saved, path=path, recipe=recipe)


def _share(source: Path, path: Path) -> None:
    try:
        os.link(source, path)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, path)
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _await_file(path: Path, record: FileRecord) -> None:
    """Returns when this node sees what another one has written; a disk of several nodes may show it a little later."""
    ends = time.monotonic() + SHARED_DISK_S
    while True:
        with suppress(FileNotFoundError), open(path, "rb") as file:  # opening asks a disk that is far away anew
            if os.fstat(file.fileno()).st_size == record.bytes:
                return
        if time.monotonic() > ends:
            raise OSError(errno.ENOENT, f"{path.name} was written elsewhere; put runs on a disk that all nodes see")
        time.sleep(0.2)


def steps_saved(checkpoints: Path) -> list[int]:
    """Steps with a checkpoint, whole or not, ascending."""
    names = (path.name.removeprefix("step_") for path in checkpoints.glob("step_*"))
    return sorted(int(name) for name in names if name.isdigit())


def discard(path: Path) -> None:
    """Deletes a checkpoint; one that is killed on the way leaves nothing that looks like a checkpoint."""
    if path.exists():
        dying = path.with_name(f".{path.name}.deleted")
        shutil.rmtree(dying, ignore_errors=True)
        os.rename(path, dying)
        shutil.rmtree(dying, ignore_errors=True)


def sweep(checkpoints: Path) -> None:
    """Deletes what an earlier process left half written or half deleted."""
    for folder in (checkpoints, checkpoints / COLD_START):
        for path in [*folder.glob(".*.partial"), *folder.glob(".*.deleted")]:
            shutil.rmtree(path, ignore_errors=True)


def discard_later(checkpoints: Path, saved: Saved) -> None:
    """Deletes what was saved after ``saved``."""
    for path in newest_first(checkpoints):
        if path.resolve() == saved.path.resolve():
            break
        discard(path)


def set_aside(damaged: Mapping[Path, str]) -> tuple[str, ...]:
    """Renames damaged checkpoints to ``.step_N.damaged``, where they do not count and the last few can be looked at: a
    disk that could not be read for a moment has damaged nothing. Returns a sentence about each."""
    sentences = []
    for path, sentence in damaged.items():
        aside = path.with_name(f".{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        try:
            os.rename(path, aside)
            os.utime(aside)
            sentences.append(f"{sentence}; set aside as {aside.name}")
        except OSError:  # it stays where it is, and is met again
            sentences.append(sentence)
    for folder in {path.parent for path in damaged}:
        asides = sorted(folder.glob(".step_*.damaged"), key=os.path.getmtime)
        for aside in asides[:-_DAMAGED_KEPT]:
            shutil.rmtree(aside, ignore_errors=True)
    return tuple(sentences)


def prune(checkpoints: Path, *, keep: int, best: str | None) -> None:
    """Deletes all checkpoints but the ``keep`` latest and the one whose metric ``best`` is the highest."""
    steps = steps_saved(checkpoints)
    kept = set(steps[-keep:])
    if best is not None:
        scores = {step: metrics_of(checkpoints / f"step_{step}").get(best) for step in steps}
        known = {step: score for step, score in scores.items() if score is not None and math.isfinite(score)}
        if known:
            kept.add(max(known, key=lambda step: (known[step], step)))
    for step in set(steps) - kept:
        discard(checkpoints / f"step_{step}")


def metrics_of(path: Path) -> dict[str, float]:
    """The row of metrics of a checkpoint's step; empty when it cannot be read."""
    try:
        return dict(read_json(path / MANIFEST)["metrics"])
    except (DataError, KeyError, TypeError, ValueError):
        return {}


@dataclass(slots=True)
class Search:
    """The newest whole checkpoint, and a sentence about each newer one that is not whole."""

    found: Saved | None = None
    damaged: dict[Path, str] = field(default_factory=dict)


def newest(checkpoints: Path) -> Search:
    """Raises DataError for a checkpoint with files in it that Keel does not write."""
    search = Search()
    for path in newest_first(checkpoints):
        try:
            search.found = read(path)
            break
        except Damaged as error:
            search.damaged[path] = str(error)
    return search


def newest_first(checkpoints: Path) -> list[Path]:
    """Every checkpoint, whole or not; those of the cold start after all others, as they are older."""
    folders = (checkpoints, checkpoints / COLD_START)
    return [folder / f"step_{step}" for folder in folders for step in reversed(steps_saved(folder))]


def read(path: Path) -> Saved:
    """Checks every byte of a checkpoint, and reads what the driver wrote.

    Raises:
        Damaged: a file is missing, truncated or changed.
        DataError: there are files that Keel does not write, or another version of Keel wrote it.
    """
    _refuse_foreign(path)
    manifest = _read_manifest(path)
    records = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    if problem := next(_damages(path, records), ""):
        raise Damaged(f"{path} is damaged: {problem}")
    values = read_json(path / RUN)
    cold_start = values.get("cold_start", False)
    return Saved(
        path=path,
        step=manifest["step"],
        cold_start=cold_start,
        recipe=values["recipe"],
        model_dir=_run_path(path.absolute(), cold_start=cold_start) / values["model_dir"],
        sums=values["sums"],
        faults=values["faults"],
        loop=values["loop"],
        has_learner=any(name.startswith("rank_") for name in records),
    )


def _refuse_foreign(path: Path) -> None:
    foreign = sorted(str(one.relative_to(path)) for one in path.rglob("*") if not _is_ours(one, path))
    if foreign:
        raise DataError(
            f"{path} holds {foreign[0]}, which Keel does not write: its checkpoints are JSON and safetensors, and no "
            "file that could hold code is opened; delete the checkpoint or take another one by resume=PATH"
        )


def _is_ours(one: Path, path: Path) -> bool:
    known = _OURS.fullmatch(one.name) or _PASSING.fullmatch(one.name)
    return one.parent == path and one.is_file() and not one.is_symlink() and known is not None


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = read_json(path / MANIFEST)
        version = manifest["format"]
        well_formed = isinstance(manifest["step"], int) and all(
            record.keys() == {"bytes", "sha256"} for record in manifest["files"].values()
        )
    except (DataError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{path} is damaged: {MANIFEST} cannot be read") from error
    if version != FORMAT:
        raise DataError(f"{path} has format {version}, and this version of Keel reads format {FORMAT}")
    names = {one.name for one in path.iterdir() if not _PASSING.fullmatch(one.name)} - {MANIFEST}
    if not well_formed or names != manifest["files"].keys():
        raise Damaged(f"{path} is damaged: its files are not those of {MANIFEST}")
    return manifest


def _damages(path: Path, records: Mapping[str, FileRecord]) -> Iterator[str]:
    def check(one: tuple[str, FileRecord]) -> str:
        return damage(path / one[0], one[1])

    with ThreadPoolExecutor(_READERS) as readers:
        yield from filter(None, readers.map(check, _smallest_first(records)))


def _smallest_first(records: Mapping[str, FileRecord]) -> Iterable[tuple[str, FileRecord]]:
    return sorted(records.items(), key=lambda one: one[1].bytes)
