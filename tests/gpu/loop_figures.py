"""What a run's metrics.jsonl says about speed and learning, in the figures that RESULTS.md wants."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

SPLIT = (
    *("rollout", "handover", "learn", "forward", "backward", "optimizer", "sync"),
    *("learner_idle", "engines_idle", "step", "reward"),
)
SPEED = (
    "tokens_per_s",
    "speed/engines_tokens_per_s",
    "speed/learner_tflops",
    "speed/learner_mfu",
    "memory/learner_gb",
    "memory/engine_gb",
    "mismatch/logprob_abs",
    "mismatch/kl",
)
WARM_UP_STEPS = 2
"""First steps that fill the pipeline and compile kernels; left out of medians where there are others."""
CURVE = ("step", "reward/mean", "accuracy", "eval", "mismatch/kl", "time/step_s")


def figures_of_run(run: Path) -> tuple[dict[str, Any], str]:
    """Medians over the steps after the warm-up, accuracy before and after by domain, and the curve as CSV."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in lines if row["step"] > 0]
    warm = [row for row in steps if row["step"] > WARM_UP_STEPS] or steps
    plain = [row for row in warm if "time/evaluate_s" not in row] or warm
    names = [f"time/{part}_s" for part in SPLIT] + list(SPEED)
    seen: dict[str, Any] = {
        name: statistics.median(row[name] for row in plain) for name in names if all(name in row for row in plain)
    }
    for name in sorted({name for row in lines for name in row if name.startswith("eval/")}):
        scores = [row[name] for row in lines if name in row]
        seen[f"{name} before"], seen[f"{name} after"] = scores[0], scores[-1]
        seen[f"{name} gain, points"] = 100 * (scores[-1] - scores[0])
    seen["steps"] = len(steps)
    return seen, curve(lines)


def curve(lines: list[dict[str, float]]) -> str:
    """CSV with a row a step; accuracy and eval are means over domains, empty where there was none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CURVE)
    for row in lines:
        writer.writerow([_cell(row, name) for name in CURVE])
    return text.getvalue()


def _cell(row: dict[str, float], name: str) -> float | str:
    if name in ("accuracy", "eval"):
        scores = [value for key, value in row.items() if key.startswith(f"{name}/")]
        return statistics.mean(scores) if scores else ""
    return row.get(name, "")
