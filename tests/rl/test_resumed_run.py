"""A run that goes on: the state of its loop, and which checkpoint and which logs it takes up."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl import checkpoint
from rl.checkpoint import Draft
from rl.config import Recipe
from rl.data import RunData, load_data
from rl.demonstrations import fingerprint
from rl.durable import read_tensors, write_tensors
from rl.errors import DataError, RecipeError
from rl.history import read_rows
from rl.loop_state import Loop, LoopState
from rl.progress import Progress
from rl.prompts import PromptStream
from rl.recipe import to_plain
from rl.resume import open_run
from rl.run_directory import RunDirectory
from rl.sample import Group, Prompt, Sample, Scored, Status, ToolCall, ToolResult, Turn
from rl.saved_groups import group_of, group_record
from rl.saver import Saver
from rl.selections import Selections
from tests.rl.saved_runs import flip, log_and_save, restored, save, write
from tests.rl.test_rollouts import PROMPTS, Rig
from tests.rl.tiny_runs import REWARDS, make_prompt, make_sample, tiny_recipe


def episode(prompt: Prompt) -> Sample:
    """Two sequences with tools, one of which has nothing recorded."""
    turn = Turn(
        reply="call", calls=(ToolCall(name="f", arguments={"x": [1]}),), results=(ToolResult(text="no", failed=True),)
    )
    first = make_sample(prompt, 1, part=0, routes=None, routed=None, kept=None)
    return make_sample(
        prompt, 1, turns=(turn,), earlier=(first,), status=Status.TRUNCATED, final_state={"tests": {"a": True}}
    )


def selecting(prompt: Prompt, num_sampled: int) -> Sample:
    """With selections of 3 tokens: as bits where it is short, as positions where it is long."""
    sample = make_sample(prompt, num_sampled=num_sampled)
    recorded = np.arange(len(sample)) % 3 == 2
    recorded[:3] = False
    keys = np.array([[t - 3, t - 1, t] for t in np.flatnonzero(recorded)])[:, None].repeat(2, axis=1)
    selections = Selections.of(keys, recorded)
    assert (selections.rows.dtype == np.uint8) == (num_sampled < 40)
    return replace(sample, selections=selections)


def test_groups_survive_json_and_arrays(tmp_path: Path):
    prompt = make_prompt("7")
    group = Group(
        prompt=prompt,
        scored=(
            Scored(sample=selecting(prompt, 4), reward=1 / 3, parts={"a": 0.1}, comments={"a": "why"}),
            Scored(sample=selecting(prompt, 400), reward=0.5),
            Scored(sample=episode(prompt), reward=-0.0),
        ),
        failed=2,
    )
    arrays: dict[str, np.ndarray] = {}
    record = json.loads(json.dumps(group_record(group, "0", arrays)))
    write_tensors(tmp_path / "a.safetensors", arrays)
    again = group_of(record, read_tensors(tmp_path / "a.safetensors"), {prompt.id: prompt})
    assert_equal(again, group)
    with pytest.raises(DataError, match=f"prompt {prompt.id} under way"):
        group_of(record, arrays, {})


def assert_equal(one, other) -> None:
    """Equality through dataclasses that hold arrays."""
    assert type(one) is type(other)
    if isinstance(one, np.ndarray):
        np.testing.assert_array_equal(one, other, strict=True)
    elif hasattr(one, "__dataclass_fields__"):
        for name in one.__dataclass_fields__:
            assert_equal(getattr(one, name), getattr(other, name))
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert one == other


def loop_of(rig: Rig) -> Loop:
    class Handle:
        def state_dict(self) -> dict[str, int]:
            return {"num_steps": 3, "skipped_in_a_row": 1}

        def load_state_dict(self, state: dict[str, int]) -> None:
            assert state == self.state_dict()

    shuffle = np.random.default_rng([7, 1])
    return Loop(
        prompts=rig.rollouts.prompts,
        buffer=rig.buffer,
        rollouts=rig.rollouts,
        shuffle=shuffle,
        learner=Handle(),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("steps_before", [0, 1, 3])
def test_the_loop_goes_on_in_the_middle_of_replacing_groups(tmp_path: Path, steps_before: int):
    """Every third prompt has no variance and is replaced; what a step was made of is the same after a restart."""

    def judge(sample: Sample) -> float:
        return 0.0 if int(sample.prompt.id.split("/")[1]) % 3 == 0 else float(sample.index)

    settings = ("objective.zero_variance=replace", "rollout.max_staleness=1", "steps=6")

    def made_of(rig: Rig, batches: list[list[Group]]) -> list[tuple[list[str], list[str]]]:
        return [
            (
                [group.prompt.id for group in batch],
                [group.prompt.id for group in rig.rollouts.take_tally(batch).replaced],
            )
            for batch in batches
        ]

    straight = Rig(tmp_path, judge, *settings)
    whole = made_of(straight, straight.take(6))

    first = Rig(tmp_path, judge, *settings)
    begun = made_of(first, first.take(steps_before))
    loop = loop_of(first)
    draws = loop.shuffle.random(3)
    values, arrays = loop.state().encode()
    expected = loop.shuffle.random(3)
    again = Rig(tmp_path, judge, *settings)
    restored = loop_of(again)
    restored.restore(LoopState.decode(json.loads(json.dumps(values)), arrays, PROMPTS), PROMPTS)
    np.testing.assert_array_equal(restored.shuffle.random(3), expected)
    assert not np.array_equal(draws, expected)
    rest = made_of(again, again.take(6, first=steps_before + 1))
    assert begun + rest == whole
    # Every draw is made with its own seeds, and none that was not made before.
    assert {str(one) for one in [*first.system.asked, *again.system.asked]} == {
        str(one) for one in straight.system.asked
    }


def test_changed_prompts_are_noticed():
    stream = PromptStream({"sums": PROMPTS}, {"sums": 1.0}, seed=7)
    state = json.loads(json.dumps(stream.state_dict()))
    changed = [*PROMPTS[:-1], replace(PROMPTS[-1], messages=({"role": "user", "content": "another"},))]
    with pytest.raises(DataError, match=r"domains\.sums has other prompts"):
        PromptStream({"sums": changed}, {"sums": 1.0}, seed=7).load_state_dict(state)


def test_a_run_killed_before_its_first_checkpoint_starts_afresh(tmp_path: Path):
    recipe = tiny_recipe(tmp_path, f"runs={tmp_path / 'runs'}")
    data = load_data(recipe)
    run = open_run(recipe, data).run
    run.log_supervised({"step": 1, "loss/supervised": 3.0})
    (run.path / ".git").mkdir()
    with pytest.raises(RecipeError, match=rf"is being written by process {os.getpid()} on "):
        open_run(recipe, data)
    run._lock.release()  # as the end of its process does
    resumption = open_run(recipe, data)
    assert resumption.sentences == (f"{run.path} holds no checkpoint; the run starts afresh",)
    assert resumption.saved is None and not run.supervised.exists() and (run.path / ".git").exists()
    resumption.run.stop("why")
    with pytest.raises(RecipeError, match="already holds a stopped run; choose another name"):
        open_run(replace(recipe, resume="never"), data)


def saved_run(tmp_path: Path) -> tuple[Recipe, RunData, RunDirectory]:
    """One that was stopped after three steps, each of which is saved."""
    recipe = tiny_recipe(tmp_path, f"runs={tmp_path / 'runs'}", "steps=9")
    data = load_data(recipe)
    run = open_run(recipe, data).run
    for step in (1, 2, 3):
        log_and_save(run, recipe, step)
    run.stop("why")
    return recipe, data, run


def test_a_run_goes_back_to_an_earlier_checkpoint_once(tmp_path: Path):
    recipe, data, run = saved_run(tmp_path)
    recipe = replace(recipe, resume=str(run.checkpoints / "step_1"))
    back = open_run(recipe, data)
    assert back.saved is not None and back.saved.step == 1
    assert checkpoint.steps_saved(run.checkpoints) == [1]
    assert [row["step"] for row in back.run.rows()] == [1]
    assert [path.name for path in back.run.samples.iterdir()] == ["step_1.jsonl"]
    log_and_save(back.run, recipe, 2)
    back.run.stop("interrupted")

    again = open_run(recipe, data)
    assert again.saved is not None and again.saved.step == 2 and [row["step"] for row in again.run.rows()] == [1, 2]
    assert again.sentences == (
        f"goes on after step 2 of 9, from {run.checkpoints / 'step_2'}",
        f"has begun from {recipe.resume} before, so resume means auto",
    )
    again.run.finish()
    with pytest.raises(RecipeError, match="holds no checkpoint that is whole"):
        open_run(replace(recipe, name="other", resume=str(tmp_path)), data)


def test_a_run_that_began_from_another_one_goes_on_by_the_same_command(tmp_path: Path):
    first, data, run = saved_run(tmp_path)
    save(run, first, 4)
    flip(run.checkpoints / "step_4" / "run.json")
    recipe = replace(first, name="branch", resume=str(run.path), steps=4)
    branch = open_run(recipe, data)
    own = branch.run.checkpoints / "step_3"
    assert branch.sentences == (f"starts after step 3 of {run.checkpoints / 'step_3'}",)
    assert len(branch.warnings) == 1 and branch.warnings[0].startswith(f"{run.checkpoints / 'step_4'} is damaged: ")
    assert (run.checkpoints / "step_4").exists()
    assert branch.run.last_step == -1 and not branch.is_old
    # It needs nothing of the other one's but the model.
    shutil.rmtree(run.checkpoints)
    assert branch.saved is not None and branch.saved == checkpoint.read(own)
    assert branch.saved.model_dir == run.path / "initial_model"
    assert branch.saved.recipe["name"] == "branch"

    # Its learner may die, and its process end, before it has saved anything itself.
    branch.run.log({"step": 4, "reward/mean": 0.5})
    saver = Saver(recipe, branch.run, Progress("branch", steps=9))
    assert restored(saver) == branch.saved and not branch.run.rows()
    saver.follow(branch.saved.model_dir, branch.saved)
    assert asyncio.run(saver.way_on()) == "step 3 is saved, and the same command goes on from there"
    branch.run.stop("interrupted")
    again = open_run(recipe, data)
    assert again.is_old and again.sentences[0] == f"goes on after step 3 of 4, from {own}"
    assert again.sentences[1:] == (f"has begun from {run.path} before, so resume means auto",)
    log_and_save(again.run, recipe, 4)
    again.run.stop("interrupted")
    auto = open_run(replace(recipe, resume="auto"), data)
    assert [row["step"] for row in auto.run.rows()] == [4]
    auto.run.finish()
    with pytest.raises(RecipeError, match=r"already holds a finished run; choose .*, raise steps above 4"):
        open_run(recipe, data)
    other = shutil.copytree(own, tmp_path / "other" / "checkpoints" / "step_3")
    with pytest.raises(RecipeError, match="already holds a finished run; choose another name"):
        open_run(replace(recipe, resume=str(other)), data)


def test_a_branch_that_was_killed_before_it_had_its_checkpoint_begins_there_again(tmp_path: Path):
    first, data, run = saved_run(tmp_path)
    recipe = replace(first, name="branch", resume=str(run.path))
    branch = open_run(recipe, data).run
    branch._lock.release()
    shutil.rmtree(branch.checkpoints)
    again = open_run(replace(recipe, resume="auto"), data)
    assert again.is_old and again.saved is not None and again.saved.path == branch.checkpoints / "step_3"
    assert again.sentences == (f"starts after step 3 of {run.checkpoints / 'step_3'}",)


def test_a_run_without_its_checkpoints_keeps_what_it_logged(tmp_path: Path):
    recipe, data, run = saved_run(tmp_path)
    shutil.rmtree(run.checkpoints)
    kept = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(
        RecipeError,
        match=r"tiny holds metrics up to step 3 but no checkpoint to go on from; choose another",
    ):
        open_run(recipe, data)
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_run_whose_status_was_lost_goes_on(tmp_path: Path):
    """As after a power cut with a file system that keeps names but not contents."""
    recipe, data, run = saved_run(tmp_path)
    os.truncate(run.path / "status.json", 0)
    again = open_run(recipe, data)
    assert again.saved is not None and again.saved.step == 3 and len(again.run.rows()) == 3


def save_cold_start(run: RunDirectory, recipe: Recipe, data: RunData, step: int) -> None:
    """What a cold start logs and saves of one step."""
    run.log_supervised({"step": step, "loss/supervised": 1 / step})
    folder = checkpoint.folder_of(run.checkpoints, cold_start=True)
    partial = checkpoint.partial_path(folder, step)
    partial.mkdir(parents=True)
    draft = Draft(
        step=step,
        cold_start=True,
        recipe=to_plain(recipe),
        model_dir=run.path / "initial_model",
        sums={},
        faults={"learner_restores": 0, "checkpoints_failed": 0},
        loop=LoopState(values={"demonstrations": fingerprint(data.demonstrations)}),
    )
    files = {"rank_00000.safetensors": write_tensors(partial / "rank_00000.safetensors", {})}
    checkpoint.commit(folder, step, files | draft.write(partial), {})


def test_a_cold_start_goes_on_from_where_it_was_saved_until_more_is_saved(tmp_path: Path):
    overrides = (f"runs={tmp_path / 'runs'}", "supervised.steps=9", "supervised.demonstrations.size=30")
    recipe = tiny_recipe(tmp_path, *overrides, f"supervised.demonstrations.function={REWARDS}:says_the_prompt")
    data = load_data(recipe)
    run = open_run(recipe, data).run
    for step in (3, 4, 6):
        save_cold_start(run, recipe, data, step)
    run.log_supervised({"step": 7, "loss/supervised": 0.1})
    run.stop("interrupted")
    half_a_model = run.path / ".cold_start.x1y2"
    half_a_model.mkdir()
    (run.path / ".git").mkdir()

    going_on = open_run(recipe, data)
    saved = going_on.saved
    assert saved is not None and saved.cold_start and saved.has_learner
    path = run.checkpoints / "cold_start" / "step_6"
    assert going_on.sentences == (f"goes on after cold start step 6 of 9, from {path}",)
    assert not half_a_model.exists() and (run.path / ".git").exists()
    assert saved.model_dir == run.path.absolute() / "initial_model" and saved.run_path == run.path
    assert [row["step"] for row in read_rows(run.supervised)] == [3, 4, 6]
    going_on.run.stop("interrupted")

    other = load_data(replace(recipe, supervised=replace(recipe.supervised, demonstrations=says_k(30))))
    with pytest.raises(DataError, match=r"supervised\.demonstrations has others, or in another order, than when"):
        open_run(recipe, other)
    with pytest.raises(RecipeError, match=r"cannot go on with another supervised\.steps: it was 9 and is 10 now"):
        open_run(replace(recipe, supervised=replace(recipe.supervised, steps=10)), data)

    branch = open_run(replace(recipe, name="branch", resume=str(path)), data)
    assert branch.sentences[0] == f"starts after cold start step 6 of {path}"
    assert not branch.run.supervised.exists()
    assert branch.saved is not None and branch.saved.path == branch.run.checkpoints / "cold_start" / "step_6"
    back = open_run(replace(recipe, resume=str(path.with_name("step_3"))), data)
    assert checkpoint.steps_saved(path.parent) == [3]
    assert [row["step"] for row in read_rows(run.supervised)] == [3]
    back.run.stop("interrupted")

    # Whatever is saved of reinforcement learning is later, and what was half written goes in both places.
    write(run.path, 0)
    (path.parent / ".step_9.partial").mkdir()
    found = checkpoint.newest(run.checkpoints).found
    assert found is not None and not found.cold_start and found.step == 0
    os.truncate(found.path / "run.json", 7)
    search = checkpoint.newest(run.checkpoints)
    assert search.found is not None and search.found.moment == "cold start step 3" and len(search.damaged) == 1
    again = open_run(recipe, data)
    assert again.warnings == tuple(f"{one}; set aside as .step_0.damaged" for one in search.damaged.values())
    assert sorted(one.name for one in run.checkpoints.rglob("*step_*")) == [".step_0.damaged", "step_3"]


def says_k(size: int) -> dict[str, object]:
    return {"function": f"{REWARDS}:says_k", "size": size}
