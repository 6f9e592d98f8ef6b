"""Checkpoints on the disk: whole or not there, what is damaged is noticed, what could hold code is refused."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import shutil
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.numpy import load_file

from rl import checkpoint
from rl.checkpoint import Damaged, Draft, Saved
from rl.config import Recipe
from rl.data import RunData, load_data
from rl.demonstrations import fingerprint
from rl.durable import read_tensors, write_durably, write_tensors
from rl.errors import DataError, LearnerFailed, RecipeError, RunStopped
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
from tests.rl.test_rollouts import PROMPTS, Rig
from tests.rl.tiny_runs import REWARDS, make_prompt, make_sample, tiny_recipe
from tests.small_disk import full_disk
from trainer.checkpoint_writer import CheckpointWriter


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


def test_what_was_written_is_read(tmp_path: Path):
    write(tmp_path, 3)
    saved = checkpoint.read(write(tmp_path, 4))
    assert (saved.step, saved.recipe, saved.sums) == (4, {"steps": 9}, {"w": 2**63})
    assert saved.faults == {"learner_restores": 1, "checkpoints_failed": 0}
    assert saved.model_dir == tmp_path / "cold_start"
    assert checkpoint.newest(tmp_path / "checkpoints").found == saved
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert checkpoint.read(moved / "checkpoints" / "step_4").model_dir == moved / "cold_start"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit": ("rank_00000.safetensors has another checksum", lambda at: flip(at / "rank_00000.safetensors")),
    "a short file": ("run.json has 7 bytes instead of", lambda at: os.truncate(at / "run.json", 7)),
    "a lost file": ("its files are not those of manifest.json", lambda at: (at / "run.json").unlink()),
    "half a manifest": ("manifest.json cannot be read", lambda at: os.truncate(at / "manifest.json", 50)),
    "no manifest": ("manifest.json cannot be read", lambda at: (at / "manifest.json").unlink()),
    "an extra rank": (
        "its files are not those",
        lambda at: (at / "rank_00001.safetensors").write_bytes((at / "rank_00000.safetensors").read_bytes()),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_the_damage_told(tmp_path: Path, name: str):
    write(tmp_path, 3)
    sentence, damage = DAMAGES[name]
    path = write(tmp_path, 4)
    damage(path)
    search = checkpoint.newest(tmp_path / "checkpoints")
    assert search.found is not None and search.found.step == 3
    told = search.damaged.pop(path)
    assert told.startswith(f"{path} is damaged: ") and sentence in told and not search.damaged
    with pytest.raises(Damaged):
        checkpoint.read(path)


class Payload:
    """Would leave a file behind if it was ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["rng_0.pt", "state/mp_rank_00_model_states.pt", "rank_00000.pkl", "run.py"])
def test_a_checkpoint_with_files_that_could_hold_code_is_refused(tmp_path: Path, name: str):
    path = write(tmp_path, 4)
    foreign = path / name
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    for read in (lambda: checkpoint.read(path), lambda: checkpoint.newest(tmp_path / "checkpoints")):
        with pytest.raises(DataError, match="which Keel does not write: its checkpoints are JSON and safetensors"):
            read()
    assert not (tmp_path / "owned").exists()


def test_a_branch_shares_files_where_the_disk_can(tmp_path: Path):
    saved = checkpoint.read(write(tmp_path, 4, {"eval/math": 0.5}))
    with full_disk(tmp_path / "disk", num_bytes=1 << 20) as other_disk:
        for folder in (tmp_path / "branch", other_disk):
            checkpoint.adopt(saved, folder, {"steps": 12})
            own = checkpoint.read(folder / "checkpoints" / "step_4")
            assert own == replace(saved, path=own.path, recipe={"steps": 12})
            assert checkpoint.metrics_of(own.path) == {"eval/math": 0.5}
            shared = [name for name in os.listdir(own.path) if (own.path / name).samefile(saved.path / name)]
            assert sorted(shared) == ([] if folder is other_disk else ["groups.safetensors", "rank_00000.safetensors"])


