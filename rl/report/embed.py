"""Chooses what a page of a few megabytes carries, and says what it leaves out."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.report.run_files import Row, RunFiles, read_rows

NUMBERS = ("rollout_logprobs", "log_ratios", "kept_sizes", "versions")  # streams of one entry a token
FLAGS = ("sampled", "routed")
FEW_STEPS = 16  # below this many steps, rather show fewer trajectories of each


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


class _Samples:
    """Compact trajectories by step, read when they are first asked for."""

    def __init__(self, files: RunFiles, budget: Budget) -> None:
        self.steps = list(files.samples)
        self.skipped = 0  # lines that hold no trajectory
        self._files = files.samples
        self._budget = budget
        self._read: dict[int, list[tuple[dict[str, Any], int]]] = {}
        self._density = self._embedded_per_stored_byte()

    def read(self, step: int) -> list[tuple[dict[str, Any], int]]:
        """Its trajectories, each with its bytes as JSON."""
        if step not in self._read:
            rows, bad = read_rows(self._files[step])
            entries = [entry for row in rows if (entry := _compact(row, self._budget)) is not None]
            self.skipped += bad + len(rows) - len(entries)
            self._read[step] = [(entry, len(to_script_json(entry).encode())) for entry in entries]
        return self._read[step]

    def estimate(self, step: int, per_step: int) -> float:
        """Bytes of its first ``per_step`` trajectories, guessed from the size of the file."""
        share = min(per_step / max(len(self.read(self.steps[-1])), 1), 1.0)
        return self._files[step].stat().st_size * self._density * share

    def size(self, step: int, per_step: int) -> int:
        return sum(size for _, size in self.read(step)[:per_step])

    def _embedded_per_stored_byte(self) -> float:
        if not self.steps:
            return 0.0
        last = self.steps[-1]
        return self.size(last, sys.maxsize) / max(self._files[last].stat().st_size, 1)


def _plans(num_steps: int, most: int) -> Iterator[tuple[int, int]]:
    """(steps, trajectories of each), from the most to the fewest: rather many steps than every sibling."""
    steps = min(num_steps, most)
    while steps > FEW_STEPS:
        yield steps, sys.maxsize
        steps = steps * 4 // 5
    yield from ((steps, per_step) for per_step in (sys.maxsize, 8, 4, 2))
    while steps > 2:
        steps = max(steps * 2 // 3, 2)
        yield steps, 2
    yield min(steps, 2), 1


def _choose_trajectories(files: RunFiles, budget: Budget) -> tuple[list[dict[str, Any]], list[str]]:
    samples = _Samples(files, budget)
    chosen, per_step = [], 0
    for count, per_step in _plans(len(samples.steps), budget.sample_steps):
        chosen = evenly(samples.steps, count)
        if sum(samples.estimate(step, per_step) for step in chosen) > budget.sample_bytes:
            continue  # do not read what will hardly fit
        if sum(samples.size(step, per_step) for step in chosen) <= budget.sample_bytes:
            break
    trajectories, left = [], budget.sample_bytes
    for entry, size in (pair for step in chosen for pair in samples.read(step)[:per_step]):
        if size <= left:  # false only when not even the last plan fits
            trajectories.append(entry)
            left -= size
    notes = []
    if samples.skipped:
        notes.append(f"{_count(samples.skipped, 'line')} of the trajectories could not be read and were skipped.")
    if len(chosen) < len(samples.steps):
        notes.append(
            f"Trajectories are those of {len(chosen)} of {len(samples.steps):,} recorded steps, evenly chosen."
        )
    in_files = sum(len(samples.read(step)) for step in chosen)
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
        "answer": _answer(row.get("answer"), budget),
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


def _answer(answer: Any, budget: Budget) -> str | None:
    """The answer alone, where a reward needs a whole entry around it (reasoning_gym)."""
    if isinstance(answer, dict):
        answer = answer.get("answer", answer)
    return None if answer is None else _text(answer, budget.characters)


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
