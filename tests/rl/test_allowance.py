"""What is mended again and again without progress ends, at whatever rate it comes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rl.allowance import Allowance
from rl.config import Faults
from rl.data import load_data
from rl.errors import LearnerFailed
from rl.progress import Progress
from rl.resume import open_run
from rl.saver import Saver
from rl.timeline import Timeline
from rollout.engine_handle import EngineHandle
from tests.rl.saved_runs import write
from tests.rl.tiny_runs import tiny_recipe


def test_faults_are_forgotten_after_a_while_and_only_where_there_was_progress():
    now = [0.0]
    allowance = Allowance(3, 100, clock=lambda: now[0])

    def mended(reached: int, *times: float) -> list[bool]:
        taken = []
        for now[0] in times:
            taken.append(allowance.take(reached))
        return taken

    assert mended(0, 0, 10) == [True, True]
    assert mended(1, 20, 30) == [True, False]  # too many within the window
    assert mended(1, 101, 111, 5000) == [True, True, False]  # the first ones are forgotten, and then progress is asked
    assert mended(2, 5001, 5102, 5203, 5304) == [True, True, True, False]
    assert Allowance(0, 100).take(0) is False


def test_a_learner_that_fails_after_every_restore_stops_the_run_however_slowly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe = tiny_recipe(tmp_path, f"runs={tmp_path}", "faults={learner_restores: 2, window_s: 1.0e-9}", "steps=99")
    run = open_run(recipe, load_data(recipe)).run
    saver = Saver(recipe, run, Progress(recipe.name, steps=99))

    def fail() -> str:
        saved = asyncio.run(saver.restore(LearnerFailed("learner rank 0 failed in step: CUDA out of memory.")))
        return saved.moment if saved else "the beginning"

    assert [fail(), fail()] == ["the beginning"] * 2
    for step in (20, 40):  # progress, as the run gets to a checkpoint in between
        write(run.path, step)
        assert [fail(), fail()] == [f"step {step}"] * 2
    with pytest.raises(LearnerFailed) as stopped:
        fail()
    assert str(stopped.value) == (
        "learner rank 0 failed in step: CUDA out of memory; restores of the learner before that: 2 "
        "(faults.learner_restores), of them after step 40: 2"
    )
    assert capsys.readouterr().out.count("CUDA out of memory; the run goes on after step 40") == 2


def test_an_engine_that_finishes_nothing_between_two_deaths_is_given_up_however_slowly():
    """One that does is started again and again: tests/rl/test_faults.py."""
    limits = Faults(engine_restarts=2, window_s=1e-9)
    engine = EngineHandle(0, "engine 0 of 1", lambda: None, {}, limits=limits, timeline=Timeline())
    assert [engine.may_restart() for _ in range(3)] == [True, True, False]
