"""Reads a run's directory back, however the run ended, and again while it goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl.errors import DataError
from rl.report.json_lines import JsonLines, Row
from rl.run_directory import RUNNING
from rl.run_lock import is_held


class RunFiles:
    """What a report is made of. Trajectories stay on disk until chosen. Raises DataError without a directory."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise DataError(f"{path} is not a directory; give the directory of a run, for example runs/quickstart")
        self.path = path
        self._metrics = JsonLines(path / "metrics.jsonl")
        self._supervised = JsonLines(path / "supervised.jsonl")
        self._alarms = JsonLines(path / "alarms.jsonl")
        self._spans = JsonLines(path / "timeline.jsonl", valid=_is_span)
        self.refresh()

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def metrics(self) -> list[Row]:
        """One row a step, ascending."""
        return _ascending(self._metrics.rows)

    @property
    def supervised(self) -> list[Row]:
        return _ascending(self._supervised.rows)

    @property
    def alarms(self) -> list[Row]:
        """What ``rl.alarms`` writes where an alarm starts or clears, in that order."""
        return self._alarms.rows

    @property
    def spans(self) -> list[Row]:
        """What actors did, as ``rl.timeline`` writes it, in the order in which it ended."""
        return self._spans.rows

    @property
    def skipped_lines(self) -> dict[str, int]:
        """Lines that could not be read, by the file's name."""
        files = (self._metrics, self._supervised, self._alarms, self._spans)
        return {lines.path.name: lines.skipped for lines in files if lines.skipped}

    @property
    def recipe(self) -> str:
        return _read_text(self.path / "recipe.yaml")

    @property
    def status(self) -> Mapping[str, Any]:
        """Content of status.json; {} when it is missing."""
        try:
            status = json.loads(_read_text(self.path / "status.json") or "{}")
        except ValueError:
            return {}
        return {"status": RUNNING} | status if isinstance(status, dict) else {}

    @property
    def is_running(self) -> bool:
        """Whether it goes on, on this machine. One that was killed, or runs elsewhere, does not say."""
        return self.status.get("status") == RUNNING and is_held(self.path)

    @property
    def samples(self) -> dict[int, Path]:
        """step -> samples/step_N.jsonl, ascending."""
        found = {}
        for path in (self.path / "samples").glob("step_*.jsonl"):
            if match := re.fullmatch(r"step_(\d+)\.jsonl", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def refresh(self) -> bool:
        """Reads what was appended; False if a file was replaced, so that what is known of it no longer holds."""
        files = (self._metrics, self._supervised, self._alarms, self._spans)
        told = len(self._metrics.rows)
        changed = [lines.path.name for lines in files if not lines.read()]
        steps = [row["step"] for row in self._metrics.rows[max(told - 1, 0) :]]
        return not changed and steps == sorted(set(steps))  # a run that was resumed may do steps again

    def require_steps(self) -> None:
        """Raises DataError when there is nothing to report on."""
        if not self._metrics.rows and not self._supervised.rows:
            raise DataError(f"{self.path} holds no metrics to report on: metrics.jsonl is missing, empty or unreadable")


def _is_span(row: Row) -> bool:
    times = row.get("begin"), row.get("end")
    named = isinstance(row.get("actor"), str) and isinstance(row.get("phase"), str)
    return named and all(isinstance(time, int | float) and abs(time) < 1e12 for time in times)


def _ascending(rows: list[Row]) -> list[Row]:
    """One row a step; of two rows of one step the later one stands."""
    by_step = {row["step"]: row for row in rows}
    return [by_step[step] for step in sorted(by_step)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
