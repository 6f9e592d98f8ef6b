"""Evaluation on prompts that are never trained on: within a run, or of any model by

    python -m rl.evaluate RECIPE.yaml --model DIR [--prompts 50] [--samples 4] [--pass-at 1,4] [--context discard_all]
                                      [--out FIGURES.json] [--trajectories ATTEMPTS.jsonl]

It reports per domain the share of right answers, pass@k, the answer of the attempt with the fewest steps (parallel
sampling as in DeepSeek-V3.2, section 4.4), and what the attempts cost in steps and tokens. ``--context`` replaces the
context strategy of every environment, so that strategies can be compared on one model; ``--trajectories`` keeps every
attempt that was scored as a run keeps its samples.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from typing import Protocol

import numpy as np

from rewards.pool import RewardPool
from rewards.protocol import part_name
from rl.choices import ContextStrategy
from rl.cluster import join_cluster
from rl.config import Recipe
from rl.environ import conceal_environment
from rl.errors import RecipeError, UserError
from rl.prompts import load_split
from rl.recipe import load_recipe
from rl.run_directory import write_trajectories
from rl.sample import Prompt, Sample, Scored, Status
from rl.secrets import redact, redact_tracebacks
from rl.system import (
    Generation,
    check_model,
    check_plugins,
    closing_episodes,
    open_conversation,
    seeds_of,
    start_rewards,
)
from rl.trajectory import SequenceView, Trajectory, token_texts
from rollout.conversation import Conversation
from rollout.pool import EnginePool

LINE_EVERY_S = 10.0

EVALUATION_SEED = 0x5EED
"""Every evaluation of a run draws with the same seeds, so that two of them differ by their weights alone."""


class Player(Protocol):
    """What an evaluation needs of a system."""

    @property
    def rewards(self) -> RewardPool: ...

    async def generate(self, prompt: Prompt, seeds: Sequence[int]) -> list[Sample]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempts:
    """All samples of one prompt. ``scored`` lacks those that could not be scored, which count as wrong."""

    prompt: Prompt
    asked: int
    scored: tuple[Scored, ...]
    right: tuple[bool, ...]  # of each that was scored

    def pass_at(self, k: int) -> float:
        """The chance that k of the attempts, drawn without replacement, hold a right one (arXiv 2107.03374)."""
        wrong = self.asked - sum(self.right)
        return 1.0 - comb(wrong, k) / comb(self.asked, k)

    @property
    def fewest_steps(self) -> bool:
        """Whether the attempt that finished in the fewest steps, of those with the fewest tokens, is right."""
        ranked = sorted(
            (
                one.sample.status != Status.FINISHED,
                num_steps(one.sample),
                one.sample.num_generated,
                one.sample.index,
                right,
            )
            for one, right in zip(self.scored, self.right, strict=True)
        )
        return bool(ranked and ranked[0][-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Share of right answers per domain, over all samples asked for; what could not be scored counts as wrong."""

    accuracy: dict[str, float]
    num_failed: int
    scored: tuple[Scored, ...]
    attempts: tuple[Attempts, ...] = ()

    def metrics(self) -> dict[str, float]:
        """The metrics of the design page."""
        return {f"eval/{domain}": value for domain, value in self.accuracy.items()}

    def summary(self, ks: Sequence[int] = (1,)) -> dict[str, dict[str, float]]:
        """Per domain: ``accuracy``, ``pass@k``, ``fewest_steps``, and means an attempt of ``steps`` and ``tokens``."""
        return {domain: self._figures(domain, ks) for domain in self.accuracy}

    def _figures(self, domain: str, ks: Sequence[int]) -> dict[str, float]:
        members = [one for one in self.attempts if one.prompt.domain == domain]
        samples = [scored.sample for one in members for scored in one.scored]
        return {
            "prompts": len(members),
            "accuracy": self.accuracy[domain],
            **{f"pass@{k}": float(np.mean([one.pass_at(k) for one in members])) for k in ks},
            "fewest_steps": float(np.mean([one.fewest_steps for one in members])),
            "steps": float(np.mean([num_steps(sample) for sample in samples])) if samples else 0.0,
            "tokens": float(np.mean([sample.num_generated for sample in samples])) if samples else 0.0,
            "truncated": float(np.mean([sample.status == Status.TRUNCATED for sample in samples])) if samples else 0.0,
            "failed": float(sum(one.asked - len(one.scored) for one in members)),
        }


