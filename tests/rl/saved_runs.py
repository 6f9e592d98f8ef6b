"""What runs leave on the disk, for tests that read it or go on from it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from rl import checkpoint
from rl.checkpoint import Draft, Saved
from rl.config import Recipe
from rl.durable import write_tensors
from rl.errors import LearnerFailed
from rl.loop_state import LoopState
from rl.recipe import to_plain
from rl.run_directory import RunDirectory
from rl.saver import Saver


def write(folder: Path, step: int, metrics: dict[str, float] | None = None) -> Path:
    """A small checkpoint, written as a run writes one."""
    checkpoints = folder / "checkpoints"
    partial = checkpoint.partial_path(checkpoints, step)
    partial.mkdir(parents=True)
    draft = Draft(
        step=step,
        recipe={"steps": 9},
        model_dir=folder / "cold_start",
        sums={"w": 2**63},
        faults={"learner_restores": 1, "checkpoints_failed": 0},
        loop=LoopState(values={"at": step}),
    )
    files = {"rank_00000.safetensors": write_tensors(partial / "rank_00000.safetensors", {"w": np.arange(99)})}
    files |= draft.write(partial)
    path, num_bytes = checkpoint.commit(checkpoints, step, files, metrics or {})
    assert num_bytes == sum(one.stat().st_size for one in path.iterdir())
    return path


def restored(saver: Saver) -> Saved | None:
    return asyncio.run(saver.restore(LearnerFailed("learner rank 0 died")))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def log_and_save(run: RunDirectory, recipe: Recipe, step: int) -> None:
    """What is left of one step."""
    run.log({"step": step, "reward/mean": 0.5})
    run.log_samples(step, [])
    save(run, recipe, step)


def save(run: RunDirectory, recipe: Recipe, step: int) -> None:
    partial = checkpoint.partial_path(run.checkpoints, step)
    partial.mkdir(parents=True)
    draft = Draft(
        step=step,
        recipe=to_plain(recipe),
        model_dir=run.path / "initial_model",
        sums={},
        faults={"learner_restores": 0, "checkpoints_failed": 0},
    )
    checkpoint.commit(run.checkpoints, step, draft.write(partial), {})
