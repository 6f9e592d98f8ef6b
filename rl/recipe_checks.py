"""Which values a recipe may hold: ranges of single keys, and rules that tie several together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from rl.choices import Dsa, EngineKind, Offload, Placement, PromptStyle
from rl.config import (
    Alarms,
    Canary,
    Checkpoint,
    Doctor,
    Domain,
    EnvironmentUse,
    Evaluation,
    Faults,
    Judge,
    Learner,
    Model,
    Objective,
    Recipe,
    RewardUse,
    Rollout,
    Sampling,
    Supervised,
)


@dataclass(frozen=True, slots=True)
class _Range:
    words: str
    holds: Callable[[Any], bool]


_POSITIVE = _Range("above 0", lambda value: value > 0)
_AT_LEAST_0 = _Range("0 or more", lambda value: value >= 0)
_AT_LEAST_1 = _Range("1 or more", lambda value: value >= 1)
_AT_LEAST_2 = _Range("2 or more", lambda value: value >= 2)
_SHARE = _Range("from 0 to 1", lambda value: 0 <= value <= 1)

_RANGES: dict[type, dict[str, _Range]] = {
    Recipe: {
        "name": _Range(
            "a directory name, without slashes", lambda name: name.strip(". ") != "" and not set(name) & set("/\\")
        ),
        "seed": _Range("from 0 to 9223372036854775807", lambda value: 0 <= value < 1 << 63),
        "steps": _AT_LEAST_0,
        "prompts_per_step": _AT_LEAST_1,
        "log_samples": _AT_LEAST_0,
        "reward_workers": _AT_LEAST_1,
    },
    Model: {
        "dtype": _Range("float32 or bfloat16", lambda name: name in ("float32", "bfloat16")),
        "max_context": _AT_LEAST_2,
    },
    Domain: {"weight": _POSITIVE, "group_size": _AT_LEAST_2, "kl_beta": _AT_LEAST_0, "advantage_scale": _POSITIVE},
    EnvironmentUse: {
        "max_turns": _AT_LEAST_1,
        "max_tokens": _AT_LEAST_1,
        "max_seconds": _POSITIVE,
        "max_tool_errors": _AT_LEAST_0,
        "max_result": _Range("100 or more", lambda value: value >= 100),
        "tool_timeout_s": _POSITIVE,
        "concurrency": _AT_LEAST_1,
        "context_threshold": _Range("above 0 and below 1", lambda share: 0 < share < 1),
    },
    RewardUse: {"weight": _AT_LEAST_0, "timeout_s": _POSITIVE, "retries": _AT_LEAST_0},
    Sampling: {
        "temperature": _POSITIVE,
        "top_p": _Range("above 0 and at most 1", lambda value: 0 < value <= 1),
        "top_k": _AT_LEAST_0,
        "min_p": _Range("at least 0 and below 1", lambda value: 0 <= value < 1),
        "max_tokens": _AT_LEAST_1,
    },
    Rollout: {
        "engines": _AT_LEAST_1,
        "tensor_parallel": _AT_LEAST_1,
        "max_num_seqs": _AT_LEAST_1,
        "max_staleness": _AT_LEAST_0,
        "threads": _AT_LEAST_1,
        "gpu_memory": _Range("above 0 and at most 1", lambda share: 0 < share <= 1),
    },
    Objective: {"clip_low": _AT_LEAST_0, "clip_high": _AT_LEAST_0, "off_policy_delta": _AT_LEAST_0},
    Learner: {
        "ranks": _AT_LEAST_1,
        "zero_stage": _Range("0, 1, 2 or 3", lambda stage: stage in range(4)),
        "expert_parallel": _AT_LEAST_1,
        "micro_tokens": _AT_LEAST_1,
        "minibatches": _AT_LEAST_1,
        "lr": _POSITIVE,
        "warmup_steps": _AT_LEAST_0,
        "weight_decay": _AT_LEAST_0,
        "betas": _Range(
            "two numbers, at least 0 and below 1",
            lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        ),
        "grad_clip": _POSITIVE,
        "indexer_weight": _AT_LEAST_0,
        "max_skipped_steps": _AT_LEAST_0,
        "threads": _AT_LEAST_1,
    },
    Supervised: {
        "steps": _AT_LEAST_0,
        "batch_size": _AT_LEAST_1,
        "lr": _POSITIVE,
        "warmup_steps": _AT_LEAST_0,
        "weight_decay": _AT_LEAST_0,
        "dense_warmup_steps": _AT_LEAST_0,
        "threads": _AT_LEAST_1,
    },
    Evaluation: {"every": _AT_LEAST_0, "num_prompts": _AT_LEAST_0, "samples_per_prompt": _AT_LEAST_1},
    Judge: {
        "engines": _AT_LEAST_1,
        "tensor_parallel": _AT_LEAST_1,
        "dtype": _Range("float32 or bfloat16", lambda name: name in ("float32", "bfloat16")),
        "max_context": _AT_LEAST_2,
        "max_num_seqs": _AT_LEAST_1,
        "threads": _AT_LEAST_1,
        "temperature": _POSITIVE,
        "max_tokens": _AT_LEAST_1,
        "timeout_s": _POSITIVE,
        "attempts": _AT_LEAST_1,
        "concurrency": _AT_LEAST_1,
        "usd_per_million_input": _AT_LEAST_0,
        "usd_per_million_output": _AT_LEAST_0,
    },
    Checkpoint: {"every": _AT_LEAST_0, "cold_start_every": _AT_LEAST_0, "keep": _AT_LEAST_1, "grace_s": _AT_LEAST_0},
    Faults: {
        "engine_restarts": _AT_LEAST_0,
        "window_s": _POSITIVE,
        "restart_s": _POSITIVE,
        "learner_restores": _AT_LEAST_0,
    },
    Doctor: {"factor": _AT_LEAST_1, "floor_s": _POSITIVE, "first_s": _POSITIVE},
    Alarms: {
        "window": _AT_LEAST_1,
        **dict.fromkeys(("mismatch", "kept", "length"), _POSITIVE),
        **dict.fromkeys(("replay", "entropy", "masked", "clipped", "zero_variance", "truncated"), _SHARE),
        **dict.fromkeys(("saturation", "dominance"), _SHARE),
    },
    Canary: {"every": _AT_LEAST_0, "prompts": _AT_LEAST_1, "max_tokens": _AT_LEAST_1},
}


def violations(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every rule the recipe breaks, as the key at fault and a sentence about it."""
    yield from _out_of_range(recipe, "")
    for key, holds, sentence in _rules(recipe):
        if not holds:
            yield key, sentence
    for name, domain in recipe.domains.items():
        for key, holds, sentence in _domain_rules(f"domains.{name}", domain):
            if not holds:
                yield key, sentence