async def evaluate(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    system: Player,
    *,
    done: Callable[[Attempts], None] = lambda attempts: None,
) -> Evaluation:
    """Samples every prompt ``evaluation.samples_per_prompt`` times and scores the samples; ``done`` hears of each."""
    per_prompt = recipe.evaluation.samples_per_prompt

    async def one(number: int, prompt: Prompt) -> Attempts:
        seeds = seeds_of(recipe.seed ^ EVALUATION_SEED, number, per_prompt)
        samples = await system.generate(prompt, seeds)
        outcomes = await system.rewards.score_group(samples)
        scored = tuple(outcome for outcome in outcomes if isinstance(outcome, Scored))
        right = tuple(is_accurate(recipe, outcome) for outcome in scored)
        attempts = Attempts(prompt=prompt, asked=per_prompt, scored=scored, right=right)
        done(attempts)
        return attempts

    attempts = await asyncio.gather(*(one(number, prompt) for number, prompt in enumerate(prompts)))
    scored = tuple(outcome for members in attempts for outcome in members.scored)
    asked = {name: sum(one.asked for one in attempts if one.prompt.domain == name) for name in recipe.domains}
    right = {name: sum(sum(one.right) for one in attempts if one.prompt.domain == name) for name in recipe.domains}
    return Evaluation(
        accuracy={name: right[name] / number for name, number in asked.items() if number},
        num_failed=sum(asked.values()) - len(scored),
        scored=scored,
        attempts=tuple(attempts),
    )


def num_steps(sample: Sample) -> int:
    """Replies of an episode; 1 for a sample without an environment."""
    return max(1, len(sample.turns))


def is_accurate(recipe: Recipe, scored: Scored) -> bool:
    """Whether the first reward of the sample's domain reached 1."""
    first = recipe.domains[scored.sample.prompt.domain].rewards[0]
    return scored.parts[part_name(first)] >= 1.0


def accuracy(recipe: Recipe, scored: Sequence[Scored]) -> dict[str, float]:
    """Share of right answers per domain among ``scored``."""
    domains = {outcome.sample.prompt.domain for outcome in scored}
    return {
        name: float(np.mean([is_accurate(recipe, one) for one in scored if one.sample.prompt.domain == name]))
        for name in sorted(domains)
    }


async def evaluate_model(
    recipe: Recipe, prompts: Sequence[Prompt], model_dir: Path, conversation: Conversation
) -> Evaluation:
    """Starts engines and rewards, without a learner, and evaluates the model in ``model_dir``."""
    join_cluster(recipe)
    async with AsyncExitStack() as running:
        rewards = await start_rewards(recipe, running)
        running.push_async_callback(rewards.close)
        pool = await EnginePool.start(recipe, model_dir)
        running.callback(pool.close)
        episodes = await running.enter_async_context(closing_episodes(recipe, pool, conversation))
        system = Generation(
            pool=pool, rewards=rewards, conversation=conversation, sampling=recipe.sampling, episodes=episodes
        )
        await episodes.check_window(prompts)
        return await evaluate(recipe, prompts, system, done=Course(len(prompts)).tell)


class Course:
    """How far an evaluation has come: a line on standard error every now and then."""

    def __init__(self, num_prompts: int) -> None:
        self._num_prompts = num_prompts
        self._done: list[Attempts] = []
        self._said_at = time.monotonic()

    def tell(self, attempts: Attempts) -> None:
        self._done.append(attempts)
        if time.monotonic() - self._said_at < LINE_EVERY_S:
            return
        self._said_at = time.monotonic()
        right = sum(sum(one.right) for one in self._done) / sum(one.asked for one in self._done)
        print(f"evaluating: {len(self._done)} of {self._num_prompts} prompts, {right:.1%} right", file=sys.stderr)


def adapted(recipe: Recipe, arguments: argparse.Namespace) -> Recipe:
    """The recipe with what the command line replaces."""
    changes = {"num_prompts": arguments.prompts, "samples_per_prompt": arguments.samples}
    given = {name: value for name, value in changes.items() if value is not None}
    domains = dict(recipe.domains)
    if arguments.context is not None:
        for name, domain in domains.items():
            if domain.environment is not None:
                used = replace(domain.environment, context=ContextStrategy(arguments.context))
                domains[name] = replace(domain, environment=used)
    model = recipe.model
    if arguments.model is not None:
        model = replace(model, path=str(Path(arguments.model).absolute()), init=None)
    return replace(recipe, domains=domains, model=model, evaluation=replace(recipe.evaluation, **given))


