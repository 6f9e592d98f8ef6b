"""Weights & Biases, for a recipe with ``wandb.project``: the same metrics there under the same names.

The package is not among Keel's requirements. What goes out are metrics and the recipe, not samples, code or output; the
key is the package's own business (``wandb login`` or ``WANDB_API_KEY``) and never part of a recipe.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import yaml

from rl.config import Recipe
from rl.errors import RecipeError
from rl.plugin import describe
from rl.progress import Progress
from rl.run_directory import FINISHED, RunDirectory


def check_wandb(recipe: Recipe) -> None:
    """Raises RecipeError for a recipe that wants Weights & Biases where the package is not installed."""
    if recipe.wandb.project is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # a folder that offline runs left behind looks like a package without one
        raise RecipeError(
            f"wandb.project is {recipe.wandb.project}, but the package wandb is not installed; pip install wandb, "
            "or leave wandb.project out"
        )


@contextmanager
def mirrored(recipe: Recipe, run: RunDirectory, progress: Progress) -> Iterator[None]:
    """While the block runs, what the run logs goes to Weights & Biases too, if the recipe says so.

    Raises RecipeError when that cannot be begun. What fails later costs a warning, not the run.
    """
    if recipe.wandb.project is None:
        yield
        return
    mirror = _Mirror(_opened(recipe, run), progress)
    run.mirror_to(mirror.log)
    try:
        yield
    finally:
        mirror.close(failed=run.status.status != FINISHED)


def _opened(recipe: Recipe, run: RunDirectory) -> Any:
    check_wandb(recipe)
    wandb: Any = importlib.import_module("wandb")
    use = recipe.wandb
    try:
        return wandb.init(
            project=use.project,
            entity=use.entity,
            group=use.group,
            tags=list(use.tags),
            name=recipe.name,
            mode=None if use.mode is None else str(use.mode),  # None leaves it to WANDB_MODE
            dir=str(run.path),
            id=_id(run),
            resume="allow",
            config=yaml.safe_load(run.recipe.read_text(encoding="utf-8")),
            # Its metadata would hold the command line, with whatever was typed there.
            settings=wandb.Settings(
                silent=True, console="off", disable_code=True, disable_git=True, x_disable_meta=True
            ),
        )
    except Exception as error:
        raise RecipeError(f"wandb.project {use.project} cannot be used: {describe(error)}") from error


def _id(run: RunDirectory) -> str:
    """The same for a run that is resumed, another for every other run."""
    return hashlib.sha256(f"{run.path.resolve()} {run.status.started}".encode()).hexdigest()[:16]


class _Mirror:
    def __init__(self, remote: Any, progress: Progress) -> None:
        self._remote = remote
        self._progress = progress
        self._broken = False
        self._drawn: set[str] = set()  # names that the package knows to draw over their own step

    def log(self, metrics: Mapping[str, float], prefix: str) -> None:
        if self._broken:
            return
        try:
            for name in metrics.keys() - {"step"}:
                if prefix + name not in self._drawn:
                    self._remote.define_metric(prefix + name, step_metric=f"{prefix}step")
                    self._drawn.add(prefix + name)
            self._remote.log({f"{prefix}{name}": value for name, value in metrics.items()})
        except Exception as error:
            self._broken = True
            self._progress.warn(f"Weights & Biases gets no more metrics of this run: {describe(error)}")

    def close(self, *, failed: bool) -> None:
        try:
            self._remote.finish(exit_code=int(failed))
        except Exception as error:
            self._progress.warn(f"the run at Weights & Biases was not closed: {describe(error)}")
