"""Metrics as columns over steps, for curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl.report.entries import finite
from rl.report.json_lines import Row
from rl.report.samples import evenly

DIGITS = 6


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """``{"steps": [...], "columns": {name: [number or null, ...]}}`` of rows with ascending steps."""
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {
        "steps": [row["step"] for row in rows],
        "columns": {name: [finite(row.get(name), DIGITS) for row in rows] for name in names},
    }


def choose_rows(rows: list[Row], count: int) -> list[Row]:
    """At most ``count``, evenly chosen; the first, the last and, up to half, the evaluated ones are among them."""
    if len(rows) <= count:
        return rows
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    chosen = evenly(evaluated, count // 2)
    chosen += evenly(rows, count - len(chosen))
    by_step = {row["step"]: row for row in chosen}
    return [by_step[step] for step in sorted(by_step)]
