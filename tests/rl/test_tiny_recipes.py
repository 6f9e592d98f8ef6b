"""The recipes of recipes/tiny, each run for one step through the real actors, with the data that ship.

KEEL_TWINS_IN_FULL=1 python -m pytest tests/rl/test_tiny_recipes.py -k as_typed     # each of them as it is, timed
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model.tokenizer import build_byte_tokenizer
from rewards.saved import read_samples
from rl.evaluate import main as evaluate_command
from rl.recipe import load_recipe
from rl.train import main
from rollout.context import SUMMARY_REQUEST
from tests.rl.test_shipped_recipes import DOMAINS
from tests.rl.tiny_runs import REPOSITORY, Run, environment

TINY = {path.stem: path for path in sorted((REPOSITORY / "recipes/tiny").glob("*.yaml"))}


def run_tiny(folder: Path, name: str, *overrides: str) -> Run:
    assert main([str(TINY[name]), f"runs={folder}", "steps=1", "log_samples=100", *overrides]) == 0
    return Run(folder / f"tiny_{name}")


@pytest.fixture(scope="module")
def twin(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """Runs a twin, the first time that it is asked for."""

    @cache
    def run(name: str) -> Run:
        cold = ["supervised.steps=3", "supervised.demonstrations.size=16"] if name == "programming" else []
        return run_tiny(tmp_path_factory.mktemp(name), name, *cold)

    return run


def test_every_recipe_has_a_twin_with_its_rewards():
    assert set(TINY) == DOMAINS
    for name, path in TINY.items():
        twin, real = load_recipe(path).domains, load_recipe(REPOSITORY / f"recipes/{name}.yaml").domains
        assert set(twin) == set(real)
        for domain, settings in twin.items():
            ours, theirs = ([use.use for use in one.rewards] for one in (settings, real[domain]))
            # Without reasoning there is none whose language could be judged.
            assert ours == [use for use in theirs if settings.thinking or use != "language_consistency"]
            assert settings.kl_beta == real[domain].kl_beta
            tools, meant = settings.environment, real[domain].environment
            assert (tools and tools.use) == (meant and meant.use)


@pytest.mark.parametrize("name", sorted(DOMAINS - {"mixed"}))
def test_a_twin_runs(name: str, twin: Callable[[str], Run]):
    run = twin(name)
    recipe = load_recipe(TINY[name])
    (row,) = run.steps
    assert row["samples/failed"] == 0 and row["sync/verified"] == row["routes/replayed"] == 1.0
    seen = {trajectory["domain"] for trajectory in run.trajectories(1)} if name == "logic" else set(recipe.domains)
    assert seen == set(recipe.domains)
    for domain, settings in recipe.domains.items():
        for use in settings.rewards:
            assert np.isfinite(row[f"reward/{domain}/{use.use.rpartition(':')[2]}"])
    if any(settings.environment for settings in recipe.domains.values()):  # the cold start taught a call
        turns = [turn for trajectory in run.trajectories(1) for turn in trajectory["turns"]]
        answered = [turn for turn in turns if turn["calls"] and not any(one["failed"] for one in turn["results"])]
        assert row[f"reward/{name}/tool_protocol/calls"] > 0 and answered
        assert all(len(turn["results"]) == len(turn["calls"]) for turn in answered)
    if name == "agentic_coding":  # the tests ran: what was not touched passes, what was not mended fails
        assert row["reward/agentic_coding/test_suite/not_run"] == 0
        assert row["reward/agentic_coding/test_suite/pass_to_pass"] == 1
        assert row["reward/agentic_coding/test_suite/fail_to_pass"] == 0
    if name == "general_qa":  # what the judge says is a verdict, though a random one
        assert row["reward/general_qa/rubric/judge_calls"] > 0 == row["reward/general_qa/rubric/unreadable"]
        assert len({trajectory["reward"] for trajectory in run.trajectories(1)}) > 2


@pytest.mark.parametrize(("strategy", "sequences"), [("none", 1), ("discard_75", 2), ("summary", 2)])
def test_a_searching_model_is_evaluated_with_another_strategy(
    twin: Callable[[str], Run], strategy: str, sequences: int, tmp_path: Path
):
    """By the command line; the twin itself discards all. Whatever is dropped stays a sequence of the attempt."""
    kept = tmp_path / "attempts.jsonl"
    model = twin("agentic_search").path / "cold_start"
    command = [str(TINY["agentic_search"]), "--model", str(model), "--prompts", "2", "--samples", "1"]
    assert evaluate_command([*command, "--context", strategy, "--trajectories", str(kept)]) == 0
    attempts = [one for one in read_samples(kept) if one.turns[0].calls]
    assert attempts and {len(one.sequences) for one in attempts} == {sequences}
    assert all(one.turns[0].results and len(one.turns) == 2 for one in attempts)
    text = build_byte_tokenizer().decode(attempts[0].sequences[-1].token_ids.tolist())
    assert (SUMMARY_REQUEST in str(text)) == (strategy == "summary")


def test_one_stage_over_all_domains(cluster: None, tmp_path: Path):
    run = run_tiny(tmp_path, "mixed", "rollout.max_staleness=0")
    domains = load_recipe(TINY["mixed"]).domains
    (row,) = run.steps
    assert row["samples/failed"] == 0
    groups: dict[str, list[dict[str, Any]]] = {}
    for trajectory in run.trajectories(1):
        groups.setdefault(trajectory["prompt"], []).append(trajectory)
    drawn = [next(iter(members))["domain"] for members in groups.values()]
    assert {name: drawn.count(name) for name in domains} == {name: domain.weight for name, domain in domains.items()}
    for members in groups.values():
        domain = domains[members[0]["domain"]]
        rewards = np.array([member["reward"] for member in members])
        advantages = [member["advantage"] for member in members]
        assert len(members) == domain.group_size
        np.testing.assert_allclose(advantages, domain.advantage_scale * (rewards - rewards.mean()), atol=1e-9)
    assert {name for name in domains if f"reward/{name}" in row and f"accuracy/{name}" in row} == set(domains)


@pytest.mark.skipif("KEEL_TWINS_IN_FULL" not in os.environ, reason="KEEL_TWINS_IN_FULL=1 runs every twin to its end")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", sorted(TINY))
def test_a_twin_as_typed_takes_less_than_two_minutes(name: str, tmp_path: Path):
    """On two cores that have nothing else to do, starting Ray and Python included."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "rl.train", f"recipes/tiny/{name}.yaml", f"runs={tmp_path}"],
        cwd=REPOSITORY,
        env=environment(),
        timeout=600,
    )
    seconds = time.monotonic() - began
    run = Run(tmp_path / f"tiny_{name}")
    print(f"{name}: {seconds:.0f} s at a load of {os.getloadavg()[0]:.1f}")
    assert done.returncode == 0 and len(run.steps) == load_recipe(TINY[name]).steps
    assert all(row["samples/failed"] == 0 for row in run.steps)
    assert seconds < 120
