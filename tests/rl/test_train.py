"""Whole runs, from the command to the model that comes out, with real actors."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import load_deepseek_v32, load_model
from rl.errors import RunStopped
from rl.recipe import load_recipe, to_yaml
from rl.train import beside, first_error, is_due, main
from tests.model.test_parity import lowest_index_topk
from tests.rl.metric_page import unexplained
from tests.rl.tiny_runs import REWARDS, Run, read_lines, run_command, run_here, tiny_recipe

EVERY_STEP = [
    *(f"time/{name}_s" for name in ("step", "rollout", "reward", "learn", "sync")),
    *("tokens/generated", "tokens/trained", "tokens_per_s", "reward/mean", "length/mean", "length/truncated"),
    *("groups/zero_variance", "groups/failed", "loss/policy", "loss/kl", "loss/total", "entropy"),
    *("ratio/mean", "ratio/clipped", "grad_norm", "lr", "mask/off_policy", "kept/mean_size", "kept/share"),
    *("routes/replayed", "mismatch/logprob_abs", "mismatch/kl", "staleness/mean", "staleness/max"),
    *("sync/bytes", "sync/verified", "sync/version"),
]
"""The names of the design page, without those that carry a domain."""


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """From a cold start over GRPO on two domains to the saved model, by the command line; and what it printed.

    ``off_policy_delta`` 0 masks every sequence that became less likely and was worse than its siblings.
    """
    done, run = run_command(
        tmp_path_factory.mktemp("full"),
        "steps=4",
        "rollout.max_staleness=2",
        "learner.minibatches=2",
        "learner.indexer=kl",
        "objective.keep_selection=true",
        "objective.off_policy_delta=0.0",
        "supervised={steps: 20, batch_size: 8, lr: 1.0e-2}",
        f"supervised.demonstrations.function={REWARDS}:says_the_prompt",
        "domains.free={thinking: false, group_size: 4, kl_beta: 0}",
        "domains.free.prompts=${domains.sums.prompts}",
        f"domains.free.rewards=[{{use: '{REWARDS}:evenness'}}, {{use: format, weight: 0.1}}]",
        "evaluation={num_prompts: 3, every: 2}",
        "checkpoint.every=2",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return run, done.stdout


def test_the_run_directory_is_complete(full: tuple[Run, str]):
    run, _ = full
    assert run.status["status"] == "finished"
    recipe = load_recipe(run.path / "recipe.yaml")
    assert recipe.supervised.steps == 20
    assert to_yaml(recipe) == (run.path / "recipe.yaml").read_text()
    assert [row["step"] for row in run.rows] == [0, 1, 2, 3, 4]
    assert len((run.path / "supervised.jsonl").read_text().splitlines()) == 20
    assert {path.name for path in (run.path / "samples").iterdir()} == {f"step_{step}.jsonl" for step in range(5)}
    assert {path.name for path in (run.path / "checkpoints").iterdir()} >= {"step_4"}
    report = (run.path / "report.html").read_text()
    assert "reward/mean" in report
    assert not any(reference in report for reference in ('src="http', 'href="http', "@import"))


def test_every_metric_of_the_design_page_is_there_every_step(full: tuple[Run, str]):
    run, _ = full
    for row in run.steps:
        missing = [name for name in EVERY_STEP if row.get(name) is None]
        assert not missing, f"step {row['step']}"
        for domain in ("sums", "free"):
            assert row[f"reward/{domain}"] is not None
            assert row[f"accuracy/{domain}"] is not None
        assert row["grad_share/sums"] + row["grad_share/free"] == pytest.approx(1.0)
        for mean, name in (("length/mean", "reply_length"), ("groups/zero_variance", "zero_variance")):
            low, high = sorted(row[f"{name}/{domain}"] for domain in ("sums", "free"))
            assert low <= row[mean] <= high
    evaluated = [row["step"] for row in run.rows if "eval/sums" in row and "eval/free" in row]
    assert evaluated == [0, 2, 4]


def test_every_metric_is_explained(full: tuple[Run, str]):
    run, _ = full
    cold_start = [name for row in read_lines(run.path / "supervised.jsonl") for name in row]
    assert unexplained({*cold_start, *(name for row in run.rows for name in row)}) == []


def test_tensorboard_holds_the_same_numbers(full: tuple[Run, str]):
    run, _ = full
    events = EventAccumulator(str(run.path)).Reload()
    for name in ("reward/mean", "loss/total", "mask/off_policy"):
        logged = {event.step: event.value for event in events.Scalars(name)}
        assert logged == pytest.approx({row["step"]: row[name] for row in run.steps}, rel=1e-6)


def test_all_four_stabilisers_are_active(full: tuple[Run, str]):
    run, _ = full
    assert any(row["mask/off_policy"] > 0 for row in run.steps)
    assert all(row["kept/share"] == 1.0 for row in run.steps)
    assert all(1 < row["kept/mean_size"] < 260 for row in run.steps)
    assert all(row["routes/replayed"] > 0.99 for row in run.steps)
    assert all(row["selections/replayed"] == 1.0 for row in run.steps)
    # The first mini-batch meets the engine's weights, and those after it, at this learning rate, an indexer gone far.
    assert run.steps[0]["selections/identical"] > 0.4 and all(row["selections/identical"] <= 1 for row in run.steps)
    # Which domain a step's groups come from depends on which were ready first, and at first policy and reference agree.
    assert any(row["loss/kl"] > 0 for row in run.steps) and all(row["loss/kl"] > -1e-9 for row in run.steps)
    # Only one of the two domains has a KL: its mean is over that domain's tokens, the loss over all samples.
    assert sum(row["loss/kl"] for row in run.steps) < 0.1 * sum(row["kl/reference"] for row in run.steps)


def test_staleness_stays_within_its_bound_and_every_update_is_verified(full: tuple[Run, str]):
    run, _ = full
    assert max(row["staleness/max"] for row in run.steps) in (1, 2)
    assert run.steps[0]["staleness/max"] == 0
    assert [row["sync/version"] for row in run.steps] == [1, 2, 3, 4]
    assert all(row["sync/verified"] == 1.0 and row["sync/bytes"] > 100_000 for row in run.steps)


def test_trajectories_hold_what_the_learner_made_of_each_token(full: tuple[Run, str]):
    run, _ = full
    rows = [row for step in range(1, 5) for row in run.trajectories(step)]
    assert len(rows) == 4 * 6
    for row in rows:
        sampled = np.array(row["sampled"], bool)
        ratios = np.array(row["log_ratios"])
        assert np.all(ratios[~sampled] == 0)
        assert row["masked"] == (row["advantage"] < 0 and -ratios[sampled].mean() > 0)
        assert all(size > 0 for size in np.array(row["kept_sizes"])[sampled])
        assert "evenness" in row["parts"]
    assert any(row["masked"] for row in rows)


def test_the_cold_start_learns_and_reaches_the_engines(full: tuple[Run, str]):
    run, _ = full
    losses = [json.loads(line)["loss/supervised"] for line in (run.path / "supervised.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5
    cold = load_model(run.path / "cold_start")
    initial = load_model(run.path / "initial_model")
    assert not torch.equal(cold.lm_head.weight, initial.lm_head.weight)
    # Untrained weights spread over the kept nine tenths of about 260 tokens (5.4 nats).
    assert run.steps[0]["entropy"] < 5.0


def test_the_model_that_comes_out_loads_in_transformers_and_here(full: tuple[Run, str]):
    run, _ = full
    ours = load_deepseek_v32(run.path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(run.path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.path / "model")
    ids = torch.tensor([tokenizer.encode("1+1=2, 2+2=4, 3+3=6", add_special_tokens=False)])
    assert tokenizer.decode(ids[0]) == "1+1=2, 2+2=4, 3+3=6"
    assert ids.shape[1] > ours.config.index_topk
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # An indexer of two heads scores many keys alike, among which transformers would choose any.
        patch.setattr(torch, "topk", lowest_index_topk)
        patch.setattr(torch.Tensor, "topk", lowest_index_topk)
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_timeline_shows_who_did_what(full: tuple[Run, str]):
    run, _ = full
    rows = read_lines(run.path / "timeline.jsonl")
    assert {(row["actor"], row["phase"]) for row in rows} == {
        *(("driver", phase) for phase in ("start", "rollout", "evaluate", "canary")),
        *(("learner", phase) for phase in ("cold start", "step", "sync", "checkpoint", "save", "canary")),
        *(("engine 0", phase) for phase in ("load", "generate", "sync")),
        ("rewards", "score"),
    }
    assert all(0 <= row["begin"] <= row["end"] for row in rows)
    generated = [row for row in rows if row["phase"] == "generate"]
    assert {row["detail"] for row in generated} >= {"version 0", "version 4"}
    spans = sorted((row["begin"], row["end"]) for row in generated)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
    for step in run.steps:  # the clock of the metrics agrees
        (learning,) = (row for row in rows if row["phase"] == "step" and row["step"] == step["step"])
        assert learning["end"] - learning["begin"] <= step["time/learn_s"] + 0.01


def test_what_is_printed_without_a_terminal(full: tuple[Run, str]):
    run, printed = full
    lines = printed.splitlines()
    assert lines[:2] == ["tiny: starting", "tiny: cold start"]
    assert any(line.startswith("tiny: step 4/4  reward ") for line in lines)
    assert any(line.startswith("tiny finished in ") for line in lines)
    for place in ("recipe.yaml", "metrics.jsonl", "samples", "report.html", "model", "checkpoints"):
        assert any(line.endswith(str(run.path / place)) for line in lines), place
    assert not any("ray" in line.lower() or "\x1b" in line or "pid=" in line for line in lines), printed


@pytest.fixture(scope="module")
def lockstep(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """The same strictly on-policy run twice: one optimizer step a batch, no staleness."""
    folder = tmp_path_factory.mktemp("lockstep")
    runs = [run_here(folder, "steps=3", "evaluation.num_prompts=3", name=name) for name in ("first", "second")]
    assert [code for code, _ in runs] == [0, 0]
    return [run for _, run in runs]


def test_lockstep_is_strictly_on_policy(lockstep: list[Run]):
    for row in (row for run in lockstep for row in run.steps):
        assert row["staleness/max"] == 0
        assert row["mask/off_policy"] == 0
        assert row["ratio/mean"] == pytest.approx(1, abs=1e-3)
        assert row["ratio/clipped"] == 0
        assert row["mismatch/logprob_abs"] < 1e-3


def test_the_same_seed_gives_the_same_run(lockstep: list[Run]):
    first, second = lockstep
    for one, other in zip(first.rows, second.rows, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name.startswith(("time/", "speed/", "memory/", "checkpoint/")) or name == "tokens_per_s":
                continue
            # To the last bit, although requests meet other requests in the engine each time.
            assert other[name] == value, f"step {one['step']}: {name}"
    for step in range(4):
        tokens = [[row["token_ids"] for row in run.trajectories(step)] for run in lockstep]
        assert tokens[0] == tokens[1]


def test_every_stabiliser_can_be_switched_off(cluster: None, tmp_path: Path):
    code, run = run_here(
        tmp_path,
        "steps=3",
        "rollout.max_staleness=1",
        "learner.minibatches=2",
        "domains.sums.kl_beta=0",
        "objective={off_policy_delta: null, keep_routing: false, keep_sampling_mask: false}",
    )
    assert code == 0
    for row in run.steps:
        assert row["mask/off_policy"] == row["loss/kl"] == row["kl/reference"] == 0
        assert row["routes/replayed"] == row["kept/share"] == 0
        # Without the kept set the learner's probabilities are those of the whole vocabulary: top_p 0.9 is missing.
        assert row["mismatch/logprob_abs"] > 0.05
        assert row["staleness/max"] <= 1
    assert all(row["sync/verified"] == 1.0 for row in run.steps)


def test_ranks_under_zero_3_feed_two_engines(cluster: None, tmp_path: Path):
    code, run = run_here(
        tmp_path,
        "steps=3",
        "learner={ranks: 2, zero_stage: 3, minibatches: 2}",
        "rollout={engines: 2, max_staleness: 1}",
        "model.init.n_group=2",
        "model.init.topk_group=1",
        "objective.keep_selection=true",
    )
    assert code == 0
    assert all(row["selections/replayed"] == 1.0 and "selections/identical" not in row for row in run.steps)
    assert run.steps[0]["canary/max"] < 1e-4
    assert all(row["sync/verified"] == 1.0 and row["routes/replayed"] > 0.99 for row in run.steps)
    assert run.steps[0]["staleness/max"] == 0
    assert run.steps[-1]["staleness/max"] <= 1
    assert all(row["loss/kl"] > 0 for row in run.steps)
    load_model(run.path / "model")


def test_show_prints_the_whole_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe = tiny_recipe(tmp_path, "steps=7")
    assert main([str(tmp_path / "tiny.yaml"), "--show", "steps=7"]) == 0
    assert capsys.readouterr().out == to_yaml(recipe)
    assert not (tmp_path / "runs").exists()


def test_what_is_due():
    assert [step for step in range(1, 8) if is_due(3, step, 7)] == [3, 6, 7]
    assert [step for step in range(1, 8) if is_due(0, step, 7)] == [7]


async def _fails(error: BaseException) -> None:
    raise error


def test_a_failure_beside_the_loop_ends_it():
    async def loop() -> None:
        async with beside(_fails(ValueError("prompt stream"))):
            await asyncio.Event().wait()

    with pytest.raises(ValueError, match="prompt stream"):
        asyncio.run(asyncio.wait_for(loop(), 5))


def test_the_users_own_mistake_is_told_before_what_follows_from_it():
    follows, cause = RuntimeError("lost peer"), RunStopped("engine 0 died")
    group = BaseExceptionGroup("", [follows, BaseExceptionGroup("", [KeyError("x"), cause])])
    assert first_error(group) is cause
