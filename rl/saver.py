"""When a run saves itself, and how little it stands still for that."""

from __future__ import annotations

import asyncio
import errno
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl import checkpoint, history
from rl.allowance import Allowance
from rl.checkpoint import Draft, Saved
from rl.config import Recipe
from rl.durable import sync_folder, sync_tree
from rl.errors import LearnerFailed, RunStopped, did_you_mean
from rl.loop_state import Loop, LoopState
from rl.progress import Progress
from rl.recipe import to_plain
from rl.run_directory import RunDirectory
from rl.system import System
from trainer.learner import Learner

ROOM_BYTES = 4 << 20
"""Left free on the disk beside a checkpoint, for metrics and samples."""


@dataclass(slots=True, kw_only=True)
class _Copied:
    """A step that is in host memory and not on the disk yet."""

    draft: Draft
    learner: Learner | None = None  # that is writing its files
    began: float


class Saver:
    """Saves steps of one run: a copy while the learner stands still, then the disk, beside the following steps.

    A checkpoint that cannot be written is counted and told, and the run goes on with the one before. Failures of the
    learner in the meantime are raised by the next call.
    """

    def __init__(self, recipe: Recipe, run: RunDirectory, progress: Progress) -> None:
        self.recipe = recipe
        self.run = run
        self.progress = progress
        self.num_failed = 0
        self.num_restores = 0
        self.last: int | None = None  # step of the newest checkpoint
        self._restores = Allowance(recipe.faults.learner_restores, recipe.faults.window_s)
        self._trained: tuple[int, Mapping[str, Any], Mapping[str, int]] | None = None
        self._cold_start = False
        self._model_dir = Path()
        self._copied: _Copied | None = None
        self._writing: asyncio.Task[None] | None = None
        self._written: dict[str, float] = {}

    def follow(self, model_dir: Path, saved: Saved | None, *, cold_start: bool = False) -> None:
        """What every checkpoint from now on belongs to: the stage, the model that it starts from, what was resumed."""
        if cold_start != self._cold_start:
            self.last, self._written = None, {}
        self._cold_start = cold_start
        self._model_dir = model_dir
        self._trained = None
        if saved is not None:
            self.last = saved.step
            self.num_failed = max(self.num_failed, saved.faults["checkpoints_failed"])
            self.num_restores = max(self.num_restores, saved.faults["learner_restores"])

    async def start(self, sums: Mapping[str, int], *, step: int = 0, loop: LoopState | None = None) -> None:
        """The checkpoint before a phase's first step, the one after ``step``: which model it starts from.

        A model that the run itself wrote is on the disk before the checkpoint that needs it.
        """
        if self._model_dir.absolute().is_relative_to(self.run.path.absolute()):
            await asyncio.to_thread(sync_tree, self._model_dir)
        self._copied = _Copied(draft=replace(self._draft(step, sums), loop=loop), began=time.perf_counter())
        self.write(step, {}, sums)
        await self.settle()

    async def copy(self, step: int, loop: Loop, system: System, sums: Mapping[str, int]) -> None:
        """Takes ``step`` into host memory, from where the ranks begin to write. ``sums`` are those of its weights."""
        await self.settle()
        began = time.perf_counter()
        draft = replace(self._draft(step, sums), loop=loop.state())
        async with system.interruption():
            await self._copy(draft, system.learner, began)

    async def copy_cold_start(self, step: int, state: LoopState, learner: Learner) -> None:
        """The same of a step of the cold start, while engines sleep."""
        await self.settle()
        began = time.perf_counter()
        with self.run.timeline.span("learner", "checksums", step=step, written=False):
            sums = await learner.checksums()
        draft = replace(self._draft(step, sums), loop=state)
        await self._copy(draft, learner, began)

    async def _copy(self, draft: Draft, learner: Learner, began: float) -> None:
        partial = self._partial(draft)
        with self.run.timeline.span("learner", "checkpoint", step=draft.step):
            num_bytes = await learner.copy_checkpoint()
            try:
                await asyncio.to_thread(_make_room, partial, num_bytes + draft.num_bytes)
            except OSError as error:
                self._fail(draft, error)
                return
            await learner.write_checkpoint(partial)
        self._copied = _Copied(draft=draft, learner=learner, began=began)

    def write(self, step: int, row: Mapping[str, Any], sums: Mapping[str, int]) -> None:
        """Comes after a step whose ``row`` of metrics is logged: begins to write it, if it was copied."""
        if self._trained is None and step and not self._cold_start:
            self._check_metric(row)
        self._trained = (step, row, sums)
        if self._copied is not None:
            copied, self._copied = self._copied, None
            self._writing = asyncio.create_task(self._write(copied, row))
            self._writing.add_done_callback(lambda task: task.cancelled() or task.exception())  # settle raises it

    async def stop(self, loop: Loop, system: System) -> str:
        """Saves the last step, unless it is saved already; returns where the run goes on when it is started again."""
        await self.settle()
        if self._trained is not None and self._trained[0] != self.last:
            step, row, sums = self._trained
            await self.copy(step, loop, system, sums)
            self.write(step, row, sums)
        return await self.way_on()

    async def way_on(self) -> str:
        """Where the run goes on when it is started again, as soon as that is on the disk."""
        await self.settle()
        if self.last is None:
            return "nothing is saved"
        moment = checkpoint.moment(self.last, cold_start=self._cold_start)
        return f"{moment} is saved, and the same command goes on from there"

    async def settle(self) -> None:
        """Waits until what is being written is on the disk. Raises LearnerFailed when the learner could not write."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            await writing

    async def restore(self, failure: LearnerFailed) -> Saved | None:
        """The checkpoint to go on from after a failure of the learner, with the run cut back to it; None starts again.

        Raises it, with how often that was tried, when it is one too many within ``faults.window_s`` or from one
        checkpoint.
        """
        await self._drop()
        search = await asyncio.to_thread(checkpoint.newest, self.run.checkpoints)
        reached = search.found.moment if search.found else None
        if not self._restores.take(reached):
            raise self._one_too_many(failure, reached)
        self.num_restores += 1
        if search.found is None and (search.damaged or self.last is not None):
            told = next(iter(search.damaged.values()), f"{self.run.checkpoints} was emptied")
            raise RunStopped(f"{str(failure).rstrip('.')}; {told}, and nothing is left to go on from") from failure
        for sentence in checkpoint.set_aside(search.damaged):
            self.progress.warn(sentence)
        saved, self.last = search.found, None
        where = f"the run goes on after {saved.moment}" if saved else "the run begins again"
        self.progress.warn(f"{str(failure).rstrip('.')}; {where} ({self.num_restores}. restore of the learner)")
        step, cold_step = saved.reached if saved else (-1, 0)
        self.run.cut(step, cold_step=cold_step)
        self.progress.resume(max(0, step), self.run.rows(), cold_step=cold_step)
        return saved

    def _one_too_many(self, failure: LearnerFailed, reached: str | None) -> LearnerFailed:
        if not self._restores.most:
            return failure
        times, place = self._restores.num_taken(reached), f"after {reached}" if reached else "at the beginning"
        return LearnerFailed(
            f"{str(failure).rstrip('.')}; restores of the learner before that: {self._restores.most} "
            f"(faults.learner_restores), of them {place}: {times}"
        )

    async def _drop(self) -> None:
        """Ends what is being written, whose learner is gone: all of it may be on the disk already."""
        with suppress(RuntimeError):  # the failure that is known, once more
            await self.settle()
        self._copied = None
        checkpoint.sweep(self.run.checkpoints)
        history.sweep(self.run.path)

    def metrics(self) -> dict[str, float]:
        """Faults so far, and what the latest checkpoint cost, in the row after it."""
        written, self._written = self._written, {}
        faults = {f"faults/{name}": float(count) for name, count in self._faults.items()}
        return faults | written

    def _partial(self, draft: Draft) -> Path:
        folder = checkpoint.folder_of(self.run.checkpoints, cold_start=draft.cold_start)
        return checkpoint.partial_path(folder, draft.step)

    @property
    def _faults(self) -> dict[str, int]:
        return {"learner_restores": self.num_restores, "checkpoints_failed": self.num_failed}

    def _draft(self, step: int, sums: Mapping[str, int]) -> Draft:
        return Draft(
            step=step,
            cold_start=self._cold_start,
            recipe=to_plain(self.recipe),
            model_dir=self._model_dir,
            sums=dict(sums),
            faults=self._faults,
        )

    async def _write(self, copied: _Copied, row: Mapping[str, Any]) -> None:
        step, partial = copied.draft.step, self._partial(copied.draft)
        try:
            if copied.learner is None:
                await asyncio.to_thread(_make_room, partial, copied.draft.num_bytes)
            files = {} if copied.learner is None else await copied.learner.checkpoint_written(partial)
            files |= await asyncio.to_thread(copied.draft.write, partial)
            # What a checkpoint counts as done must be on the disk as well.
            await asyncio.to_thread(self.run.flush)
            _, num_bytes = await asyncio.to_thread(checkpoint.commit, partial.parent, step, files, row)
        except OSError as error:
            self._fail(copied.draft, error)
            return
        self.last = step
        with suppress(OSError):  # what cannot be deleted now is deleted after the next one
            await asyncio.to_thread(self._prune, partial.parent, cold_start=copied.draft.cold_start)
        if copied.learner is not None:
            seconds = time.perf_counter() - copied.began
            self._written = {"checkpoint/bytes": float(num_bytes), "checkpoint/seconds": seconds}

    def _prune(self, folder: Path, *, cold_start: bool) -> None:
        settings = self.recipe.checkpoint
        checkpoint.prune(folder, keep=settings.keep, best=None if cold_start else settings.best)
        if not cold_start:
            checkpoint.discard(folder / checkpoint.COLD_START)

    def _fail(self, draft: Draft, error: OSError) -> None:
        self.num_failed += 1
        shutil.rmtree(self._partial(draft), ignore_errors=True)
        before = "there is none before it" if self.last is None else f"that of step {self.last} stays the latest"
        moment = checkpoint.moment(draft.step, cold_start=draft.cold_start)
        self.progress.warn(f"the checkpoint of {moment} was not written: {error.strerror or error}; {before}")

    def _check_metric(self, row: Mapping[str, Any]) -> None:
        """Says so when no checkpoint will ever be the best, because the metric's name is not one."""
        best = self.recipe.checkpoint.best
        if best is not None and best not in row and not best.startswith("eval/"):
            self.progress.warn(f"checkpoint.best is {best}, which is no metric of this run; {did_you_mean(best, row)}")


def _make_room(partial: Path, num_bytes: int) -> None:
    """An empty folder for the checkpoint. Raises OSError where it would not fit: a full disk stops metrics too."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    sync_folder(partial.parent)
    needed, free = num_bytes + ROOM_BYTES, shutil.disk_usage(partial).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB left")
