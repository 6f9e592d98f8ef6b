"""Where the learner's seconds go: forward and backward of packed micro-batches of one model, without Ray or DeepSpeed.

    python -m tests.gpu.profile_step [--tokens 8192] [--length 410] [--rows 25] [--trace trace.json] [size=value ...]

The model is that of recipes/gpu/dsv32_shared_1gpu.yaml unless sizes (fields of `ModelConfig`) say otherwise. Prints
seconds of each part with and without the indexer's loss, then the kernels and the operators that take the most, the
number of launches, and the share of time in which the GPU had work: what is lost beyond that is the CPU's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from model import DeepseekV32, ModelConfig
from trainer.pack import Microbatch
from trainer.policy import PackedTokens, Policy

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "q_lora_rank": 512,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 128,
    "n_routed_experts": 32,
    "num_experts_per_tok": 4,
}


def microbatch(num_tokens: int, length: int, vocab_size: int) -> Microbatch:
    """Sequences of one length, of which the last tenth was sampled."""
    generator = np.random.default_rng(0)
    count = num_tokens // length
    sampled = np.tile(np.arange(length) >= length - max(1, length // 10), count)
    zeros = np.zeros(count * length, np.float32)
    return Microbatch(
        sample_ids=tuple(map(str, range(count))),
        domains=("",) * count,
        episodes=np.arange(count, dtype=np.int32),
        episode_tokens=np.full(count, max(1, length // 10), np.int32),
        token_ids=generator.integers(0, vocab_size, count * length).astype(np.int32),
        positions=np.tile(np.arange(length, dtype=np.int32), count),
        cu_seqlens=np.arange(0, count * length + 1, length, dtype=np.int32),
        sampled=sampled,
        rollout_logprobs=zeros,
        advantages=zeros,
        kl_beta=zeros,
    )


class Parts:
    """Seconds of a step's parts on the device."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.seconds: dict[str, list[float]] = {}

    def run(self, name: str, part: Callable[[], Any]) -> Any:
        self._wait()
        began = time.perf_counter()
        result = part()
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - began)
        return result

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values[1:] or values) for name, values in self.seconds.items()}


def step(policy: Policy, tokens: PackedTokens, indexer_loss: Any, parts: Parts | None = None) -> None:
    run = parts.run if parts else lambda name, part: part()
    output = run("forward", lambda: policy(tokens, indexer_loss=indexer_loss))
    loss = -output.logprobs.sum()
    if indexer_loss is not None:
        loss = loss + output.indexer_loss
    run("backward", loss.backward)
    policy.zero_grad(set_to_none=False)


def profiled(policy: Policy, tokens: PackedTokens, options: argparse.Namespace, device: str) -> dict[str, Any]:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    began = time.perf_counter()
    with profile(activities=activities) as profiler:
        step(policy, tokens, "sparse")
        if device == "cuda":
            torch.cuda.synchronize()
    wall = time.perf_counter() - began
    averages = profiler.key_averages()
    sort = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(averages.table(sort_by=sort, row_limit=options.rows, max_name_column_width=70))
    print(averages.table(sort_by="self_cpu_time_total", row_limit=options.rows, max_name_column_width=70))
    if options.trace:
        profiler.export_chrome_trace(str(options.trace))
    kernels = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    launches = {event.key: event.count for event in averages if "LaunchKernel" in event.key}
    return {
        "profiled_wall_s": wall,
        "gpu_busy_s": sum(event.device_time_total for event in kernels) / 1e6,
        "launches": launches,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.profile_step", description="The learner's seconds.")
    parser.add_argument("sizes", nargs="*", default=[], metavar="size=value", help="fields of the model's config")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=410, help="of a sequence")
    parser.add_argument("--rows", type=int, default=25, help="of the tables")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--trace", type=Path, help="a file for Chrome's trace viewer")
    options = parser.parse_intermixed_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {name: json.loads(value) for name, _, value in (size.partition("=") for size in options.sizes)}
    config = ModelConfig(**SIZES | sizes, max_position_embeddings=max(4096, options.length))
    torch.manual_seed(0)
    model = DeepseekV32(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    policy = Policy(model)
    tokens = PackedTokens.of(microbatch(options.tokens, options.length, config.vocab_size), device)
    seen: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    for mode in (None, "sparse"):
        parts = Parts(device)
        for _ in range(options.repeats):
            step(policy, tokens, mode, parts)
        seen[f"indexer loss {mode}"] = {**parts.medians(), "first": parts.seconds["forward"][0]}
    seen |= profiled(policy, tokens, options, device)
    print(json.dumps(seen, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
