"""Figures of a GPU machine, one command each, as JSON and as rows for RESULTS.md.

    python -m tests.gpu.measure throughput            # tokens/s with routes and kept sets recorded, against bare vLLM
    python -m tests.gpu.measure mismatch              # engine against learner on the same weights
    python -m tests.gpu.measure sync [placement=split]   # a weight update, against a plain copy of the same bytes
    python -m tests.gpu.measure verification          # what of an update is its verification
    python -m tests.gpu.measure loop RECIPE           # a whole run: where its seconds go, MFU, accuracy, the curve

Settings come from a recipe (``--recipe``, by default the one for a single GPU) and ``key.path=value`` overrides, as in
``rl.train``. With ``rollout.engine=torch`` everything runs on a CPU too, as a rehearsal: the figures then say nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from model import ModelOutline, load_model, outline
from model.tokenizer import load_tokenizer
from rl.choices import Dsa, EngineKind, Placement
from rl.config import Recipe
from rl.recipe import load_recipe
from rl.system import prepare_model, start
from rollout.conversation import Conversation
from rollout.engine import Completion, Engine, Request
from tests.gpu.loop_figures import figures_of_run
from tests.gpu.plain_copy import copy_speed
from tests.gpu.replay import figures, log_ratios
from tests.gpu.unverified import skip_verification

ONE_GPU = "recipes/gpu/dsv32_shared_1gpu.yaml"
Figures = dict[str, Any]


def requests_of(
    recipe: Recipe, model: ModelOutline, name: str, count: int, length: int, tokens: int, spread: float = 0.0
) -> list[Request]:
    """Random prompts, the same for the same arguments, that are continued for exactly ``tokens`` tokens each, or for
    so many on average where lengths ``spread`` by a share of it to both sides."""
    generator = np.random.default_rng(list(name.encode()))
    longer = generator.uniform(-spread, spread, count) if spread else np.zeros(count)
    return [
        Request(
            id=f"{name}{number}",
            token_ids=generator.integers(0, model.vocab_size, length).astype(np.int32),
            sampling=replace(recipe.sampling, max_tokens=max(1, round(tokens * (1 + longer[number])))),
            seed=int(generator.integers(2**31)),
        )
        for number in range(count)
    ]


async def open_engine(recipe: Recipe, path: Path) -> Any:
    """The recipe's engine in this process, recording what the recipe records."""
    model, rollout = recipe.model, recipe.rollout
    if rollout.engine == EngineKind.torch:
        from rollout.actor import EngineActor

        engine = EngineActor()
        settings = {"dtype": model.dtype, "device": "cpu", "threads": 1}
        settings["record_selections"] = recipe.objective.keep_selection
        await engine.load(str(path), **settings, max_num_seqs=rollout.max_num_seqs, max_context=model.max_context)
        return engine
    from rollout.vllm_engine import VllmEngineActor

    engine = VllmEngineActor()
    await engine.load(str(path), vllm_settings(recipe))
    return engine


def vllm_settings(recipe: Recipe) -> Any:
    from rollout.engine import truncates
    from rollout.vllm_engine import EngineSettings

    rollout = recipe.rollout
    return EngineSettings(
        dtype=recipe.model.dtype,
        max_num_seqs=rollout.max_num_seqs,
        max_context=recipe.model.max_context,
        tensor_parallel=rollout.tensor_parallel,
        expert_parallel=rollout.expert_parallel,
        gpu_memory=rollout.gpu_memory,
        cuda_graphs=rollout.cuda_graphs,
        keel_dsa=rollout.dsa == Dsa.keel,
        batch_invariant=rollout.batch_invariant,
        selections=recipe.objective.keep_selection,
        kept=recipe.objective.keep_sampling_mask and truncates(recipe.sampling),
        seed=recipe.seed,
    )


def bare_arguments(ours: Mapping[str, Any]) -> Figures:
    """vLLM's arguments without those that record, update weights or give memory away."""
    added = ("weight_transfer_config", "worker_extension_cls", "logprobs_mode", "scheduler_cls", "async_scheduling")
    off = {"enable_return_routed_experts": False, "return_sampling_mask": False, "enable_sleep_mode": False}
    off |= {"additional_config": {}}
    assert {*added, *off} <= ours.keys(), "the engine's arguments have other names now"
    return {name: value for name, value in ours.items() if name not in added} | off


