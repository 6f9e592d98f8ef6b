"""The run directory: nothing half-written, nothing mixed, and everything readable by the tools it is meant for."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rl.errors import RecipeError, RunStopped
from rl.run_directory import RunDirectory
from rl.sample import Kept, Prompt, Sample, Scored, Status
from rl.trajectory import SequenceView, Trajectory, token_texts


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def status(run):
    return json.loads((run.path / "status.json").read_text())


def make_sample(**changes):
    kept = Kept.from_rows([np.array([], int), np.array([], int), np.array([5, 9]), np.array([7])])
    fields = {
        "prompt": Prompt(id="math/17", domain="math", messages=({"role": "user", "content": "2+2?"},), answer={1, 2}),
        "index": 3,
        "token_ids": np.array([1, 2, 5, 7], np.int32),
        "sampled": np.array([False, False, True, True]),
        "rollout_logprobs": np.array([0, 0, -0.6931472, 0], np.float32),
        "versions": np.array([-1, -1, 4, 5], np.int32),
        "routes": np.zeros((4, 2, 2), np.uint8),
        "routed": np.array([True, True, True, False]),
        "kept": kept,
        "status": Status.TRUNCATED,
        "reply": "four",
    }
    return Sample(**(fields | changes))


def test_a_step_is_one_finite_object_and_nan_is_null(tmp_path):
    with RunDirectory.create(tmp_path / "a", recipe="name: a\n") as run:
        run.log({"step": 0, "eval/math": 0.25})
        numpy_scalars: Any = {"step": np.int64(1), "lr": np.float32(0.5)}
        run.log(numpy_scalars | {"loss/total": math.nan, "grad_norm": math.inf})
        run.log_supervised({"step": 1, "loss/supervised": 3.5})
    assert lines(run.metrics) == [
        {"step": 0, "eval/math": 0.25},
        {"step": 1, "lr": 0.5, "loss/total": None, "grad_norm": None},
    ]
    assert lines(run.supervised) == [{"step": 1, "loss/supervised": 3.5}]
    assert run.recipe.read_text() == "name: a\n"


def test_tensorboard_reads_the_same_numbers(tmp_path):
    with RunDirectory.create(tmp_path / "a", recipe="") as run:
        run.log_supervised({"step": 7, "loss/supervised": 3.5})
        for step in (1, 2):
            run.log({"step": step, "reward/mean": step / 4})
    events = EventAccumulator(str(run.path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]
    assert [(event.step, event.value) for event in events.Scalars("supervised/loss/supervised")] == [(7, 3.5)]
    assert "step" not in events.Tags()["scalars"]


def test_steps_must_increase_and_metrics_must_be_numbers(tmp_path):
    run = RunDirectory.create(tmp_path / "a", recipe="")
    run.log({"step": 3})
    with pytest.raises(ValueError, match=r"metrics.jsonl: step 3 comes after step 3"):
        run.log({"step": 3})
    with pytest.raises(ValueError, match="metric reward/mean is 'high', not a number"):
        run.log({"step": 4, "reward/mean": "high"})  # type: ignore[dict-item]
    assert lines(run.metrics) == [{"step": 3}]


@pytest.mark.parametrize(
    ("end", "description"),
    [
        (lambda run: None, "a run that is running or was killed"),
        (lambda run: run.finish(), "a finished run"),
        (lambda run: run.stop("why"), "a stopped run"),
    ],
)
def test_another_runs_directory_is_refused_untouched(tmp_path, end, description):
    run = RunDirectory.create(tmp_path / "a", recipe="name: a\n")
    end(run)
    before = {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()}
    with pytest.raises(RecipeError, match=rf"already holds {description}; choose another name=... or delete it"):
        RunDirectory.create(tmp_path / "a", recipe="name: b\n")
    assert {path.name: path.stat().st_mtime_ns for path in run.path.iterdir()} == before


def test_foreign_files_and_plain_files_are_refused_and_an_empty_directory_is_taken(tmp_path):
    (tmp_path / "mine").mkdir()
    RunDirectory.create(tmp_path / "mine", recipe="").finish()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    with pytest.raises(RecipeError, match="notes already holds files"):
        RunDirectory.create(tmp_path / "notes", recipe="")
    (tmp_path / "file").write_text("x")
    with pytest.raises(RecipeError, match="file is a file"):
        RunDirectory.create(tmp_path / "file", recipe="")


def test_only_a_run_that_reached_its_end_is_finished(tmp_path):
    run = RunDirectory.create(tmp_path / "a", recipe="")
    assert status(run)["status"] == "running" and status(run)["ended"] is None
    with run:
        pass
    assert status(run)["status"] == "finished" and status(run)["ended"] >= status(run)["started"]

    for name, error, reason in [
        ("user", RunStopped("losses stay non-finite"), "losses stay non-finite"),
        ("keyboard", KeyboardInterrupt(), "interrupted"),
        ("bug", KeyError("x"), "KeyError: 'x'"),
    ]:
        run = RunDirectory.create(tmp_path / name, recipe="")
        with pytest.raises(type(error)), run:
            raise error
        assert (status(run)["status"], status(run)["reason"]) == ("stopped", reason)
        with pytest.raises(ValueError, match="already stopped"):
            run.finish()


def test_an_explicit_end_stands(tmp_path):
    with RunDirectory.create(tmp_path / "a", recipe="") as run:
        run.stop("enough")
    assert status(run)["reason"] == "enough"


def test_half_a_character_in_a_state_is_kept(tmp_path):
    """As a file's name may hold, which Python reads with a lone surrogate."""
    run = RunDirectory.create(tmp_path / "a", recipe="")
    sample = make_sample(final_state={"files": ["\udce9.txt"]})
    views = [SequenceView(sample=sample, token_texts=["a", "b", "c", "d"])]
    run.log_samples(1, [Trajectory(scored=Scored(sample=sample, reward=0.5), sequences=views, advantage=0.0)])
    (record,) = lines(run.samples / "step_1.jsonl")
    assert record["final_state"] == {"files": ["\udce9.txt"]}


