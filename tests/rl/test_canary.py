"""Canary prompts and alarms in whole runs of the tiny model, with real actors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl.canary import choose, differences
from rl.sample import NDArray
from tests.rl.tiny_runs import REWARDS, make_prompt, make_sample, read_lines, run_here

EVENNESS = f"{{use: '{REWARDS}:evenness'}}"


def test_engine_and_learner_agree_and_rollouts_do_not_notice(cluster: None, tmp_path: Path):
    """Compared before steps 1, 3 and 5; everything else is the same to the last bit as without a canary."""
    settings = ("steps=5", "rollout.max_num_seqs=16", "alarms={mismatch: 1.0e-5, stop: [mismatch]}")
    code, run = run_here(tmp_path, *settings, "canary={every: 2, prompts: 3, max_tokens: 5}", name="with")
    again, plain = run_here(tmp_path, *settings, "canary.every=0", name="without")
    assert code == again == 0
    watched, unwatched = ([_without_clocks(row) for row in one.steps] for one in (run, plain))
    checks = [{name: row.pop(name) for name in list(row) if name.startswith("canary/")} for row in watched]
    assert watched == unwatched
    assert [bool(check) for check in checks] == [True, False, True, False, True]
    for check in checks[::2]:
        assert check.keys() == {"canary/logprob_abs", "canary/max", "canary/kl"}
        assert 0 <= check["canary/logprob_abs"] <= check["canary/max"] < 1e-5
    assert not run.path.joinpath("alarms.jsonl").exists()


def test_a_mismatch_stops_the_run_before_it_has_trained_much(cluster: None, tmp_path: Path):
    """A learner that renormalises over the vocabulary is off by -log of what the engine kept of it, 0.9 or more."""
    code, run = run_here(tmp_path, "objective.keep_sampling_mask=false", "alarms.stop=[mismatch]")
    (row,) = run.steps
    assert 0.09 < row["canary/logprob_abs"] <= row["canary/max"] <= -np.log(0.9) + 1e-4
    assert row["canary/kl"] == pytest.approx(row["canary/logprob_abs"] ** 2 / 2, rel=0.1)
    (alarm,) = read_lines(run.path / "alarms.jsonl")
    assert (alarm["step"], alarm["alarm"], alarm["value"]) == (1, "mismatch", row["canary/logprob_abs"])
    assert code == 1 and run.status["status"] == "stopped"
    saved = "it is one of alarms.stop; step 1 is saved, and the same command goes on from there"
    assert run.status["reason"] == f"{alarm['sentence']}; {saved}"


def test_a_reward_that_anything_pleases(cluster: None, tmp_path: Path):
    rewards = f"domains.sums.rewards=[{{use: '{REWARDS}:full_marks'}}]"
    code, run = run_here(tmp_path, "steps=4", "alarms={window: 3, truncated: null}", rewards)
    assert code == 0
    (alarm,) = read_lines(run.path / "alarms.jsonl")
    assert (alarm["step"], alarm["alarm"], alarm["metric"]) == (3, "saturation", "accuracy/sums")
    assert [row["alarms/active"] for row in run.steps] == [0, 0, 1, 1]


def test_a_learning_rate_that_breaks_the_policy(cluster: None, tmp_path: Path):
    """Within a few steps one token has all of the probability; the reward that decides never sees it."""
    rewards = f"domains.sums.rewards=[{{use: format}}, {EVENNESS}]"
    code, run = run_here(tmp_path, "steps=12", "learner.lr=3.0", "alarms={window: 2, stop: [entropy]}", rewards)
    assert code == 1 and run.status["reason"].startswith("alarm entropy: the entropy fell from ")
    assert run.steps[-1]["entropy"] < 0.5 < run.steps[0]["entropy"]
    assert len(run.steps) < 12
    assert {"dominance", "kept", "entropy"} <= {row["alarm"] for row in read_lines(run.path / "alarms.jsonl")}


def test_the_set_is_fixed_and_of_all_domains():
    prompts = [make_prompt(str(n), domain) for domain, size in (("a", 50), ("b", 2), ("c", 9)) for n in range(size)]
    chosen = choose(prompts, 8, seed=3)
    assert [prompt.domain for prompt in chosen] == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert len({prompt.id for prompt in chosen}) == 8
    assert chosen == choose(prompts, 8, seed=3) != choose(prompts, 8, seed=4)
    assert len(choose(prompts, 100, seed=0)) == 61 and choose([], 4, seed=0) == ()


def test_differences_are_of_tokens_with_the_learners_weights():
    sample = make_sample(make_prompt("1"), num_sampled=4, versions=np.array([-1, -1, 7, 7, 6, 7], np.int32))
    silent = make_sample(make_prompt("2"))
    learned: dict[str, NDArray] = {sample.id: sample.rollout_logprobs + np.array([9, 9, 0.5, -0.25, 9, 0], np.float32)}
    found = differences([sample, silent], learned, 7)
    expected = np.array([0.5, -0.25, 0.0])
    assert found["canary/logprob_abs"] == pytest.approx(0.25)
    assert found["canary/max"] == pytest.approx(0.5)
    assert found["canary/kl"] == pytest.approx(np.mean(np.exp(expected) - 1 - expected))
    assert differences([sample], learned, 8) == differences([], {}, 0) == {}


def _without_clocks(row: dict[str, float]) -> dict[str, float]:
    kept = {name: value for name, value in row.items() if not name.startswith(("time/", "speed/", "tokens_per_s"))}
    return json.loads(json.dumps(kept))