class BareVllm:
    """vLLM with the same settings and prompts, and nothing recorded."""

    def __init__(self, recipe: Recipe, path: Path) -> None:
        import os

        from vllm import AsyncEngineArgs  # pyright: ignore[reportMissingImports]
        from vllm.v1.engine.async_llm import AsyncLLM  # pyright: ignore[reportMissingImports]

        from rollout.vllm_engine import _ENVIRONMENT, engine_arguments, multicast_settings
        from rollout.vllm_requests import Recording

        os.environ.update(_ENVIRONMENT | multicast_settings(os.environ))
        model = outline(path)
        self.recording = Recording.of(model, kept=False, max_context=recipe.model.max_context)
        arguments = bare_arguments(engine_arguments(str(path), model, vllm_settings(recipe)))
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    async def generate(self, requests: Sequence[Request]) -> list[Any]:
        return list(await asyncio.gather(*map(self._one, requests)))

    async def _one(self, request: Request) -> Any:
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
        from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

        from rollout.vllm_requests import sampling_arguments

        chosen = sampling_arguments(request, self.recording)
        chosen |= {"logprobs": None, "flat_logprobs": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        prompt = {"prompt_token_ids": request.token_ids.tolist()}
        outputs = [one async for one in self.engine.generate(prompt, SamplingParams(**chosen), request.id)]
        return outputs[-1].outputs[0]

    async def shutdown(self) -> None:
        self.engine.shutdown()


async def throughput(recipe: Recipe, path: Path, options: argparse.Namespace) -> Figures:
    """Tokens a second of warm engines, bare and recording, which are there at once and take turns on equal prompts."""
    model, engines, speeds = outline(path), {}, {}
    seen: Figures = {}
    try:
        for kind in options.only or ("bare", "recording"):
            began = time.perf_counter()
            bare = kind == "bare" and recipe.rollout.engine == EngineKind.vllm
            engines[kind] = BareVllm(recipe, path) if bare else await open_engine(recipe, path)
            seen[kind] = {"start_s": time.perf_counter() - began}
        for turn in range(options.passes + 1):
            # In turn the first: what comes second may find the machine in another state.
            for kind, engine in list(engines.items())[:: 1 if turn % 2 else -1]:
                requests = requests_of(
                    recipe, model, f"turn{turn}-", options.requests, options.prompt, options.tokens, options.spread
                )
                speeds.setdefault(kind, []).append(await tokens_per_s(engine, requests))
    finally:
        for engine in engines.values():
            await close(engine)
    for kind, passes in speeds.items():
        # The first pass compiles kernels.
        seen[kind] |= {"tokens_per_s": statistics.median(passes[1:]), "passes": passes[1:], "first_pass": passes[0]}
    if len(seen) == 2:
        pairs = zip(seen["recording"]["passes"], seen["bare"]["passes"], strict=True)
        seen["ratio"] = statistics.median(recording / bare for recording, bare in pairs)
    return seen


async def tokens_per_s(engine: Any, requests: Sequence[Request]) -> float:
    began = time.perf_counter()
    outputs = await engine.generate(requests)
    seconds = time.perf_counter() - began
    tokens, wanted = sum(len(o.token_ids) for o in outputs), sum(r.sampling.max_tokens for r in requests)
    assert tokens == wanted, f"{tokens} tokens came back, not {wanted}"
    return tokens / seconds


async def close(engine: Any) -> None:
    if hasattr(engine, "shutdown"):
        await engine.shutdown()
    gc.collect()


async def mismatch(recipe: Recipe, path: Path, options: argparse.Namespace) -> Figures:
    """Learner minus engine per token on the same weights; ``long`` prompts are beyond what attention selects."""
    model = outline(path)
    room = recipe.model.max_context - options.tokens - 1
    lengths = {"short": min(options.prompt, room), "long": room}
    requests = {
        name: requests_of(recipe, model, name, options.requests, n, options.tokens) for name, n in lengths.items()
    }
    engine: Engine = await open_engine(recipe, path)
    try:
        completions: dict[str, list[Completion]] = {n: await engine.generate(r) for n, r in requests.items()}
    finally:
        await close(engine)
    device = "cuda" if recipe.rollout.engine == EngineKind.vllm else "cpu"
    module = load_model(path, dtype=getattr(torch, recipe.model.dtype), device=device).eval()
    module.index_arithmetic = "vllm" if recipe.rollout.selects_as_vllm else "plain"
    replayed_keys = {"index_topk": model.index_topk if recipe.objective.keep_selection else None, "device": device}
    seen: Figures = {}
    for name in lengths:
        for routes, kept in ((True, True), (False, True), (True, False)):
            replayed = " and ".join(what for what, on in (("routes", routes), ("kept sets", kept)) if on)
            ratios = log_ratios(module, requests[name], completions[name], routes=routes, kept=kept, **replayed_keys)
            seen[f"{name}, {lengths[name]} + {options.tokens} tokens, {replayed}"] = figures(ratios)
    return seen


async def sync(recipe: Recipe, path: Path, options: argparse.Namespace) -> Figures:
    """Weight updates of the real actors, verified as ever, after a first one that opens connections."""
    recipe = replace(recipe, supervised=replace(recipe.supervised, steps=0))  # the learner begins with RL
    async with start(recipe, path, Conversation(load_tokenizer(path))) as system:
        updates = []
        for version in range(options.passes + 1):
            await system.learners_turn()
            updates.append(await system.publish(version))
        gpus = recipe.rollout.engine == EngineKind.vllm
        ways = [await engine.actor.update_way.remote() for engine in system.pool._engines if gpus]
    seconds = [update.seconds for update in updates[1:]]
    num_bytes = updates[0].num_bytes
    plain = copy_speed(num_bytes, across=recipe.placement == Placement.split, on_gpu=gpus)
    speed = num_bytes / statistics.median(seconds) / 1e9
    return {
        "bytes": num_bytes,
        "first_s": updates[0].seconds,
        "seconds": seconds,
        "gb_per_s": speed,
        "plain_gb_per_s": plain,
        "share_of_plain": speed / plain,
        "through_loader": ", ".join(filter(None, ways)) or "no, written straight" if gpus else "not vLLM's",
    }


async def verification(recipe: Recipe, path: Path, options: argparse.Namespace) -> Figures:
    """Updates of the real actors with their verification and without, in turn, after those that open the way; and a
    plain copy of the same bytes."""
    recipe = replace(recipe, supervised=replace(recipe.supervised, steps=0))  # the learner begins with RL
    seconds: dict[bool, list[float]] = {False: [], True: []}
    async with start(recipe, path, Conversation(load_tokenizer(path))) as system:
        gpus = recipe.rollout.engine == EngineKind.vllm
        for turn in range(-3, 2 * options.passes):
            if turn >= -2:
                await skip_verification(system, turn % 2 == 1, engines=gpus and turn >= -1)
            await system.learners_turn()
            update = await system.publish(turn + 3)
            if turn >= 0:
                seconds[turn % 2 == 1].append(update.seconds)
    verified, unverified = (statistics.median(seconds[skip]) for skip in (False, True))
    share = 1 - statistics.median(without / whole for whole, without in zip(*seconds.values(), strict=True))
    speed = update.num_bytes / verified / 1e9
    plain = copy_speed(update.num_bytes, across=recipe.placement == Placement.split, on_gpu=gpus)
    return {
        "bytes": update.num_bytes,
        "gb_per_s": speed,
        "plain_gb_per_s": plain,
        "share_of_plain": speed / plain,
        "with_s": verified,
        "without_s": unverified,
        "share": share,
        "all_with_s": seconds[False],
        "all_without_s": seconds[True],
    }


def loop(arguments: Sequence[str], out: Path | None) -> Figures:
    """Runs a recipe as a user would; the curve goes next to ``out`` as CSV."""
    from rl.train import main as train

    recipe = load_recipe(arguments[0], list(arguments[1:]))
    began = time.perf_counter()
    code = train(list(arguments))
    if code:
        raise SystemExit(code)
    run = Path(recipe.runs) / recipe.name
    seen, curve = figures_of_run(run)
    if out:
        out.with_suffix(".csv").write_text(curve)
    return {"wall_s": time.perf_counter() - began, **seen}


def rows(command: str, seen: Figures) -> str:
    """Markdown: a row a figure, or a row a case where every case has the same figures."""
    cases = {name: case for name, case in seen.items() if isinstance(case, dict)}
    lines = []
    if cases:
        columns = [name for name, value in next(iter(cases.values())).items() if not isinstance(value, list)]
        lines += [f"| {command} | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
        lines += [
            f"| {name} | {' | '.join(number(case[column]) for column in columns)} |" for name, case in cases.items()
        ]
    single = {name: value for name, value in seen.items() if name not in cases}
    if single:
        lines += ["", f"| {command} | |", "| --- | --- |"] if not cases else [""]
        lines += [f"| {name} | {number(value)} |" for name, value in single.items()]
    return "\n".join(lines).strip("\n") + "\n"


def number(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(number, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


MEASURED = {"throughput": throughput, "mismatch": mismatch, "sync": sync, "verification": verification}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.measure", description="Figures of a GPU machine.")
    parser.add_argument("command", choices=["loop", *MEASURED])
    parser.add_argument("arguments", nargs="*", default=[], help="loop: RECIPE; all: key.path=value")
    parser.add_argument("--recipe", default=ONE_GPU)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=48, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, help="tokens generated a request (throughput: 256, mismatch: 64)")
    parser.add_argument("--spread", type=float, default=0.0, help="throughput: lengths differ by this share of it")
    parser.add_argument("--passes", type=int, default=3, help="measured passes, after one that is not")
    parser.add_argument("--only", action="append", choices=["bare", "recording"], help="throughput: one of the two")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_intermixed_args(argv)
    options.tokens = options.tokens or (64 if options.command == "mismatch" else 256)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.command == "loop":
        seen = loop(options.arguments, options.out)
    else:
        measured = MEASURED[options.command]
        recipe = load_recipe(options.recipe, options.arguments)
        with TemporaryDirectory() as folder:
            path = prepare_model(recipe, Path(folder))
            seen = asyncio.run(measured(recipe, path, options))
    print(rows(options.command, seen), end="")
    if options.out:
        options.out.write_text(json.dumps(seen, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
