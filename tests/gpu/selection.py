"""What engine and learner select on the same weights, and what that is worth: one engine a run.

    python -m tests.gpu.selection keel        # rollout.dsa: keel
    python -m tests.gpu.selection invariant   # the same in vLLM's batch-invariant mode
    python -m tests.gpu.selection vllm        # rollout.dsa: vllm, with and without a learner that imitates it
    python -m tests.gpu.selection dense       # a model of the same size whose index_topk leaves nothing out

Random weights, whose index scores are nearly ties, and contexts of several times index_topk. Prints JSON: learner minus
engine per sampled token; of all query positions that see more than index_topk keys, over all layers, the share whose
sets are identical, and what the sets share; tokens a second.

With Keel's attention the engine returns what it selected along with every completion, as `objective.keep_selection`
has it: "own selections replayed" are those, in the learner. `--unrecorded` leaves that out, to see what it costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from model import DeepseekV32, GivenKeys, KeySelection, load_deepseek_v32, save_model
from model.indexer import IndexArithmetic
from rl.config import Sampling
from rollout import vllm_engine
from rollout.engine import Completion, Request
from rollout.vllm_engine import EngineSettings, VllmEngineActor
from tests.gpu.replay import figures, log_ratios, packed
from trainer.selections import key_selection, measure_selections

CONTEXT, TOP_K, LONG, NEW_TOKENS, COUNT = 4096, 512, 3000, 64, 8
CASES = ("keel", "invariant", "vllm", "dense")
Selected = dict[int, torch.Tensor]  # of one sequence, by layer: int32 [T, k]


def make_model(path: Path, index_topk: int) -> None:
    from tests.gpu.test_vllm_engine import CONFIG

    torch.manual_seed(0)
    module = DeepseekV32(replace(CONFIG, index_topk=index_topk, max_position_embeddings=CONTEXT))
    save_model(module.to(torch.bfloat16), path)


def make_requests(name: str, count: int, length: int, new_tokens: int) -> list[Request]:
    generator = np.random.default_rng(list(name.encode()))
    return [
        Request(
            id=f"{name}{number}",
            token_ids=generator.integers(0, 1000, length).astype(np.int32),
            sampling=Sampling(top_p=0.95, max_tokens=new_tokens),
            seed=number,
        )
        for number in range(count)
    ]


def whole(request: Request, completion: Completion) -> np.ndarray:
    return np.concatenate([request.token_ids, completion.token_ids]).astype(np.int32)


def record_vllm(worker: Any) -> None:
    """Runs in vLLM's worker: keeps what its own indexer selects, which it does not return."""
    from vllm.models.deepseek_v32 import attention  # pyright: ignore[reportMissingImports]

    kept: dict[str, list[torch.Tensor]] = {}
    theirs = attention.sparse_attn_indexer

    def recording(hidden: torch.Tensor, prefix: str, *arguments: Any, **options: Any) -> torch.Tensor:
        out = theirs(hidden, prefix, *arguments, **options)
        if not torch.cuda.is_current_stream_capturing():
            kept.setdefault(prefix, []).append(out[: hidden.shape[0]].cpu())
        return out

    attention.sparse_attn_indexer = recording
    worker.keel_kept = kept


def recorded_vllm(worker: Any) -> dict[str, torch.Tensor]:
    kept = {name: torch.cat(parts) for name, parts in worker.keel_kept.items()}
    worker.keel_kept.clear()
    return kept


async def engine_selections(
    actor: VllmEngineActor, ours: bool, sequences: Sequence[np.ndarray]
) -> tuple[list[Selected], list[Completion]]:
    """What the engine selects for every position of whole sequences, each prefilled alone, and what that completes."""
    if not ours:
        await actor._engine.collective_rpc(record_vllm)
    found, completions = [], []
    for number, ids in enumerate(sequences):
        await actor._engine.reset_prefix_cache()
        if ours:
            await actor._engine.collective_rpc("record_selections", args=(True,))
        else:
            await actor._engine.collective_rpc(recorded_vllm)
        request = Request(id=f"again{number}", token_ids=ids, sampling=Sampling(max_tokens=1), seed=0)
        completions += await actor.generate([request])
        if ours:
            (kept,) = await actor._engine.collective_rpc("recorded_selections")
        else:
            (kept,) = await actor._engine.collective_rpc(recorded_vllm)
        found.append({int(name.split(".layers.")[1].split(".")[0]): rows[: len(ids)] for name, rows in kept.items()})
    if ours:
        await actor._engine.collective_rpc("record_selections", args=(False,))
    return found, completions


def learner_selections(module: DeepseekV32, ids: np.ndarray) -> Selected:
    own: Selected = {}
    with torch.no_grad():
        module.backbone(torch.tensor(ids, device="cuda").long()[None], selection=KeySelection(own=own))
    return {layer: rows.cpu() for layer, rows in own.items()}


