"""The timeline of actors as columns: what ``timeline.jsonl`` says in a fraction of its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl.report.json_lines import Row

LONGEST_DETAIL = 200  # characters


def span_columns(rows: Sequence[Row]) -> dict[str, Any]:
    """One entry a span in ``actor``, ``phase`` and ``detail`` (places in ``names``), ``begin`` and ``length`` (whole
    milliseconds) and ``step`` (null where it belongs to none)."""
    places: dict[str, int] = {}

    def place(text: Any) -> int:
        name = text[:LONGEST_DETAIL] if isinstance(text, str) else ""
        return places.setdefault(name, len(places))

    return {
        "actor": [place(row["actor"]) for row in rows],
        "phase": [place(row["phase"]) for row in rows],
        "detail": [place(row.get("detail")) for row in rows],
        "begin": [round(1000 * row["begin"]) for row in rows],
        "length": [max(round(1000 * (row["end"] - row["begin"])), 0) for row in rows],
        "step": [row["step"] if type(row.get("step")) is int else None for row in rows],
        "names": list(places),
    }
