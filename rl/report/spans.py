"""The timeline of actors as columns: what ``timeline.jsonl`` says in a fraction of its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl.report.json_lines import Row

LONGEST_DETAIL = 200  # characters


def running_time(rows: Sequence[Row]) -> float | None:
    """Seconds that a run of several sittings has run in all; None of one in a single sitting, or without a timeline.

    The timeline's clock stands still between sittings. Where its older half was dropped, the first one is not in it.
    """
    begins = [row["begin"] for row in rows if (row["actor"], row["phase"]) == ("driver", "start")]
    if not rows or (begins and all(row["end"] > max(begins) for row in rows)):
        return None
    return max(row["end"] for row in rows)


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
