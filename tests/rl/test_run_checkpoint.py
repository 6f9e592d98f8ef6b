"""Checkpoints on the disk: whole or not there, what is damaged is noticed, what could hold code is refused."""

from __future__ import annotations

import io
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
from rl.checkpoint import Damaged
from rl.data import load_data
from rl.durable import read_tensors, write_durably, write_tensors
from rl.errors import DataError, RunStopped
from rl.progress import Progress
from rl.resume import open_run
from rl.saver import Saver
from tests.rl.saved_runs import flip, log_and_save, restored, save, write
from tests.rl.tiny_runs import tiny_recipe
from tests.small_disk import full_disk
from trainer.checkpoint_writer import CheckpointWriter


def test_what_was_written_is_read(tmp_path: Path):
    write(tmp_path, 3)
    saved = checkpoint.read(write(tmp_path, 4))
    assert (saved.step, saved.recipe, saved.sums) == (4, {"steps": 9}, {"w": 2**63})
    assert saved.faults == {"learner_restores": 1, "checkpoints_failed": 0}
    assert saved.model_dir == tmp_path / "cold_start"
    assert checkpoint.newest(tmp_path / "checkpoints").found == saved
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert checkpoint.read(moved / "checkpoints" / "step_4").model_dir == moved / "cold_start"


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
