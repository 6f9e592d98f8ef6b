"""How a run begins: afresh, after the last checkpoint in its directory, or from another run's checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl import checkpoint
from rl.checkpoint import MANIFEST, Saved
from rl.config import RESUME_AUTO, RESUME_NEVER, Recipe
from rl.data import RunData
from rl.demonstrations import fingerprint
from rl.errors import DataError, RecipeError, RunStopped
from rl.history import read_rows
from rl.progress import Progress
from rl.recipe import to_plain, to_yaml
from rl.run_directory import FINISHED, RunDirectory, describe, read_status
from rl.run_lock import RunLock
from rl.system import System

_FIXED = re.compile(
    r"seed|prompts_per_step|model\.(?!path$).*|supervised\.(?!demonstrations|threads).*|evaluation\.num_prompts"
    r"|rollout\.max_staleness|learner\.indexer|sampling\.(temperature|top_p|top_k|min_p)"
    r"|domains\.[^.]+(\.(weight|thinking|system|prompt_style|group_size))?"
)
"""Keys whose old value is in what was saved: draws, groups under way, weights. Every other one may change; prompts and
models may lie elsewhere, and are compared by what they hold."""
_SILENT = ("name", "runs", "resume", "steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """A run directory that is ours now, and where to begin."""

    run: RunDirectory
    saved: Saved | None = None
    is_old: bool = False  # whether the directory held a run before
    sentences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def tell(self, progress: Progress) -> None:
        """Shows where the run goes on."""
        for sentence in self.warnings:
            progress.warn(sentence)
        for sentence in self.sentences:
            progress.say(sentence)
        if self.saved is not None:
            step, cold_step = self.saved.reached
            progress.resume(max(0, step), self.run.rows(), cold_step=cold_step)


def open_run(recipe: Recipe, data: RunData) -> Resumption:
    """Claims the run's directory, as ``resume`` says.

    A PATH that the run in the directory has begun from already means ``auto``: whoever types a command again, as Slurm
    and Ray do, wants the run to go on.

    Raises:
        RecipeError: the directory holds what cannot be resumed, or another process writes it, or the recipe has changed
            where it must not.
        DataError: no checkpoint is whole, or one holds what Keel does not write; or the prompts are others.
    """
    path = Path(recipe.runs) / recipe.name
    status = read_status(path)
    if recipe.resume not in (RESUME_NEVER, RESUME_AUTO):
        if status is None or status.origin != _origin(recipe):
            return _from_elsewhere(recipe, data, path)
    elif recipe.resume == RESUME_NEVER or (status is None and not checkpoint.newest_first(path / "checkpoints")):
        return Resumption(run=RunDirectory.create(path, recipe=to_yaml(recipe)))
    with _locked(path) as lock:
        return _continued(recipe, data, path, lock)


@contextmanager
def _locked(path: Path) -> Iterator[RunLock]:
    """A lock that is kept, unless the block raises."""
    lock = RunLock(path)
    try:
        yield lock
    except BaseException:
        lock.release()
        raise


def _continued(recipe: Recipe, data: RunData, path: Path, lock: RunLock) -> Resumption:
    status = read_status(path)
    search = checkpoint.newest(path / "checkpoints")
    saved, finished = search.found, status is not None and status.status == FINISHED
    trained = saved if saved and not saved.cold_start else None
    if finished and (trained is None or trained.step >= recipe.steps):
        more = "" if trained is None else f", raise steps above {trained.step} to go on with it"
        raise RecipeError(f"{path} already holds {describe(path)}; choose another name=...{more} or delete it")
    if saved is None and search.damaged:
        told = next(iter(search.damaged.values()))
        raise DataError(f"{told}, and no other is whole; delete {path} or choose another name=...")
    checkpoint.sweep(path / "checkpoints")
    if saved is None:
        return _started_again(recipe, data, path, lock)
    changes = _check(recipe, data, saved, path)
    if (origin := _origin(recipe)) is not None:
        changes = (*changes, f"has begun from {origin} before, so resume means auto")
    return _take_over(recipe, path, lock, saved, changes, checkpoint.set_aside(search.damaged))


def _started_again(recipe: Recipe, data: RunData, path: Path, lock: RunLock) -> Resumption:
    """A run of which nothing is saved, from its model, or from the other run that it was to begin from."""
    status, rows = read_status(path), read_rows(path / "metrics.jsonl")
    if rows and rows[-1]["step"] > 0:
        raise RecipeError(
            f"{path} holds metrics up to step {rows[-1]['step']} but no checkpoint to go on from; choose another "
            "name=..., or delete it to begin again"
        )
    if status is None or status.origin is None:
        run = RunDirectory.resume(path, recipe=to_yaml(recipe), step=None, lock=lock)
        sentence = f"{path} holds no checkpoint; the run starts afresh"
        return Resumption(run=run, is_old=True, sentences=(sentence,))
    search = _search(Path(status.origin))
    changes = _check(recipe, data, search.found, path)
    run = RunDirectory.resume(path, recipe=to_yaml(recipe), step=None, lock=lock)
    return replace(_branch(recipe, run, search, changes), is_old=True)


def _from_elsewhere(recipe: Recipe, data: RunData, path: Path) -> Resumption:
    """From the checkpoint, or the newest one of the run, that ``resume`` names; one of the same run rewinds it."""
    search = _search(Path(recipe.resume))
    saved, origin = search.found, _origin(recipe)
    changes = _check(recipe, data, saved, path)
    if saved.run_path == path.resolve():
        with _locked(path) as lock:
            warnings = checkpoint.set_aside(search.damaged)
            checkpoint.discard_later(path / "checkpoints", saved)
            return _take_over(recipe, path, lock, saved, changes, warnings, origin)
    run = RunDirectory.create(path, recipe=to_yaml(recipe), origin=origin)
    try:
        return _branch(recipe, run, search, changes)
    except BaseException:
        run.discard()
        raise


def _origin(recipe: Recipe) -> str | None:
    """The PATH that ``resume`` names."""
    return None if recipe.resume in (RESUME_NEVER, RESUME_AUTO) else str(Path(recipe.resume).resolve())


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint to begin from, and newer ones that are not whole, each with a sentence."""

    found: Saved
    damaged: Mapping[Path, str]


