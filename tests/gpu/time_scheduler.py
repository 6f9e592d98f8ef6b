"""Milliseconds that vLLM's scheduler and the engine's own take for a step, one after the other; needs vLLM, and no GPU.

    python -m tests.gpu.time_scheduler [--sequences 256] [--steps 150] [--turns 3] [--length 200]

Sequences of 48 tokens get one after another, two steps under way at once as in an engine. With ``--length`` they end,
after a tenth to nineteen tenths of it, and others begin in their place. The engine's own records: log-probabilities,
kept sets of 20 ids and 24 bytes a token of routes. ``front end`` is what another process does with a step's records and
with those of the sequences that ended in it. Means, after the first quarter of the steps.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from kernels.reference.draws import DRAW_FIELDS, draws_in
from rl.sample import NDArray
from rollout.drawn import Drawn, StepRows
from rollout.engine_step import Step
from rollout.step_records import StepRecords
from rollout.vllm_recording import RecordingScheduler

BLOCK, NUM_BLOCKS, PROMPT, VOCAB, KEPT, ROW_BYTES = 64, 20_000, 48, 384, 20, 24
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
}


def make_scheduler(kind: type, path: Path, sequences: int) -> Any:
    config = VllmConfig(
        device_config=DeviceConfig(device="cpu"),
        model_config=ModelConfig(model=str(path), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=2048),
        scheduler_config=SchedulerConfig(
            max_num_seqs=sequences,
            max_num_batched_tokens=2048,
            max_model_len=2048,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=True,
            policy="priority",
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
    )
    config.cache_config.num_gpu_blocks = NUM_BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)])
    manager, logs = StructuredOutputManager(config), kind is RecordingScheduler
    return kind(config, cache, structured_output_manager=manager, block_size=BLOCK, log_stats=logs)


def num_tokens(number: int, length: int | None) -> int | None:
    return None if length is None else int(np.random.default_rng(number).uniform(0.1, 1.9) * length)


def add(scheduler: Any, number: int, most: int) -> NDArray:
    tokens = np.random.default_rng(number).integers(0, VOCAB, PROMPT).astype(np.int32)
    sampling = SamplingParams(top_p=0.95, max_tokens=most, ignore_eos=True, detokenize=False, seed=number)
    name = f"{number}.r-12345678"
    asked = EngineCoreRequest(name, tokens.tolist(), None, sampling, None, 0.0, None, None, None)
    scheduler.add_request(Request.from_engine_core_request(asked, get_request_block_hasher(BLOCK, sha256)))
    return tokens


def drawn_by(starts: list[int], counts: list[int], sampled: list[bool]) -> Drawn:
    num_rows = len(counts)
    table = np.zeros(1 + num_rows * (DRAW_FIELDS + VOCAB), np.int32)
    fields, _ = draws_in(table, num_rows)
    fields[:, 1], fields[:, 3], fields[:, 4] = sampled, KEPT, np.arange(num_rows) * KEPT
    table[0] = num_rows * KEPT
    edges = np.concatenate([[0], np.cumsum(counts)])
    rows = StepRows(np.array(starts, np.int64), edges, np.zeros((edges[-1], ROW_BYTES), np.uint8))
    return Drawn.of_table(table, num_rows, VOCAB, rows, lambda row: np.zeros(0, np.int32))


class FrontEnd:
    """What the engine's own process does with a step, and with the requests that ended in it."""

    def __init__(self) -> None:
        self._records = StepRecords(NUM_BLOCKS * BLOCK)

    def open(self, number: int, prompt: NDArray) -> None:
        self._records.open(str(number), prompt)

    def take(self, outputs: Any) -> float:
        """Its seconds."""
        plain = outputs.scheduler_stats and outputs.scheduler_stats.kv_connector_stats
        began = time.perf_counter()
        if plain is not None:
            self._records.add(Step.of_plain(plain))
        return time.perf_counter() - began

    def close(self, name: str, num_tokens: int) -> float:
        """Its seconds."""
        began = time.perf_counter()
        self._records.read(name, num_tokens, width=ROW_BYTES)
        return time.perf_counter() - began


def milliseconds(kind: type, path: Path, options: argparse.Namespace) -> dict[str, float]:
    scheduler, under_way, front = make_scheduler(kind, path, options.sequences), [], FrontEnd()
    scheduler.aux_output_connector = None
    numbers, lengths = itertools.count(), {}

    def begin() -> None:
        number = next(numbers)
        lengths[f"{number}.r-12345678"] = most = num_tokens(number, options.length) or 2 * options.steps
        front.open(number, add(scheduler, number, most))

    for _ in range(options.sequences):
        begin()
    seconds: dict[str, list[float]] = {"schedule": [], "update_from_output": [], "front end": []}
    for _ in range(options.steps):
        began = time.perf_counter()
        planned = scheduler.schedule()
        seconds["schedule"].append(time.perf_counter() - began)
        names = list(planned.num_scheduled_tokens)
        under_way.append((planned, names, [scheduler.requests[name].num_computed_tokens for name in names]))
        if len(under_way) < 2:
            continue
        planned, names, ends = under_way.pop(0)
        sampled = [end >= PROMPT for end in ends]
        output = ModelRunnerOutput(names, {name: at for at, name in enumerate(names)})
        output.sampled_token_ids = [[5] if got else [] for got in sampled]
        if kind is RecordingScheduler:
            counts = list(planned.num_scheduled_tokens.values())
            drawn = drawn_by([end - count for end, count in zip(ends, counts, strict=True)], counts, sampled)
            output.aux_output_connector_output = drawn  # pyright: ignore[reportAttributeAccessIssue]
        began = time.perf_counter()
        outputs = scheduler.update_from_output(planned, output).get(0)
        seconds["update_from_output"].append(time.perf_counter() - began)
        in_front = front.take(outputs) if outputs is not None and kind is RecordingScheduler else 0.0
        for name in [each.request_id for each in outputs.outputs if each.finished] if outputs is not None else ():
            most = lengths.pop(name)
            in_front += front.close(name.partition(".")[0], most) if kind is RecordingScheduler else 0.0
            begin()
        seconds["front end"].append(in_front)
    # The mean: what only some steps do counts too.
    return {name: 1e3 * statistics.fmean(of_all[options.steps // 4 :]) for name, of_all in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.time_scheduler", description="A step's scheduling.")
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, help="150; with --length 4 times as many as that")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--length", type=int, help="tokens of a sequence, on average")
    options = parser.parse_args()
    options.steps = options.steps or 4 * (options.length or 0) or 150  # until as many end as in the long run
    init_none_hash(sha256)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "config.json").write_text(json.dumps(CONFIG))
        for _ in range(options.turns):
            for kind in (AsyncScheduler, RecordingScheduler):
                taken = milliseconds(kind, path, options)
                print(kind.__name__, {name: round(value, 3) for name, value in taken.items()})


if __name__ == "__main__":
    main()