def _out_of_range(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if is_dataclass(value):
        ranges = _RANGES.get(type(value), {})
        for field in fields(value):
            child, inner = f"{key}.{field.name}" if key else field.name, getattr(value, field.name)
            allowed = ranges.get(field.name)
            if isinstance(inner, float) and not math.isfinite(inner):
                yield child, f"{child} is {inner}; it must be finite"
            elif allowed and inner is not None and not allowed.holds(inner):
                yield child, f"{child} is {inner!r}; it must be {allowed.words}"
            yield from _out_of_range(inner, child)
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _out_of_range(inner, f"{key}.{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _out_of_range(inner, f"{key}[{index}]")


def _rules(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    model, rollout, supervised, n = recipe.model, recipe.rollout, recipe.supervised, recipe.learner.minibatches
    yield (
        "model",
        bool(model.path) != (model.init is not None),
        "give either model.path or model.init" + (", not both; set the other one to null" if model.path else ""),
    )
    yield "domains", bool(recipe.domains), "domains is empty; name at least one"
    yield (
        "learner.zero_stage",
        recipe.learner.zero_stage > 0 or model.dtype != "bfloat16",
        "learner.zero_stage 0 trains float32 only; use stage 1, 2 or 3 with model.dtype bfloat16",
    )
    yield (
        "prompts_per_step",
        recipe.prompts_per_step % n == 0,
        f"prompts_per_step is {recipe.prompts_per_step}; it must be a multiple of learner.minibatches, which is {n}",
    )
    yield (
        "sampling.max_tokens",
        recipe.sampling.max_tokens < model.max_context,
        f"sampling.max_tokens is {recipe.sampling.max_tokens}, which leaves no room for a prompt in model.max_context "
        f"{model.max_context}",
    )
    yield (
        "rollout.tensor_parallel",
        rollout.engine != EngineKind.torch or rollout.tensor_parallel == 1,
        f"rollout.tensor_parallel is {rollout.tensor_parallel}, but the torch engine runs in one process; use vllm",
    )
    kind, _, scored = (recipe.checkpoint.best or "").partition("/")
    yield (
        "checkpoint.best",
        kind != "eval" or (scored in recipe.domains and recipe.evaluation.num_prompts > 0),
        f"checkpoint.best is {recipe.checkpoint.best}, which nothing measures; it takes a domain of the recipe after "
        "eval/, and evaluation.num_prompts above 0",
    )
    yield from _sharding_rules(recipe)
    yield from _judge_rules(recipe)
    yield from _vllm_rules(recipe)
    yield (
        "supervised.demonstrations",
        supervised.steps == 0 or supervised.demonstrations is not None,
        f"supervised.steps is {supervised.steps}, but supervised.demonstrations names nothing to learn from",
    )
    yield (
        "supervised.dense_warmup_steps",
        supervised.dense_warmup_steps <= supervised.steps,
        f"supervised.dense_warmup_steps is {supervised.dense_warmup_steps}, but supervised.steps is {supervised.steps}",
    )


def _sharding_rules(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    learner, bf16 = recipe.learner, recipe.model.dtype == "bfloat16"
    stage, ranks, experts = learner.zero_stage, learner.ranks, learner.expert_parallel
    yield (
        "learner.offload_optimizer",
        learner.offload_optimizer == Offload.none or stage > 0,
        "learner.offload_optimizer cpu needs learner.zero_stage 1, 2 or 3",
    )
    yield (
        "learner.offload_parameters",
        learner.offload_parameters == Offload.none or (stage == 3 and learner.offload_optimizer == Offload.cpu),
        "learner.offload_parameters cpu needs learner.zero_stage 3 and learner.offload_optimizer cpu",
    )
    yield (
        "learner.sleep",
        not learner.sleep or learner.offload_optimizer == Offload.none,
        "learner.sleep has nothing to move with learner.offload_optimizer cpu; set it to false",
    )
    # DeepSpeed runs bfloat16 at stage 1 by an optimizer of its own, which can do neither.
    least = 2 if bf16 else 1
    yield (
        "learner.sleep",
        not learner.sleep or stage >= least,
        f"learner.sleep with model.dtype {recipe.model.dtype} needs learner.zero_stage {least} or more, not {stage}",
    )
    yield (
        "learner.expert_parallel",
        ranks % experts == 0,
        f"learner.expert_parallel is {experts}; it must divide learner.ranks, which is {ranks}",
    )
    yield (
        "learner.expert_parallel",
        experts == 1 or stage >= least,
        f"learner.expert_parallel {experts} with model.dtype {recipe.model.dtype} needs learner.zero_stage {least} "
        f"or more, not {stage}",
    )


def _judge_rules(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    judge = recipe.judge
    given = [key for key in ("url", "path", "init") if getattr(judge, key) is not None]
    yield "judge", len(given) < 2, "give one of judge.url, judge.path and judge.init, not " + " and ".join(given)
    yield (
        "judge.url",
        judge.url is None or judge.url.startswith(("http://", "https://")),
        f"judge.url is {judge.url}; it must begin with http:// or https://",
    )
    yield (
        "judge.api_key",
        judge.api_key is None or judge.api_key.isidentifier(),
        "judge.api_key takes the name of the environment variable that holds the key, and this is no such name",
    )
    yield (
        "judge.model",
        judge.url is None or judge.model is not None,
        "judge.model is missing; name the model that the endpoint shall judge with",
    )
    yield (
        "judge.max_tokens",
        judge.url is not None or judge.max_tokens < judge.max_context,
        f"judge.max_tokens is {judge.max_tokens}, which leaves no room for what is judged in judge.max_context "
        f"{judge.max_context}",
    )


def _vllm_rules(recipe: Recipe) -> Iterator[tuple[str, bool, str]]:
    rollout, temperature = recipe.rollout, recipe.sampling.temperature
    if rollout.engine != EngineKind.vllm:
        chosen = "batch_invariant true" if rollout.batch_invariant else f"dsa {rollout.dsa}"
        yield (
            "rollout.batch_invariant" if rollout.batch_invariant else "rollout.dsa",
            not rollout.batch_invariant and rollout.dsa == Dsa.vllm,
            f"rollout.{chosen} is a choice within vLLM, but rollout.engine is {rollout.engine}; leave it out",
        )
        return
    yield (
        "model.dtype",
        recipe.model.dtype == "bfloat16",
        f"model.dtype is {recipe.model.dtype}, but vLLM's sparse attention runs in bfloat16 only; set it to bfloat16",
    )
    yield (
        "sampling.temperature",
        0.01 <= temperature <= 2,
        f"sampling.temperature is {temperature}, but vLLM samples at 0.01 to 2 only",
    )
    yield (
        "objective.keep_selection",
        not recipe.objective.keep_selection or rollout.dsa == Dsa.keel,
        "objective.keep_selection needs rollout.dsa keel: vLLM's own sparse attention does not return which keys it "
        "selected; set rollout.dsa=keel",
    )
    gpus = rollout.engines * rollout.tensor_parallel
    yield (
        "placement",
        recipe.placement == Placement.split or recipe.learner.ranks == gpus,
        f"placement is shared with learner.ranks {recipe.learner.ranks}, but rollout.engines {rollout.engines} x "
        f"rollout.tensor_parallel {rollout.tensor_parallel} are {gpus} GPUs; every GPU has one rank and one part of an "
        "engine, so make the two equal or use split",
    )


def _domain_rules(key: str, domain: Domain) -> Iterator[tuple[str, bool, str]]:
    called = key.removeprefix("domains.")
    is_free = "/" not in called and called != "mean"
    yield key, is_free, f"a domain cannot be called '{called}': reward/{called} is another metric"
    for name in ("prompts", "eval_prompts"):
        source = getattr(domain, name)
        usable = isinstance(source, str | dict) or (name == "eval_prompts" and source is None)
        yield f"{key}.{name}", usable, f"{key}.{name} is {source!r}; it must be a file or {{reasoning_gym: task}}"
    styled = domain.prompt_style != PromptStyle.none
    yield (
        f"{key}.prompt_style",
        not styled or domain.system is None,
        f"{key} has both a system message and a prompt_style, which is one too; keep one",
    )
    yield (
        f"{key}.prompt_style",
        domain.prompt_style in (PromptStyle.none, PromptStyle.reasoning) or domain.environment is not None,
        f"{key}.prompt_style is {domain.prompt_style}, but {key}.environment names no tools",
    )
    thinks = {PromptStyle.reasoning: True, PromptStyle.thinking_tools: True, PromptStyle.tools: False}
    yield (
        f"{key}.prompt_style",
        domain.thinking == thinks.get(domain.prompt_style, domain.thinking),
        f"{key}.prompt_style {domain.prompt_style} needs {key}.thinking to be {str(not domain.thinking).lower()}",
    )
    yield f"{key}.rewards", bool(domain.rewards), f"{key}.rewards is empty; a domain needs at least one reward"
    weighted = any(reward.weight > 0 for reward in domain.rewards)
    yield f"{key}.rewards", not domain.rewards or weighted, f"all rewards of {key} have weight 0; none would be learned"
