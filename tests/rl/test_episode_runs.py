"""Whole runs whose domain has an environment: trained through the real actors, then evaluated from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rewards.saved import read_samples
from rl.evaluate import main as evaluate_command
from tests.rl.tiny_rewards import seen
from tests.rl.tiny_runs import REWARDS, read_lines, run_here, write_recipe

pytestmark = pytest.mark.usefixtures("cluster")

ENVIRONMENT = (
    "model.max_context=120",
    "sampling.max_tokens=6",
    "domains.sums.environment={use: 'tests.rollout.plugged:Insistent', max_turns: 5, args: {times: 2}}",
)


def test_episodes_with_a_user_are_trained_and_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The cold start teaches one short answer, so that nearly every episode hears the user out: three sequences."""
    status, run = run_here(
        tmp_path,
        *ENVIRONMENT,
        "steps=1",
        "objective.keep_selection=true",
        "supervised={steps: 40, batch_size: 16, lr: 1.0e-2, warmup_steps: 0}",
        "supervised.demonstrations.function=tests.rl.tiny_rewards:says_k",
        "evaluation={num_prompts: 2, samples_per_prompt: 2}",
        f"domains.sums.rewards=[{{use: '{REWARDS}:evenness'}}, {{use: '{REWARDS}:seen', weight: 0}}]",
    )
    assert status == 0 and run.status["status"] == "finished"
    (step,) = run.steps
    # Every token of every sequence was trained, with its route, and the learner agrees with the engine about it.
    assert step["tokens/trained"] == step["tokens/generated"] > 16 * 2
    assert step["routes/replayed"] == step["selections/replayed"] == step["kept/share"] == step["sync/verified"] == 1.0
    assert step["mismatch/logprob_abs"] < 1e-4
    turns = [trajectory["turns"] for trajectory in run.trajectories(1)]
    assert max(map(len, turns)) == 3
    assert all(turn["user"] == "again" for turn in max(turns, key=len)[:-1])

    # A reward sees of what was saved what it saw in the run.
    samples = read_samples(run.path / "samples" / "step_1.jsonl")
    assert max(len(sample.earlier) for sample in samples) == 2
    assert [seen(sample) for sample in samples] == [row["parts"]["seen"] for row in run.trajectories(1)]

    out = tmp_path / "figures.json"
    arguments = [str(write_recipe(tmp_path)), *ENVIRONMENT, "--model", str(run.path / "model")]
    kept = tmp_path / "attempts.jsonl"
    files = ["--out", str(out), "--trajectories", str(kept)]
    assert evaluate_command([*arguments, "--prompts", "3", "--samples", "2", "--pass-at", "1,2", *files]) == 0
    figures = json.loads(out.read_text())["domains"]["sums"]
    assert figures["prompts"] == 3 and 1 < figures["steps"] <= 3 and figures["tokens"] > 1
    assert figures["accuracy"] == pytest.approx(figures["pass@1"]) and figures["pass@2"] >= figures["pass@1"]
    assert "sums: prompts 3, accuracy" in capsys.readouterr().out
    attempts = read_samples(kept)
    assert len(attempts) == 6 and np.mean([max(1, len(one.turns)) for one in attempts]) == figures["steps"]
    assert np.mean([row["parts"]["evenness"] >= 1 for row in read_lines(kept)]) == figures["accuracy"]

    assert evaluate_command([str(write_recipe(tmp_path)), "--prompts", "2"]) == 1
    assert "name a trained one with --model" in capsys.readouterr().err
    assert evaluate_command([*arguments, "--prompts", "2", "--pass-at", "3"]) == 1
    assert "pass@k needs at least k samples" in capsys.readouterr().err