def test_what_a_network_disk_shows_late_does_no_harm(tmp_path: Path):
    """A rank's word that it has written, which was deleted elsewhere before the checkpoint was renamed."""
    path = write(tmp_path, 4)
    saved = checkpoint.read(path)
    late = (".rank_0.written", ".rank_12.written.partial", ".nfs00000000024a0b1c00000003")
    for name in late:
        (path / name).write_text("{}")
    assert checkpoint.read(path) == saved
    adopted = checkpoint.adopt(saved, tmp_path / "branch", {})
    assert {one.name for one in adopted.path.iterdir()} == {one.name for one in path.iterdir()} - {*late}
    (path / ".rank_1.written").symlink_to(path / "run.json")
    with pytest.raises(DataError, match=r"holds \.rank_1\.written, which Keel does not write"):
        checkpoint.read(path)


def test_a_pickle_under_the_name_of_tensors_is_never_run(tmp_path: Path):
    path = tmp_path / "rank_00000.safetensors"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        read_tensors(path)
    assert not (tmp_path / "owned").exists()


def test_what_a_killed_process_left_half_written_is_no_checkpoint(tmp_path: Path):
    write(tmp_path, 3)
    partial = checkpoint.partial_path(tmp_path / "checkpoints", 4)
    partial.mkdir()
    (partial / "rank_00000.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints" / ".step_2.deleted").mkdir()
    assert checkpoint.steps_saved(tmp_path / "checkpoints") == [3]
    checkpoint.sweep(tmp_path / "checkpoints")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_3"]


def test_a_file_that_is_on_another_nodes_disk_makes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checkpoint, "SHARED_DISK_S", 0.3)
    write(tmp_path, 3)
    partial = checkpoint.partial_path(tmp_path / "checkpoints", 4)
    partial.mkdir()
    elsewhere = write_tensors(tmp_path / "rank_00001.safetensors", {"w": np.arange(9)})
    with pytest.raises(OSError, match=r"rank_00001\.safetensors was written elsewhere; put runs on a disk that all"):
        checkpoint.commit(tmp_path / "checkpoints", 4, {"rank_00001.safetensors": elsewhere}, {})
    assert checkpoint.steps_saved(tmp_path / "checkpoints") == [3]
    monkeypatch.setattr(checkpoint, "SHARED_DISK_S", 30)
    arriving = threading.Timer(0.1, shutil.copy, (tmp_path / "rank_00001.safetensors", partial))
    arriving.start()
    checkpoint.commit(tmp_path / "checkpoints", 4, {"rank_00001.safetensors": elsewhere}, {})
    assert checkpoint.steps_saved(tmp_path / "checkpoints") == [3, 4]

    writer = CheckpointWriter()
    writer.hold({"w": torch.zeros(3)}, {})
    writer.begin(tmp_path / "not here", 1)
    while (outcome := writer.outcome()) is None:
        time.sleep(0.01)
    assert isinstance(outcome, OSError) and f"not here is not there on {socket.gethostname()};" in str(outcome)


def test_what_could_not_be_written_is_let_go(tmp_path: Path):
    """The copies are 12 bytes a parameter: no memory for those of the next checkpoint while they are held."""
    (tmp_path / "rank_00001.safetensors").touch()
    writer = CheckpointWriter()
    tensor = torch.zeros(3)
    held = weakref.ref(tensor)
    writer.hold({"w": tensor}, {})
    del tensor
    writer.begin(tmp_path, 1)
    while (outcome := writer.outcome()) is None:
        time.sleep(0.01)
    assert isinstance(outcome, FileExistsError) and held() is None

    tensor = torch.zeros(3)
    held = weakref.ref(tensor)
    writer.hold({"w": tensor}, {})
    del tensor
    assert held() is not None
    writer.release()
    assert held() is None


