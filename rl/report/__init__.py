"""``report.html``: one self-contained page of a run's curves, timeline and trajectories, read back from its directory.

python -m rl.report runs/quickstart
python -m rl.report runs/quickstart runs/second     # one page that compares them
python -m rl.report runs/quickstart --serve         # a page that follows the run while it goes on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rl.report.page import render
from rl.report.run_data import run_data
from rl.report.run_files import RunFiles
from rl.report.samples import Budget
from rl.run_directory import write_whole

__all__ = ["Budget", "build_comparison", "build_report"]


def build_report(run: str | Path, budget: Budget | None = None) -> tuple[Path, tuple[str, ...]]:
    """Writes ``<run>/report.html`` from what the directory holds now.

    Returns its path, and sentences on what was left out or could not be read (they are in the page too).
    Raises :class:`rl.errors.DataError` when there is nothing to report on.
    """
    return _build([Path(run)], Path(run) / "report.html", budget or Budget())


def build_comparison(runs: Sequence[str | Path], page: str | Path) -> tuple[Path, tuple[str, ...]]:
    """Writes one page about several runs, which share the budget of one; otherwise as :func:`build_report`."""
    budget = Budget()
    share = replace(
        budget, sample_bytes=budget.sample_bytes // len(runs), spans=budget.spans // len(runs), steps=budget.steps
    )
    return _build([Path(run) for run in runs], Path(page), share)


def _build(paths: Sequence[Path], page: Path, budget: Budget) -> tuple[Path, tuple[str, ...]]:
    runs = []
    for path in paths:
        files = RunFiles(path)
        files.require_steps()
        runs.append(run_data(files, budget))
    write_whole(page, render(runs))
    return page, tuple(note for run in runs for note in run.notes)