def given_keys(selected: Selected) -> KeySelection:
    """Replays what was selected for every position of one sequence, below index_topk too."""
    keys = torch.stack([selected[layer] for layer in sorted(selected)], dim=1).int().cuda()
    return KeySelection(given=GivenKeys(queries=torch.arange(len(keys)).cuda(), keys=keys, complete=True))


def carried(completion: Completion) -> Selected:
    """What a completion says was selected: int32 [T - 1, k] a layer, as its last token was never fed; -1 where it says
    nothing."""
    selections = completion.selections
    assert selections is not None
    rows = np.full((len(selections), selections.num_layers, selections.top_k), -1, np.int32)
    rows[selections.recorded] = selections.keys
    return {layer: torch.tensor(rows[:-1, layer]) for layer in range(selections.num_layers)}


def against_second_prefill(completions: Sequence[Completion], again: Sequence[Selected]) -> dict[str, Any]:
    """`agreement` of what completions carry with what the engine selects when their sequences are prefilled whole."""
    fed = [{layer: rows[:-1] for layer, rows in selected.items()} for selected in again]
    return agreement(list(map(carried, completions)), fed)


def coverage(requests: Sequence[Request], completions: Sequence[Completion]) -> dict[str, float]:
    """Of the positions that leave keys out and that later tokens look back on, those whose sets the learner replays."""
    tallies = [
        measure_selections(micro, key_selection(micro, TOP_K, "cpu"), TOP_K)["selections/replayed"]
        for micro in packed(requests, completions)
    ]
    needed, replayed = (sum(getattr(tally, name) for tally in tallies) for name in ("count", "total"))
    return {"positions": needed, "not_recorded": needed - replayed, "replayed": replayed / needed}


def bits(places: torch.Tensor) -> torch.Tensor:
    marks = torch.zeros(places.shape[0], CONTEXT + 1, dtype=torch.bool)
    return marks.scatter_(1, torch.where(places < 0, CONTEXT, places).long(), True)[:, :CONTEXT]


def agreement(theirs: Sequence[Selected], ours: Sequence[Selected]) -> dict[str, Any]:
    """Share of positions with identical sets, and the mean share of a set that the other has too."""
    same: dict[int, list[float]] = {}
    common: dict[int, list[float]] = {}
    for engine, learner in zip(theirs, ours, strict=True):
        for layer in sorted(learner):
            a, b = bits(engine[layer][TOP_K:]), bits(learner[layer][TOP_K:])
            same.setdefault(layer, []).append(float((a == b).all(dim=1).float().mean()))
            common.setdefault(layer, []).append(float(((a & b).sum(dim=1) / b.sum(dim=1)).mean()))
    return {
        "identical_by_layer": {layer: float(np.mean(shares)) for layer, shares in same.items()},
        "common_by_layer": {layer: float(np.mean(shares)) for layer, shares in common.items()},
        "identical": float(np.mean([share for shares in same.values() for share in shares])),
        "common": float(np.mean([share for shares in common.values() for share in shares])),
    }


async def alone_and_together(actor: VllmEngineActor, top_p: float) -> dict[str, float]:
    """Equal tokens and equal bits of log-probabilities: the same requests in a batch of others, and one by one."""
    requests = [
        replace(request, id=f"{request.id}-{top_p}", sampling=replace(request.sampling, top_p=top_p))
        for request in make_requests("company", 24, 700, 32)
    ]
    together = await actor.generate(requests)
    equal, same_bits, largest = [], [], 0.0
    for request, in_company in list(zip(requests, together, strict=True))[:4]:
        await actor._engine.reset_prefix_cache()
        (alone,) = await actor.generate([replace(request, id=f"{request.id}-alone")])
        equal.append(np.array_equal(alone.token_ids, in_company.token_ids))
        same_bits.append(float(np.mean(alone.logprobs == in_company.logprobs)))
        largest = max(largest, float(np.abs(alone.logprobs - in_company.logprobs).max()))
    return {"equal_tokens": float(np.mean(equal)), "equal_bits": float(np.mean(same_bits)), "largest": largest}


async def speed(actor: VllmEngineActor, length: int) -> float:
    best = 0.0
    for turn in range(2):  # the first compiles
        requests = make_requests(f"speed{length}-{turn}", 64, length, 128)
        began = time.perf_counter()
        outputs = await actor.generate(requests)
        best = max(best, sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - began))
    return best


def mismatches(
    module: DeepseekV32,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    arithmetic: IndexArithmetic,
    selected: Sequence[Selected] | None = None,
    *,
    own: bool = False,
) -> dict[str, float]:
    """Learner minus engine; where `selected` is given, that is replayed, and with `own` what completions carry."""
    module.index_arithmetic = arithmetic
    if selected is None:
        return figures(log_ratios(module, requests, completions, index_topk=TOP_K if own else None))
    ratios = []
    for request, completion, places in zip(requests, completions, selected, strict=True):
        ratios.append(log_ratios(module, [request], [completion], selection=given_keys(places)))
    return figures(np.concatenate(ratios))


