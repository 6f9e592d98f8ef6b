"""What the page shows of a run, as plain JSON values: all of it once, and what came since while a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rl.report.curves import choose_rows, columns
from rl.report.entries import finite
from rl.report.json_lines import Row
from rl.report.recipe_differences import flat_settings
from rl.report.run_files import RunFiles
from rl.report.samples import Budget, Chosen, choose_samples, counted
from rl.report.spans import running_time, span_columns
from rl.report.tiles import standing, tiles

RECIPE_CHARACTERS = 100_000
SENTENCE_CHARACTERS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """``shown`` is read when the page opens, the rest when somebody looks at it."""

    shown: dict[str, Any]
    spans: dict[str, Any]
    samples: Chosen
    notes: tuple[str, ...]  # what is not in the page, and what could not be read


def run_data(files: RunFiles, budget: Budget) -> RunData:
    """Everything within the budget."""
    chosen = choose_samples(files.samples, budget)
    return _run_data(files, budget, chosen)


def live_data(files: RunFiles, budget: Budget) -> RunData:
    """The same without trajectories and timeline, which :func:`news` brings."""
    return _run_data(files, budget, Chosen(index=[]), spans=False)


def news(files: RunFiles, seen: Mapping[str, int]) -> dict[str, Any]:
    """What came since: of metrics and supervised the rows after a step, of alarms and spans those after a number."""
    return {
        **_head(files),
        "metrics": columns([row for row in files.metrics if row["step"] > seen["metrics"]]),
        "supervised": columns([row for row in files.supervised if row["step"] > seen["supervised"]]),
        "alarms": [_alarm(row) for row in files.alarms[max(seen["alarms"], 0) :]],
        "spans": span_columns(files.spans[max(seen["spans"], 0) :]),
    }


def _run_data(files: RunFiles, budget: Budget, chosen: Chosen, *, spans: bool = True) -> RunData:
    notes = [f"{counted(number, 'line')} of {name} could not be read." for name, number in files.skipped_lines.items()]
    tables = {}
    for name, rows in (("metrics", files.metrics), ("supervised", files.supervised)):
        points = choose_rows(rows, budget.steps)
        tables[name] = columns(points)
        if len(points) < len(rows):
            notes.append(f"Curves show {len(points):,} of {len(rows):,} {name} steps, evenly chosen.")
    shown_spans = files.spans[-budget.spans :] if spans else []
    if spans and len(shown_spans) < len(files.spans):
        notes.append(f"The timeline shows the last {len(shown_spans):,} of {len(files.spans):,} spans.")
    notes += chosen.notes
    shown = {
        **_head(files),
        **tables,
        "name": files.name,
        "recipe": files.recipe[:RECIPE_CHARACTERS],
        "clip": _clip(files.recipe),
        "alarms": [_alarm(row) for row in files.alarms],
        "notes": notes,
    }
    return RunData(shown=shown, spans=span_columns(shown_spans), samples=chosen, notes=tuple(notes))


def _head(files: RunFiles) -> dict[str, Any]:
    metrics, status = files.metrics, files.status
    running_s = running_time(files.spans) if status.get("ended") else None  # while it runs nobody is told
    known = standing(status, metrics, files.supervised, is_running=files.is_running, running_s=running_s)
    return {
        "standing": asdict(known),
        "tiles": [asdict(tile) for tile in tiles(metrics)],
    }


def _clip(recipe: str) -> list[float] | None:
    """[clip_low, clip_high] of the recipe's objective; None where it does not say."""
    settings = dict(flat_settings(recipe))
    try:
        return [float(settings[f"objective.{name}"]) for name in ("clip_low", "clip_high")]
    except (KeyError, ValueError):
        return None


def _alarm(row: Row) -> dict[str, Any]:
    return {
        "step": row["step"],
        "alarm": str(row.get("alarm", ""))[:SENTENCE_CHARACTERS],
        "metric": str(row.get("metric", ""))[:SENTENCE_CHARACTERS],
        "active": row.get("active") is not False,
        "value": finite(row.get("value"), 6),
        "limit": finite(row.get("limit"), 6),
        "sentence": str(row.get("sentence", ""))[:SENTENCE_CHARACTERS],
    }