def test_the_last_ones_and_the_best_one_stay(tmp_path: Path):
    scores = {1: 0.1, 2: 0.9, 3: 0.2, 4: None, 9: 0.3, 10: 0.4}
    for step, score in scores.items():
        write(tmp_path, step, {} if score is None else {"eval/math": score})
    checkpoint.prune(tmp_path / "checkpoints", keep=2, best="eval/math")
    assert checkpoint.steps_saved(tmp_path / "checkpoints") == [2, 9, 10]
    checkpoint.prune(tmp_path / "checkpoints", keep=1, best=None)
    assert checkpoint.steps_saved(tmp_path / "checkpoints") == [10]


def test_damaged_checkpoints_count_no_longer_and_the_last_few_stay_for_a_look(tmp_path: Path):
    recipe = tiny_recipe(tmp_path, f"runs={tmp_path / 'runs'}", "steps=99", "checkpoint.keep=1", "checkpoint.best=null")
    run = open_run(recipe, load_data(recipe)).run
    printed = io.StringIO()
    saver = Saver(recipe, run, Progress("tiny", steps=99, console=Console(file=printed, width=500)))
    for step in (10, 20):
        log_and_save(run, recipe, step)
    saver.last = 20
    flip(run.checkpoints / "step_20" / "run.json")
    saved = restored(saver)
    assert saved is not None and saved.step == 10 and [row["step"] for row in run.rows()] == [10]
    assert "run.json has another checksum than when it was written; set aside as .step_20.damaged" in printed.getvalue()
    log_and_save(run, recipe, 15)
    saver._prune(run.checkpoints, cold_start=False)
    checkpoint.sweep(run.checkpoints)
    assert {path.name for path in run.checkpoints.iterdir()} == {"step_15", ".step_20.damaged"}
    run.stop("interrupted")

    for step in (20, 25):
        save(run, recipe, step)
        flip(run.checkpoints / f"step_{step}" / "run.json")
        again = open_run(recipe, load_data(recipe))
        assert again.saved is not None and again.saved.step == 15
        assert len(again.warnings) == 1 and again.warnings[0].endswith(f"set aside as .step_{step}.damaged")
        again.run.stop("interrupted")
    save(run, recipe, 30)
    flip(run.checkpoints / "step_30" / "run.json")
    open_run(recipe, load_data(recipe)).run.stop("interrupted")
    assert {path.name for path in run.checkpoints.iterdir()} == {"step_15", ".step_25.damaged", ".step_30.damaged"}

    # What took the others away may not take away what the run has logged as well.
    flip(run.checkpoints / "step_15" / "run.json")
    with pytest.raises(RunStopped, match=r"rank 0 died; .*step_15 is damaged: .*nothing is left to go on from"):
        restored(saver)
    saver.last = 15
    shutil.rmtree(run.checkpoints)
    with pytest.raises(RunStopped, match="checkpoints was emptied, and nothing is left to go on from"):
        restored(saver)
    assert [row["step"] for row in run.rows()] == [10, 15]


def restored(saver: Saver) -> Saved | None:
    return asyncio.run(saver.restore(LearnerFailed("learner rank 0 died")))


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


def test_a_file_is_never_written_over(tmp_path: Path):
    write_durably(tmp_path / "a", [b"x", memoryview(b"yz")])
    assert (tmp_path / "a").read_bytes() == b"xyz"
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "a", [b"x"])


dtypes = st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64, np.bool_])


@given(st.lists(st.tuples(dtypes, st.lists(st.integers(0, 4), max_size=3)), max_size=5))
def test_tensors_are_what_the_safetensors_library_reads(tmp_path_factory: pytest.TempPathFactory, shapes):
    rng = np.random.default_rng(0)
    arrays = {str(n): rng.integers(0, 2, shape).astype(dtype) for n, (dtype, shape) in enumerate(shapes)}
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    record = write_tensors(path, arrays, {"state": "ü"})
    assert record.bytes == path.stat().st_size
    for name, array in load_file(path).items():
        np.testing.assert_array_equal(array, arrays[name], strict=True)


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