def test_trajectories_keep_every_tokens_numbers(tmp_path):
    run = RunDirectory.create(tmp_path / "a", recipe="")
    earlier = make_sample(part=0, kept=None)
    sample = make_sample(earlier=(earlier,))
    scored = Scored(sample=sample, reward=0.5, parts={"answer": 1.0, "length": -0.5}, comments={"answer": "so"})
    ratios = np.array([0, 0, 0.25, np.nan], np.float32)
    texts = ["a", "b", "c", "ü"]
    views = [
        SequenceView(sample=earlier, token_texts=texts),
        SequenceView(sample=sample, token_texts=texts, log_ratios=ratios, masked=True),
    ]
    run.log_samples(12, [Trajectory(scored=scored, sequences=views, advantage=-0.25)])
    (record,) = lines(run.samples / "step_12.jsonl")
    streams = {
        "reply": "four",
        "masked": True,
        "token_ids": [1, 2, 5, 7],
        "tokens": ["a", "b", "c", "ü"],
        "sampled": [0, 0, 1, 1],
        "rollout_logprobs": [0, 0, -0.69315, 0],
        "log_ratios": [0, 0, 0.25, None],
        "kept_sizes": [0, 0, 2, 1],
        "routed": [1, 1, 1, 0],
        "versions": [-1, -1, 4, 5],
    }
    assert record == {
        "step": 12,
        "id": "math/17#3",
        "prompt": "math/17",
        "domain": "math",
        "tools": [],
        "index": 3,
        "thinking": True,
        "turns": [],
        "final_state": None,
        "messages": [{"role": "user", "content": "2+2?"}],
        "answer": "{1, 2}",
        "status": "truncated",
        "reward": 0.5,
        "parts": {"answer": 1.0, "length": -0.5},
        "comments": {"answer": "so"},
        "advantage": -0.25,
        **streams,
        "earlier": [streams | {"masked": False, "log_ratios": None, "kept_sizes": None}],
    }
    assert sorted(path.name for path in run.samples.iterdir()) == ["step_12.jsonl"]


def test_unknown_streams_are_null(tmp_path):
    record = SequenceView(sample=make_sample(kept=None, routes=None, routed=None), token_texts=[""] * 4).record()
    assert (record["kept_sizes"], record["routed"], record["log_ratios"]) == (None, None, None)


def test_a_stream_of_another_length_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"trajectory math/17#3: token_texts has 1 entries for 4 tokens"):
        SequenceView(sample=make_sample(), token_texts=["a"])


@given(st.text(max_size=30))
def test_token_texts_join_to_the_text_of_a_byte_vocabulary(text):
    ids = list(text.encode("utf-8", errors="replace"))
    texts = token_texts(ids, lambda tokens: bytes(tokens).decode("utf-8", errors="replace"))
    assert len(texts) == len(ids)
    assert "".join(texts) == bytes(ids).decode("utf-8", errors="replace")


def test_bytes_that_spell_nothing_are_still_shown():
    decode = lambda tokens: bytes(tokens).decode("utf-8", errors="replace")  # noqa: E731
    assert token_texts([0xFF, 0x61], decode) == ["", "\ufffda"]
    assert token_texts([0x61, 0xE2, 0x82], decode)[0] == "a"
    assert "\ufffd" in "".join(token_texts([0x61, 0xE2, 0x82], decode))
