"""Whole runs of a model so small that starting the actors is what takes the time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from rl.config import Recipe
from rl.recipe import load_recipe
from rl.sample import Kept, Prompt, Sample, Status
from rl.train import main

REPOSITORY = Path(__file__).resolve().parents[2]
REWARDS = "tests.rl.tiny_rewards"

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "steps": 2,
    "prompts_per_step": 4,
    "model": {
        "max_context": 40,
        "init": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "moe_intermediate_size": 16,
            "num_hidden_layers": 3,
            "first_k_dense_replace": 1,
            "num_attention_heads": 2,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 8,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
        },
    },
    "domains": {
        "sums": {
            "prompts": "sums.jsonl",
            "thinking": False,
            "group_size": 4,
            "kl_beta": 0.1,
            "rewards": [{"use": f"{REWARDS}:evenness"}],
        }
    },
    "sampling": {"top_p": 0.9, "max_tokens": 8},
    "rollout": {"max_num_seqs": 32, "max_staleness": 0},
    "learner": {"micro_tokens": 256, "lr": 1.0e-2},
    "log_samples": 6,
}


@dataclass(frozen=True, slots=True)
class Run:
    """What a run left behind."""

    path: Path

    @property
    def status(self) -> dict[str, Any]:
        return json.loads((self.path / "status.json").read_text())

    @property
    def rows(self) -> list[dict[str, float]]:
        """Metrics of every step, those of step 0 included."""
        return read_lines(self.path / "metrics.jsonl")

    @property
    def steps(self) -> list[dict[str, float]]:
        return [row for row in self.rows if row["step"] > 0]

    def trajectories(self, step: int) -> list[dict[str, Any]]:
        return read_lines(self.path / "samples" / f"step_{step}.jsonl")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_recipe(folder: Path, num_prompts: int = 24) -> Path:
    """The tiny recipe with its prompts, ready for overrides."""
    lines = (json.dumps({"prompt": f"{n % 5}+{n}=", "answer": n % 5 + n}) for n in range(num_prompts))
    (folder / "sums.jsonl").write_text("".join(line + "\n" for line in lines))
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def run_here(folder: Path, *overrides: str, name: str = "tiny") -> tuple[int, Run]:
    """Runs the tiny recipe in this process, on the cluster it is connected to; the exit code and what was left."""
    arguments = [str(write_recipe(folder)), f"runs={folder / 'runs'}", f"name={name}", *overrides]
    return main(arguments), Run(folder / "runs" / name)


def command(folder: Path, *overrides: str) -> list[str]:
    """The same as a user types it."""
    return [sys.executable, "-m", "rl.train", str(write_recipe(folder)), f"runs={folder / 'runs'}", *overrides]


def run_command(folder: Path, *overrides: str) -> tuple[subprocess.CompletedProcess[str], Run]:
    """Runs the tiny recipe from the command line, with a cluster of its own."""
    done = subprocess.run(
        command(folder, *overrides), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=200
    )
    return done, Run(folder / "runs" / "tiny")


def environment() -> dict[str, str]:
    """Without what this process has inherited or learnt about clusters."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}


def tiny_recipe(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(write_recipe(folder), overrides)


def make_sample(prompt: Prompt, index: int = 0, *, num_sampled: int = 3, **changes: Any) -> Sample:
    """A sample with two prompt tokens; ``changes`` replace fields."""
    sampled = np.array([False] * 2 + [True] * num_sampled)
    token_ids = np.arange(10, 12 + num_sampled, dtype=np.int32)
    sample = Sample(
        prompt=prompt,
        index=index,
        token_ids=token_ids,
        sampled=sampled,
        rollout_logprobs=np.where(sampled, -0.5, 0).astype(np.float32),
        versions=np.where(sampled, 0, -1).astype(np.int32),
        routes=np.zeros((len(sampled), 2, 2), np.uint8),
        routed=np.arange(len(sampled)) < len(sampled) - 1,
        kept=Kept.from_rows([token_ids[t : t + 1] if sampled[t] else token_ids[:0] for t in range(len(sampled))]),
        status=Status.FINISHED,
        reply="x" * num_sampled,
    )
    return replace(sample, **changes)


def make_prompt(name: str, domain: str = "sums") -> Prompt:
    return Prompt(id=f"{domain}/{name}", domain=domain, messages=({"role": "user", "content": name},), thinking=False)


def assert_one_sentence(stderr: str, *parts: str) -> None:
    """Exactly what a user should read: one line from keel, with the place of the mistake in it."""
    (line,) = stderr.splitlines()
    assert line.startswith("keel: "), line
    for part in parts:
        assert part in line, line
