"""Metrics as columns over steps, for curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl.report.entries import finite
from rl.report.json_lines import Row
from rl.report.samples import evenly

DIGITS = 6
UNMEASURED_AT_ZERO = ("speed/engines_tokens_per_s", "time/reward_s")
"""Means over what a step generated or scored: 0 where all of its batch came out of the step before."""


def columns(rows: Sequence[Row]) -> dict[str, Any]:
    """``{"steps": [...], "columns": {name: [number or null, ...]}}`` of rows with ascending steps."""
    rows = [_measured(row) for row in rows]
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {
        "steps": [row["step"] for row in rows],
        "columns": {name: [finite(row.get(name), DIGITS) for row in rows] for name in names},
    }


def _measured(row: Row) -> Row:
    """The row without zeros that stand for a mean or a share of nothing, which a curve shows as a gap."""
    shares: dict[str, float] = {}
    for name, value in row.items():
        if name.startswith("reward_share/"):
            shares[_domain(name)] = shares.get(_domain(name), 0.0) + (finite(value, DIGITS) or 0.0)
    empty = {name for name in UNMEASURED_AT_ZERO if row.get(name) == 0}
    empty |= {name for name in row if name.startswith("reward_share/") and shares[_domain(name)] == 0}
    return {name: value for name, value in row.items() if name not in empty}


def _domain(name: str) -> str:
    """``math`` of ``reward_share/math/format``."""
    return name.split("/")[1]


def choose_rows(rows: list[Row], count: int) -> list[Row]:
    """At most ``count``, evenly chosen; the first, the last and, up to half, the evaluated ones are among them."""
    if len(rows) <= count:
        return rows
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    chosen = evenly(evaluated, count // 2)
    chosen += evenly(rows, count - len(chosen))
    by_step = {row["step"]: row for row in chosen}
    return [by_step[step] for step in sorted(by_step)]
