"""``report.html``: one self-contained page of a run's curves and trajectories, read back from its directory.

python -m rl.report runs/quickstart
"""

from __future__ import annotations

from pathlib import Path

from rl.report.embed import Budget, embed
from rl.report.page import render
from rl.report.run_files import read_run
from rl.run_directory import write_whole

__all__ = ["Budget", "build_report"]


def build_report(run: str | Path, budget: Budget | None = None) -> tuple[Path, tuple[str, ...]]:
    """Writes ``<run>/report.html`` from what the directory holds now.

    Returns its path, and sentences on what was left out or could not be read (they are in the page too).
    Raises :class:`rl.errors.DataError` when there is nothing to report on.
    """
    files = read_run(Path(run))
    data = embed(files, budget or Budget())
    page = files.path / "report.html"
    write_whole(page, render(files, data))
    return page, data.notes