def _search(source: Path) -> _Found:
    if (source / MANIFEST).exists() or source.name.startswith("step_"):
        if not source.is_dir():
            raise RecipeError(f"resume: there is no checkpoint {source}")
        return _Found(checkpoint.read(source), {})
    search = checkpoint.newest(source / "checkpoints")
    if search.found is None:
        raise RecipeError(f"resume: {source} holds no checkpoint that is whole")
    return _Found(search.found, search.damaged)


def _branch(recipe: Recipe, run: RunDirectory, search: _Found, changes: tuple[str, ...]) -> Resumption:
    """A run that has another one's checkpoint as its first."""
    source = search.found
    try:
        saved = checkpoint.adopt(_with_model(source, recipe), run.path, to_plain(recipe))
    except OSError as error:
        raise RecipeError(f"{source.path} cannot be copied to {run.path}: {error.strerror}") from error
    sentences = (f"starts after {source.moment} of {source.path}", *changes)
    return Resumption(run=run, saved=saved, sentences=sentences, warnings=tuple(search.damaged.values()))


def _take_over(
    recipe: Recipe,
    path: Path,
    lock: RunLock,
    saved: Saved,
    changes: tuple[str, ...],
    warnings: tuple[str, ...],
    origin: str | None = None,
) -> Resumption:
    step, cold_step = saved.reached
    run = RunDirectory.resume(path, recipe=to_yaml(recipe), step=step, cold_step=cold_step, lock=lock, origin=origin)
    steps = recipe.supervised.steps if saved.cold_start else recipe.steps
    sentence = f"goes on after {saved.moment} of {steps}, from {saved.path}"
    saved = _with_model(saved, recipe)
    return Resumption(run=run, saved=saved, is_old=True, sentences=(sentence, *changes), warnings=warnings)


def _check(recipe: Recipe, data: RunData, saved: Saved, path: Path) -> tuple[str, ...]:
    """A sentence about what has changed; raises RecipeError or DataError for what must not."""
    if saved.step > recipe.steps and not saved.cold_start:
        raise RecipeError(f"steps is {recipe.steps}, but {saved.path} is already that of step {saved.step}; raise it")
    changes = list(_changes(saved.recipe, to_plain(recipe)))
    for key, before, now in changes:
        if _FIXED.fullmatch(key):
            raise RecipeError(
                f"{path} cannot go on with another {key}: it was {_shown(before)} and is {_shown(now)} now; put "
                "it back, or choose another name=..."
            )
    if saved.loop is not None:
        _check_data(saved, saved.loop["values"], data)
    told = [f"{key} {_shown(before)} -> {_shown(now)}" for key, before, now in changes if key not in _SILENT]
    return (f"from here on with {', '.join(told)}",) if told else ()


def _check_data(saved: Saved, values: Mapping[str, Any], data: RunData) -> None:
    if not saved.cold_start:
        data.stream.load_state_dict(values["prompts"])
    elif values["demonstrations"] != fingerprint(data.demonstrations):
        raise DataError(
            f"supervised.demonstrations has others, or in another order, than when {saved.path} was written; resume "
            "with the same ones"
        )


def _with_model(saved: Saved, recipe: Recipe) -> Saved:
    """A model that the run was given is where the recipe says now."""
    if recipe.model.path is None or str(saved.model_dir) != saved.recipe["model"]["path"]:
        return saved
    return replace(saved, model_dir=Path(recipe.model.path))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key that differs; a section that is on one side only is one difference."""
    for key in [*before, *(key for key in now if key not in before)]:
        name = f"{place}{key}"
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _changes(one, other, f"{name}.")
        elif one != other:
            yield name, one, other


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


async def bring_back(saved: Saved, system: System) -> None:
    """The saved weights into learner and engines, with the proof that they are those that were saved.

    Raises RunStopped when they are not: the model that the run started from is another one now.
    """
    if saved.has_learner:
        await system.learners_turn()
        with system.timeline.span("learner", "load", step=saved.step, written=False):
            await system.learner.load_checkpoint(saved.path)
    sync = await system.publish(version=saved.step)
    check_sums(saved, sync.checksums)


def check_sums(saved: Saved, sums: Mapping[str, int]) -> None:
    """Raises RunStopped for weights that are not those that were saved."""
    for name in sorted(saved.sums.keys() | sums.keys()):
        if saved.sums.get(name) != sums.get(name):
            raise RunStopped(
                f"{saved.path} does not give back the weights that were saved: {name} differs; the model in "
                f"{saved.model_dir}, which frozen weights are read from, may have changed since"
            )
