"""Chooses what a page of a few megabytes carries, and says what it leaves out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.report.run_files import Row, RunFiles, read_rows

NUMBERS = ("rollout_logprobs", "log_ratios", "kept_sizes", "versions")  # streams of one entry a token
FLAGS = ("sampled", "routed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Upper bounds on what the page embeds."""

    steps: int = 1500  # points of a curve
    sample_steps: int = 64  # steps whose trajectories are kept
    sample_bytes: int = 3_000_000  # of trajectories, as JSON
    tokens: int = 4096  # of one trajectory, from its start
    characters: int = 20_000  # of one prompt message, answer or recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """What the page's script reads (plain JSON values), and sentences on what is not in it."""

    metrics: dict[str, Any]  # {"steps": [...], "columns": {name: [number or null, ...]}}
    supervised: dict[str, Any]
    trajectories: list[dict[str, Any]]
    notes: tuple[str, ...]


def embed(files: RunFiles, budget: Budget) -> Embedded:
    """Evenly chosen steps within the budget; the first, the last and the evaluated steps are always among them."""
    notes = []
    if files.skipped_lines:
        notes.append(f"{_count(files.skipped_lines, 'line')} of the metrics could not be read and were skipped.")
    curves = {}
    for name, rows in (("metrics", files.metrics), ("supervised", files.supervised)):
        chosen = _choose_rows(rows, budget.steps)
        if len(chosen) < len(rows):
            notes.append(f"Curves show {len(chosen):,} of {len(rows):,} {name} steps, evenly chosen.")
        curves[name] = _columns(chosen)
    trajectories, trajectory_notes = _choose_trajectories(files, budget)
    return Embedded(**curves, trajectories=trajectories, notes=(*notes, *trajectory_notes))


def to_script_json(value: Any) -> str:
    """JSON that can stand inside a ``<script>`` element whatever text it carries."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    text = text.translate(str.maketrans(escapes))
    return text.encode("utf-8", errors="replace").decode()  # lone surrogates, which JSON lines may hold, become "?"


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    if count <= 1:
        return [items[-1]][:count]
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _choose_rows(rows: list[Row], count: int) -> list[Row]:
    if len(rows) <= count:
        return rows
    evaluated = [row for row in rows if any(name.startswith("eval/") for name in row)]
    chosen = evenly(evaluated, count // 2)
    chosen += evenly(rows, count - len(chosen))
    by_step = {row["step"]: row for row in chosen}
    return [by_step[step] for step in sorted(by_step)]


def _columns(rows: list[Row]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    return {
        "steps": [row["step"] for row in rows],
        "columns": {name: [_finite(row.get(name), 6) for row in rows] for name in names},
    }


def _choose_trajectories(files: RunFiles, budget: Budget) -> tuple[list[dict[str, Any]], list[str]]:
    """Fewer steps until they fit; then, with two steps left, fewer trajectories of each."""
    available = list(files.samples)
    read: dict[int, list[tuple[dict[str, Any], int]]] = {}
    skipped = 0

    def load(step: int) -> list[tuple[dict[str, Any], int]]:
        nonlocal skipped
        if step not in read:
            rows, bad = read_rows(files.samples[step])
            compact = [entry for row in rows if (entry := _compact(row, budget)) is not None]
            skipped += bad + len(rows) - len(compact)
            read[step] = [(entry, len(to_script_json(entry).encode())) for entry in compact]
        return read[step]

    count = min(len(available), budget.sample_steps)
    chosen = evenly(available, count)
    while count > 2 and sum(size for step in chosen for _, size in load(step)) > budget.sample_bytes:
        count = max(count * 4 // 5, 2)
        chosen = evenly(available, count)
    trajectories = []
    for step in chosen:
        left = budget.sample_bytes // len(chosen)
        for entry, size in load(step):
            left -= size
            if left < 0 and count <= 2:
                break
            trajectories.append(entry)
    notes = []
    if skipped:
        notes.append(f"{_count(skipped, 'line')} of the trajectories could not be read and were skipped.")
    if len(chosen) < len(available):
        notes.append(f"Trajectories are those of {len(chosen)} of {len(available):,} recorded steps, evenly chosen.")
    in_files = sum(len(load(step)) for step in chosen)
    if len(trajectories) < in_files:
        notes.append(f"Of {in_files:,} trajectories of these steps, the page holds {len(trajectories):,}.")
    if cut := sum(entry["cut"] > 0 for entry in trajectories):
        notes.append(
            f"{_count(cut, 'trajectory', 'trajectories')} longer than {budget.tokens:,} tokens shown up to there."
        )
    return trajectories, notes


def _compact(row: Row, budget: Budget) -> dict[str, Any] | None:
    """A record of ``samples/step_N.jsonl`` as the page reads it; None when it is not one.

    Flags become strings of 0 and 1, and everything past the token limit is cut (``cut`` counts it).
    """
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(text, str) for text in tokens):
        return None
    kept = min(len(tokens), budget.tokens)
    entry: dict[str, Any] = {
        "step": row["step"],
        "id": str(row.get("id", "")),
        "domain": str(row.get("domain", "")),
        "status": str(row.get("status", "")),
        "reward": _finite(row.get("reward"), 6),
        "advantage": _finite(row.get("advantage"), 6),
        "masked": bool(row.get("masked")),
        "parts": {str(name): _finite(value, 6) for name, value in _mapping(row.get("parts")).items()},
        "messages": [_message(message, budget) for message in row.get("messages") or () if isinstance(message, dict)],
        "answer": None if row.get("answer") is None else _text(row["answer"], budget.characters),
        "cut": len(tokens) - kept,
    }
    for name in ("tokens", *NUMBERS, *FLAGS):
        stream = row.get(name)
        if stream is not None and (not isinstance(stream, list) or len(stream) != len(tokens)):
            return None
        entry[name] = None if stream is None else stream[:kept]
    for name in NUMBERS:
        if entry[name] is not None:
            entry[name] = [_finite(value, 4) for value in entry[name]]
    for name in FLAGS:
        if entry[name] is not None:
            entry[name] = "".join("1" if flag else "0" for flag in entry[name])
    return entry


def _message(message: Mapping[str, Any], budget: Budget) -> dict[str, str]:
    return {
        "role": _text(message.get("role", ""), 40),
        "content": _text(message.get("content", ""), budget.characters),
    }


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _finite(value: Any, digits: int) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