def fix_cache(num_bytes: int = 6 << 30) -> None:
    """Engines that this process makes from now on get a cache of this size, so that several can start on one GPU.

    vLLM measures free memory otherwise, and stops when that changes meanwhile.
    """
    arguments = vllm_engine.engine_arguments

    def fixed(*given: Any) -> dict[str, Any]:
        # The share is only what has to be free.
        return arguments(*given) | {"kv_cache_memory_bytes": num_bytes, "gpu_memory_utilization": 0.05}

    vllm_engine.engine_arguments = fixed


def fix_cache_as_asked() -> None:
    """KEEL_GPU_CACHE_GB, for runs of pytest side by side on one GPU; in Ray's workers too, as their setup hook."""
    if gigabytes := os.environ.get("KEEL_GPU_CACHE_GB"):
        fix_cache(int(float(gigabytes) * 1e9))


async def observe(case: str, path: Path, options: argparse.Namespace, seen: dict[str, Any]) -> dict[str, Any]:
    ours = case in ("keel", "invariant")
    settings = EngineSettings(
        dtype="bfloat16",
        max_num_seqs=64,
        max_context=CONTEXT,
        gpu_memory=0.05,
        cuda_graphs=not options.eager,
        keel_dsa=ours,
        batch_invariant=case == "invariant",
        selections=ours and not options.unrecorded,
    )
    actor, kept = VllmEngineActor(), {}
    began = time.perf_counter()
    await actor.load(str(path), settings)
    seen["start_s"] = time.perf_counter() - began
    try:
        for name, length in (("short", 40), ("long", LONG)):
            kept[name] = make_requests(name, COUNT, length, NEW_TOKENS)
            kept[f"{name} done"] = await actor.generate(kept[name])
        seen["stages"] = ["generated"]
        if case != "dense":
            sequences = [whole(*pair) for pair in zip(kept["long"], kept["long done"], strict=True)]
            kept["selected"], kept["again"] = await engine_selections(actor, ours, sequences)
            seen["stages"].append("selections")
        if ours:
            seen["company"] = {top_p: await alone_and_together(actor, top_p) for top_p in (1.0, 0.95)}
        if options.speed:
            seen["tokens_per_s"] = {length: await speed(actor, length) for length in (64, 2048)}
    finally:
        await actor.shutdown()
    return kept


def compare(case: str, path: Path, kept: dict[str, Any], seen: dict[str, Any]) -> None:
    module = load_deepseek_v32(path, dtype=torch.bfloat16, device="cuda").eval()
    for name in ("long", "short"):
        pair = kept[name], kept[f"{name} done"]
        seen[f"{name}, plain learner"] = mismatches(module, *pair, "plain")
        if case == "vllm" and name == "long":
            seen["long, imitating learner"] = mismatches(module, *pair, "vllm")
    if case == "dense":
        return
    long = kept["long"], kept["long done"]
    if long[1][0].selections is not None:
        seen["long, own selections replayed"] = mismatches(module, *long, "plain", own=True)
        seen["long, what is replayed"] = coverage(*long)
        both = list(map(carried, kept["again"])), kept["selected"]
        seen["carried by a prefill against asked of its worker"] = agreement(*both)
        seen["own selections against a second prefill"] = against_second_prefill(long[1], kept["selected"])
    seen["long, second prefill's selection replayed"] = mismatches(module, *long, "plain", kept["selected"])
    sequences = [whole(*pair) for pair in zip(*long, strict=True)]
    for arithmetic in ("plain", "vllm") if case == "vllm" else ("plain",):
        module.index_arithmetic = arithmetic
        own = [learner_selections(module, ids) for ids in sequences]
        seen[f"selection, {arithmetic} learner"] = agreement(kept["selected"], own)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.selection", description="What both sides select.")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    parser.add_argument("--unrecorded", action="store_true", help="the engine returns no selections")
    parser.add_argument("--speed", action="store_true", help="tokens a second too; nothing else may use the GPU then")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(argv)
    seen: dict[str, Any] = {"case": options.case, "device": torch.cuda.get_device_name(), "eager": options.eager}
    fix_cache()
    try:
        with TemporaryDirectory() as folder:
            path = Path(folder) / "model"
            make_model(path, CONTEXT if options.case == "dense" else TOP_K)
            kept = asyncio.run(observe(options.case, path, options, seen))
            compare(options.case, path, kept, seen)
    finally:
        text = json.dumps(seen, indent=2)
        print(text, flush=True)
        if options.out:
            options.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
