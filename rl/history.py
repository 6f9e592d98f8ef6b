"""What a run has logged, cut back to the step that it goes on from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]  (protobuf builds it when imported)
from tensorboard.summary.writer.record_writer import RecordWriter

_MODELS = ("initial_model", "indexer_warmup", "cold_start", "model")
"""What a run writes beside its place first, in ``.NAME.*``; other hidden folders are not ours."""
SUPERVISED = "supervised/"
"""What the TensorBoard names of the cold start begin with; its steps count on their own."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; a last line that was cut off by the end of its process is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def cut_rows(path: Path, step: int) -> None:
    """Leaves the rows up to ``step``, and no half of a row; no file without a row."""
    if not path.exists():
        return
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)[: len(read_rows(path))]
    kept = b"".join(line for line in lines if json.loads(line)["step"] <= step)
    if not kept:
        path.unlink()
    elif kept != content:
        _replace(path, kept)


def cut_samples(folder: Path, step: int) -> None:
    """Leaves the trajectories of steps up to ``step``."""
    for path in folder.glob("step_*.jsonl"):
        number = path.stem.removeprefix("step_")
        if number.isdigit() and int(number) > step:
            path.unlink()


def cut_events(folder: Path, step: int, *, cold_step: int | None = None) -> None:
    """Leaves TensorBoard's events up to ``step``, and of the cold start those up to ``cold_step``, or all."""
    for path in folder.glob("events.out.tfevents.*"):
        records = list(RawEventFileLoader(str(path)).Load())
        kept = [record for record in records if _is_kept(Event.FromString(record), step, cold_step)]
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as file:
            writer = RecordWriter(file)
            for record in kept:
                writer.write(record)
        os.replace(partial, path)


def sweep(folder: Path) -> None:
    """Removes models that an earlier process was writing when it ended, from beside the place they were meant for."""
    for name in _MODELS:
        for path in folder.glob(f".{name}.*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)


def clear(folder: Path) -> None:
    """Removes everything that a run has left in its directory, but for what is hidden."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _is_kept(event: Any, step: int, cold_step: int | None) -> bool:
    tags = [value.tag for value in event.summary.value]
    if not tags:  # the head of a file
        return True
    if all(tag.startswith(SUPERVISED) for tag in tags):
        return cold_step is None or event.step <= cold_step
    return event.step <= step


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content)
    os.replace(partial, path)
