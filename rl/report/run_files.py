"""Reads a run's directory back, however the run ended."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.errors import DataError
from rl.run_directory import RUNNING

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFiles:
    """What the report is made of. Trajectories stay on disk until they are chosen."""

    path: Path
    status: Mapping[str, Any]  # content of status.json, {} when it is missing
    recipe: str
    metrics: list[Row]  # ascending steps
    supervised: list[Row]
    samples: dict[int, Path]  # step -> samples/step_N.jsonl, ascending
    skipped_lines: int  # of metrics.jsonl and supervised.jsonl

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_run(path: Path) -> RunFiles:
    """Reads everything but trajectories. Lines that are not JSON objects with a step are skipped and counted."""
    if not path.is_dir():
        raise DataError(f"{path} is not a directory; give the directory of a run, for example runs/quickstart")
    metrics, bad_metrics = read_rows(path / "metrics.jsonl")
    supervised, bad_supervised = read_rows(path / "supervised.jsonl")
    if not metrics and not supervised:
        raise DataError(f"{path} holds no metrics to report on: metrics.jsonl is missing, empty or unreadable")
    return RunFiles(
        path=path,
        status=_read_status(path / "status.json"),
        recipe=_read_text(path / "recipe.yaml"),
        metrics=_ascending(metrics),
        supervised=_ascending(supervised),
        samples=_sample_files(path / "samples"),
        skipped_lines=bad_metrics + bad_supervised,
    )


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The objects of a JSONL file that have an integer ``step``, and how many lines were something else."""
    rows: list[Row] = []
    skipped = 0
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        else:
            skipped += 1
    return rows, skipped


def _ascending(rows: list[Row]) -> list[Row]:
    """One row a step; of two rows of one step the later one stands."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _sample_files(folder: Path) -> dict[int, Path]:
    found = {}
    for path in folder.glob("step_*.jsonl"):
        if match := re.fullmatch(r"step_(\d+)\.jsonl", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _read_status(path: Path) -> Mapping[str, Any]:
    try:
        status = json.loads(_read_text(path) or "{}")
    except ValueError:
        return {}
    if not isinstance(status, dict):
        return {}
    return {"status": RUNNING} | status


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
