"""The programs that take figures on a GPU machine, as far as a CPU goes: rehearsals with the torch engine, tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from model import outline
from rl.system import prepare_model
from rollout.vllm_engine import engine_arguments
from tests.gpu import measure
from tests.gpu.loop_figures import figures_of_run
from tests.gpu.plain_copy import copy_speed
from tests.rl.tiny_runs import tiny_recipe, write_recipe


def options(folder: Path, command: str, *more: str) -> list[str]:
    return [command, "--recipe", str(write_recipe(folder)), "--out", str(folder / "figures.json"), *more]


def test_a_rehearsal_of_throughput(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    sizes = ("--requests", "4", "--prompt", "6", "--tokens", "5", "--passes", "1")
    assert measure.main(options(tmp_path, "throughput", *sizes)) == 0
    seen = json.loads((tmp_path / "figures.json").read_text())
    assert seen["bare"]["tokens_per_s"] > 0
    assert seen["ratio"] == seen["recording"]["tokens_per_s"] / seen["bare"]["tokens_per_s"]
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith("| throughput | start_s | tokens_per_s |")
    assert [row.split(" | ")[0] for row in table[2:4]] == ["| bare", "| recording"]
    assert table[-1].startswith("| ratio | ")


def test_a_rehearsal_of_mismatch(tmp_path: Path):
    """On a CPU in fp32 both sides agree to rounding, and leaving out what was recorded shows."""
    sizes = ("--requests", "6", "--prompt", "6", "--tokens", "8")
    assert measure.main(options(tmp_path, "mismatch", *sizes, "sampling.top_p=0.5")) == 0
    seen = json.loads((tmp_path / "figures.json").read_text())
    short = {name.rpartition("tokens, ")[2]: case for name, case in seen.items() if name.startswith("short")}
    assert short["routes and kept sets"]["mean_abs"] < 1e-4
    assert short["routes and kept sets"]["tokens"] == 6 * 8
    assert short["routes"]["mean_abs"] > 0.1
    assert any(name.startswith("long, 31 + 8 tokens") for name in seen)


def test_bare_vllm_differs_in_what_it_records_only(tmp_path: Path):
    recipe = tiny_recipe(tmp_path, "rollout.engine=vllm", "model.dtype=bfloat16")
    path = prepare_model(recipe, tmp_path)
    ours = engine_arguments(str(path), outline(path), measure.vllm_settings(recipe))
    bare = measure.bare_arguments(ours)
    assert ours["enable_return_routed_experts"] and ours["return_sampling_mask"]
    assert not bare["enable_return_routed_experts"] and not bare["return_sampling_mask"]
    same = {name: value for name, value in bare.items() if ours[name] == value}
    assert {"model", "dtype", "max_num_seqs", "gpu_memory_utilization", "enforce_eager", "seed"} <= same.keys()


@pytest.mark.parametrize("across", [False, True])
def test_a_copy_has_a_speed(across: bool):
    assert copy_speed(1 << 20, across=across, on_gpu=False) > 0


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="two GPUs can copy")
def test_a_copy_that_fails_is_not_waited_for():
    with pytest.raises(RuntimeError, match="should copy failed"):
        copy_speed(1 << 20, across=True, on_gpu=True)


def row(step: int, seconds: float, **more: float) -> dict[str, float]:
    times = {
        f"time/{name}_s": seconds for name in ("rollout", "learn", "sync", "learner_idle", "engines_idle", "reward")
    }
    return {"step": step, **times, "time/step_s": 3 * seconds, "reward/mean": step / 10, "tokens_per_s": 9.0} | more


def test_figures_of_a_run(tmp_path: Path):
    lines = [
        {"step": 0, "eval/spell": 0.25},
        row(1, 90.0, **{"accuracy/spell": 0.3}),
        row(2, 80.0, **{"accuracy/spell": 0.4}),
        row(3, 2.0, **{"accuracy/spell": 0.5}),
        row(4, 4.0, **{"accuracy/spell": 0.6}),
        row(5, 50.0, **{"accuracy/spell": 0.7, "eval/spell": 0.75, "time/evaluate_s": 9.0}),
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen, curve = figures_of_run(tmp_path)
    # The steps that warm up, and the one with an evaluation in it, are left out of the medians.
    assert (seen["time/learn_s"], seen["time/step_s"], seen["tokens_per_s"]) == (3.0, 9.0, 9.0)
    assert "speed/learner_mfu" not in seen
    assert (seen["eval/spell before"], seen["eval/spell after"], seen["eval/spell gain, points"]) == (0.25, 0.75, 50.0)
    assert curve.splitlines()[0] == "step,reward/mean,accuracy,eval,mismatch/kl,time/step_s"
    assert curve.splitlines()[1] == "0,,,0.25,,"
    assert curve.splitlines()[-1] == "5,0.5,0.7,0.75,,150.0"


def test_numbers_are_short():
    assert measure.number(0.00012345) == "0.000123"
    assert measure.number(12345.6) == "12,346"
    assert measure.number([1.5, 2]) == "1.5, 2"
