"""Whole runs of models that are transformers' own, through the real actors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import load_model
from rl.train import main
from tests.rl.tiny_runs import REWARDS, Run, assert_one_sentence, read_lines, write_recipe

DENSE: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
MOE: dict[str, Any] = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "tie_word_embeddings": False,
}
COLD_START = (
    "supervised={steps: 6, batch_size: 8, lr: 1.0e-2, warmup_steps: 0}",
    f"supervised.demonstrations.function={REWARDS}:says_the_prompt",
    "supervised.demonstrations.size=32",
)


def run(folder: Path, init: dict[str, Any], *overrides: str) -> tuple[int, Run]:
    path = write_recipe(folder)
    recipe = yaml.safe_load(path.read_text())
    recipe["model"]["init"] = init
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    arguments = [str(path), f"runs={folder / 'runs'}", "steps=2", *COLD_START, *overrides]
    return main(arguments), Run(folder / "runs" / "tiny")


@pytest.mark.parametrize("init", [DENSE, MOE], ids=["qwen3", "qwen3_moe"])
def test_a_run_from_nothing_to_a_model_that_transformers_loads(cluster: None, tmp_path: Path, init: dict[str, Any]):
    code, ran = run(tmp_path, init)
    assert code == 0
    losses = [row["loss/supervised"] for row in read_lines(ran.path / "supervised.jsonl")]
    assert losses[-1] < losses[0]
    is_moe = init is MOE
    for version, row in enumerate(ran.steps, start=1):
        assert (row["sync/version"], row["sync/verified"]) == (version, 1.0)
        assert row["kept/share"] == 1.0
        assert row["routes/replayed"] == pytest.approx(float(is_moe), abs=0.01)
        # The policy is the one that sampled, so that engine and learner must agree.
        assert row["mismatch/logprob_abs"] < 1e-4
    ours, theirs = load_model(ran.path / "model"), AutoModelForCausalLM.from_pretrained(ran.path / "model").eval()
    initial = load_model(ran.path / "initial_model").state_dict()
    trained = ours.state_dict()
    assert all(not torch.equal(initial[name], trained[name]) for name in initial)
    ids = AutoTokenizer.from_pretrained(ran.path / "model")("1+1=2, 2+2=4", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("override", ["learner.indexer=kl", "supervised.dense_warmup_steps=2"])
def test_an_indexer_cannot_be_trained_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str
):
    code, _ = run(tmp_path, DENSE, override)
    assert code != 0
    key = override.partition("=")[0]
    assert_one_sentence(capsys.readouterr().err, f"{key} trains a lightning indexer, which this model does not have")
