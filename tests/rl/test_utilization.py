"""Idle time, speed and MFU of a made-up step, and a page that explains every name."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from rl.cluster import NodeAnswer, summarize
from rl.fit import with_keys
from rl.hardware import GIB, Hardware
from rl.plan import Plan, make_plan, recipe_costs
from rl.utilization import Utilization, sequence_lengths
from rollout.engine import EngineStats
from tests.rl.metric_page import documented, unexplained
from tests.rl.tiny_runs import REPOSITORY, make_prompt, make_sample, tiny_recipe
from trainer.pack import Minibatch, WeightedSample, pack_step

SECONDS = {"rollout": 3.0, "learn": 2.0, "sync": 1.0}


def plan(folder: Path, gpu_name: str = "") -> Plan:
    recipe = with_keys(tiny_recipe(folder), {"learner.ranks": 2})
    return make_plan(recipe, recipe_costs(recipe), Hardware(num_gpus=2, gpu_name=gpu_name))


def stats(tokens: int, busy_s: float) -> EngineStats:
    return EngineStats(
        num_generated_tokens=tokens,
        num_prompt_tokens=0,
        num_prefilled_tokens=0,
        num_decode_steps=0,
        busy_s=busy_s,
        num_active=0,
        num_waiting=0,
        version=0,
    )


def minibatch() -> Minibatch:
    """Three samples on two ranks, one of which also has a padding micro-batch."""
    samples = [make_sample(make_prompt(str(number)), 0, num_sampled=number + 2) for number in range(3)]
    step = pack_step([WeightedSample(sample=sample) for sample in samples], ranks=2, micro_tokens=5)
    assert any(not micro.sampled.any() for rank in step.ranks for micro in rank)
    assert sorted(sequence_lengths(step)) == sorted(len(sample) for sample in samples)
    return step


def test_a_step_in_numbers(tmp_path: Path):
    here = plan(tmp_path, "NVIDIA H200")
    meter = Utilization(here)
    meter.begin([stats(1000, 10.0), stats(500, 7.0)])
    step = minibatch()
    row = meter.metrics({**SECONDS, "evaluate": 50.0}, [step, step], [stats(1400, 14.0), stats(600, 9.0)])
    assert row["time/learner_idle_s"] == 3.0
    assert row["time/engines_idle_s"] == 6.0 - (4.0 + 2.0) / 2
    assert row["speed/engines_tokens_per_s"] == 400 / 4 + 100 / 2
    assert row["tokens/trained"] == 2 * (2 + 3 + 4)
    flops = 2 * sum(here.costs.training_flops(length) for length in sequence_lengths(step))
    assert row["speed/learner_tflops"] == pytest.approx(flops / 2.0 / 2 / 1e12)
    assert row["speed/learner_mfu"] == pytest.approx(flops / 2.0 / 2 / 989e12)


def test_counters_go_on_from_step_to_step(tmp_path: Path):
    meter = Utilization(plan(tmp_path))
    meter.begin([stats(0, 0.0)])
    meter.metrics(SECONDS, [], [stats(60, 6.0)])
    assert meter.metrics(SECONDS, [], [stats(90, 7.0)])["speed/engines_tokens_per_s"] == 30.0
    meter.begin([stats(1000, 100.0)])  # an evaluation in between
    idle = meter.metrics(SECONDS, [], [stats(1000, 100.0)])
    assert (idle["speed/engines_tokens_per_s"], idle["time/engines_idle_s"]) == (0.0, 6.0)


def test_there_is_no_mfu_where_the_peak_is_not_known(tmp_path: Path):
    meter = Utilization(plan(tmp_path))
    meter.begin([])
    assert "speed/learner_mfu" not in meter.metrics(SECONDS, [minibatch()], [])


def test_nodes_that_differ_are_as_good_as_the_least():
    big = NodeAnswer(gpus=[("NVIDIA H200", 140 * GIB)] * 8, host_bytes=2000 * GIB)
    small = NodeAnswer(gpus=[("NVIDIA H100 80GB HBM3", 80 * GIB)] * 8, host_bytes=1000 * GIB)
    both = summarize([8, 4], [big, small])
    assert (both.num_gpus, both.num_nodes, both.gpus_per_node) == (12, 2, 6)
    assert (both.gpu_bytes, both.gpu_name) == (80 * GIB, "NVIDIA H100 80GB HBM3")
    assert both.host_bytes == 1000 * GIB
    silent = summarize([1], [replace(big, gpus=[])])
    assert silent.gpu_bytes > 1000 * GIB  # nothing is refused for what nobody knows


def test_the_page_names_what_the_code_logs():
    """Names with their own text in the code; those made of parts are looked for in a run (tests/rl/test_train.py)."""
    folders = ("rl", "trainer", "rollout", "rewards")
    source = "\n".join(path.read_text() for folder in folders for path in (REPOSITORY / folder).rglob("*.py"))
    for name in documented():
        literal = name.partition("<")[0]
        built = re.fullmatch(r"(?:time|memory)/(\w+)_(?:s|gb)", name) or re.fullmatch(r"faults/(\w+)", name)
        spelt = f'"{name}"' in source or (literal != name and literal in source)
        assert spelt or (built and f'"{built[1]}"' in source), f"nothing logs {name}"


def test_names_that_are_not_explained_are_found():
    assert unexplained(["reward/math", "reward/math/format", "step", "loss/policy"]) == []
    assert unexplained(["reward/math/format/x", "step", "losses"]) == ["losses", "reward/math/format/x"]