def checked_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe to evaluate. Raises RecipeError for whatever can be known before anything starts."""
    recipe = adapted(load_recipe(arguments.recipe, arguments.overrides), arguments)
    samples = recipe.evaluation.samples_per_prompt
    if recipe.model.path is None:
        raise RecipeError("the recipe's model starts from nothing; name a trained one with --model")
    if recipe.evaluation.num_prompts < 1 or samples < 1:
        raise RecipeError("there is nothing to evaluate; give --prompts and --samples of 1 or more")
    if not all(1 <= k <= samples for k in arguments.pass_at):
        raise RecipeError(f"pass@k needs at least k samples a prompt, and there are {samples}; raise --samples")
    for option, path in (("--out", arguments.out), ("--trajectories", arguments.trajectories)):
        if path is not None and not path.parent.is_dir():
            raise RecipeError(f"{option}: there is no folder {path.parent}; make it, or name another file")
    check_model(recipe)
    check_plugins(recipe)
    return recipe


def run(arguments: argparse.Namespace) -> None:
    """Everything the command does: prints the figures, then writes what it was asked to write."""
    recipe = checked_recipe(arguments)
    number = recipe.evaluation.num_prompts
    prompts = [
        prompt
        for name, domain in recipe.domains.items()
        for prompt in load_split(name, domain, number, seed=recipe.seed)[1]
    ]
    model_dir = Path(str(recipe.model.path))
    conversation = open_conversation(recipe, prompts, model_dir)
    evaluation = asyncio.run(evaluate_model(recipe, prompts, model_dir, conversation))
    domains = evaluation.summary(arguments.pass_at)
    for domain, figures in domains.items():
        print(f"{domain}: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    if arguments.out is not None:
        rows = [
            {"prompt": one.prompt.id, "right": sum(one.right), "asked": one.asked, "fewest_steps": one.fewest_steps}
            for one in evaluation.attempts
        ]
        result = {"model": recipe.model.path, "domains": domains, "prompts": rows}
        with writing("--out", arguments.out):
            arguments.out.write_text(redact(json.dumps(result, indent=1, ensure_ascii=False)) + "\n", encoding="utf-8")
    if arguments.trajectories is not None:
        with writing("--trajectories", arguments.trajectories):
            write_trajectories(arguments.trajectories, 0, trajectories(evaluation, conversation))


def trajectories(evaluation: Evaluation, conversation: Conversation) -> Iterator[Trajectory]:
    """Every attempt that was scored, as nobody has learnt from it."""
    for scored in evaluation.scored:
        views = [
            SequenceView(sample=sequence, token_texts=token_texts(sequence.token_ids, conversation.spell))
            for sequence in scored.sample.sequences
        ]
        yield Trajectory(scored=scored, sequences=views, advantage=0.0)


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Names the option whose file cannot be written."""
    try:
        yield
    except OSError as error:
        raise RecipeError(f"{option}: {path} cannot be written: {error.strerror}") from error


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0, or 1 for what a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m rl.evaluate", description="Evaluate a model on a recipe's prompts."
    )
    parser.add_argument("recipe", help="a YAML file; its evaluation prompts, rewards and environments are used")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    parser.add_argument("--model", help="a model directory, instead of the recipe's")
    parser.add_argument("--prompts", type=int, help="prompts per domain, instead of evaluation.num_prompts")
    parser.add_argument("--samples", type=int, help="attempts per prompt, instead of evaluation.samples_per_prompt")
    parser.add_argument("--pass-at", type=_numbers, default=[1], metavar="K[,K]", help="which pass@k to report")
    parser.add_argument("--context", choices=[str(one) for one in ContextStrategy], help="strategy of environments")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures, with a row for each prompt")
    parser.add_argument("--trajectories", type=Path, help="a JSONL file for every attempt, as runs keep their samples")
    arguments = parser.parse_intermixed_args(argv)
    conceal_environment()
    redact_tracebacks()
    try:
        run(arguments)
    except UserError as error:
        print(f"keel: {redact(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("keel: interrupted", file=sys.stderr)
        return 130
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of whole numbers, such as 1,4") from None


if __name__ == "__main__":
    sys.exit(main())
