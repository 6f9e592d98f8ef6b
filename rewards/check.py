"""Tries a reward on saved samples, as a run would call it, without a model and without Ray.

    python -m rewards.check my_module:my_reward runs/NAME/samples/step_3.jsonl target=200
    python -m rewards.check rubric answers.jsonl --judge-url http://judge:8000/v1 --judge-model m

Prints a line for each sample and a summary of the reward and its parts. The function runs in a process of its own with
its timeout; one that hangs or crashes costs its sample. The exit status is 1 if any sample could not be scored.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import yaml

from rewards.judge import JudgeAddress
from rewards.protocol import Fault, Outcome, Reward, part_name
from rewards.saved import read_samples, siblings
from rewards.worker import SerialWorker, Surroundings, late
from rl.config import RewardUse
from rl.environ import chosen_variables
from rl.errors import RecipeError, UserError
from rl.printable import printable
from rl.sample import Sample

_DOMAIN = "saved"
_WIDTH = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _options().parse_intermixed_args(arguments)
    try:
        use = RewardUse(use=options.reward, args=_args(options.args), timeout_s=options.timeout, retries=0)
        samples = read_samples(options.samples)[: options.limit]
        judge = judge_of(options)
        began = time.perf_counter()
        surroundings = Surroundings(directory=os.getcwd(), judge=judge, env=chosen_variables(options.env))
        outcomes = list(_all_scored(use, samples, surroundings))
        seconds = time.perf_counter() - began
    except UserError as error:
        print(f"keel: {error}", file=sys.stderr)
        return 1
    for sample, outcome in zip(samples, outcomes, strict=True):
        print(_line(sample, outcome))
    print()
    print("\n".join(_summary(part_name(use), samples, outcomes, seconds)))
    return int(any(isinstance(outcome, Fault) for outcome in outcomes))


def add_judge_options(parser: argparse.ArgumentParser) -> None:
    """The options that :func:`judge_of` reads."""
    parser.add_argument("--judge-url", help="base of an OpenAI-compatible endpoint, such as http://judge:8000/v1")
    parser.add_argument("--judge-model", default="", help="the model's name there")
    parser.add_argument("--judge-key", metavar="VARIABLE", help="environment variable that holds the endpoint's key")
    parser.add_argument("--judge-unstructured", action="store_true", help="do not ask for verdicts by JSON schema")


def judge_of(options: argparse.Namespace) -> JudgeAddress | None:
    """The judge that the command line names. Raises RecipeError for a key that is not there."""
    if options.judge_url is None:
        return None
    if options.judge_key is not None and options.judge_key not in os.environ:
        raise RecipeError(f"--judge-key: the environment has no variable {options.judge_key}; export it")
    key = os.environ[options.judge_key] if options.judge_key is not None else ""
    structured = not options.judge_unstructured
    return JudgeAddress(url=options.judge_url, model=options.judge_model, api_key=key, structured=structured)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rewards.check",
        usage="%(prog)s [options] reward samples [key=value ...]",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("reward", help="a name such as math_answer, or a dotted path such as my_module:my_reward")
    parser.add_argument("samples", help="a JSONL file of saved samples, such as runs/NAME/samples/step_3.jsonl")
    parser.add_argument("args", nargs="*", default=[], metavar="key=value", help="the reward's arguments")
    parser.add_argument("--limit", type=int, help="samples to try, the first ones")
    parser.add_argument("--timeout", type=float, default=RewardUse().timeout_s, help="seconds that one call may take")
    parser.add_argument("--env", action="append", default=[], metavar="VARIABLE", help="lets the reward read it")
    add_judge_options(parser)
    return parser


def _args(pairs: Sequence[str]) -> dict[str, object]:
    for pair in pairs:
        if "=" not in pair:
            raise RecipeError(f"'{pair}' is not an argument; write it as key=value")
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def scored(use: RewardUse, samples: Iterable[Sample], surroundings: Surroundings) -> Iterator[Outcome]:
    """One outcome a sample, each scored when it is asked for, in a process of its own; a batched function is given
    groups of one. Raises RecipeError for a function that cannot be."""
    runner = _Runner(use, surroundings)
    try:
        for sample in samples:
            yield runner.call([sample])[0]
    finally:
        runner.close()


def _all_scored(use: RewardUse, samples: Sequence[Sample], surroundings: Surroundings) -> Iterator[Outcome]:
    """One outcome a sample, in order; a batched function is given the siblings of a prompt together."""
    runner = _Runner(use, surroundings)
    try:
        if not runner.is_batched:
            yield from (runner.call([sample])[0] for sample in samples)
            return
        by_sample = {id(sample): outcome for group in siblings(samples) for sample, outcome in runner.of_group(group)}
        yield from (by_sample[id(sample)] for sample in samples)
    finally:
        runner.close()


class _Runner:
    """A process that calls the function, and another one when that died of it."""

    def __init__(self, use: RewardUse, surroundings: Surroundings) -> None:
        self._use = use
        self._surroundings = surroundings
        self._start()
        self.is_batched = self._process.submit(_open, use, surroundings).result()

    def call(self, samples: Sequence[Sample]) -> list[Outcome]:
        began = time.monotonic()
        try:
            return self._process.submit(_score, samples).result()
        except BrokenProcessPool:
            hung = time.monotonic() - began >= self._use.timeout_s
            self._start()
            self._process.submit(_open, self._use, self._surroundings).result()
            return [Fault(late(self._use.timeout_s) if hung else "ended or crashed its process")] * len(samples)

    def of_group(self, group: Sequence[Sample]) -> Iterator[tuple[Sample, Outcome]]:
        yield from zip(group, self.call(group), strict=True)

    def close(self) -> None:
        self._process.shutdown(cancel_futures=True)

    def _start(self) -> None:
        self._process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


_worker = SerialWorker()


def _open(use: RewardUse, surroundings: Surroundings) -> bool:
    (traits,) = _worker.open({_DOMAIN: [use]}, surroundings)[_DOMAIN]
    return traits.is_batched


def _score(samples: Sequence[Sample]) -> list[Outcome]:
    (row,) = _worker.score(_DOMAIN, [0], samples)
    return row


def _line(sample: Sample, outcome: Outcome) -> str:
    if isinstance(outcome, Fault):
        return printable(f"{'failed':>8}  {sample.id}  {outcome.reason}")
    parts = "  ".join(f"{name} {value:g}" for name, value in outcome.parts.items())
    reply = " ".join(sample.reply.split())
    shown = reply if len(reply) <= _WIDTH else f"...{reply[3 - _WIDTH :]}"
    said = [shown] + ([f"because: {' '.join(outcome.comment.split())}"] if outcome.comment else [])
    lines = [f"{outcome.value:8.4g}  {sample.id}  {parts}", *(f"{'':10}{line}" for line in said)]
    return printable("\n".join(lines))


def _summary(name: str, samples: Sequence[Sample], outcomes: Sequence[Outcome], seconds: float) -> Iterator[str]:
    """Mean, spread and extremes of the reward and its parts, and what of it a learner could use."""
    rewards = [outcome for outcome in outcomes if isinstance(outcome, Reward)]
    columns: dict[str, list[float]] = {name: [reward.value for reward in rewards]}
    for reward in rewards:
        for part, value in reward.parts.items():
            columns.setdefault(f"{name}/{part}", []).append(value)
    yield f"{len(samples)} samples, {len(samples) - len(rewards)} failed, {seconds / max(1, len(samples)):.3g} s each"
    width = max(map(len, columns))
    yield f"{'':{width}}  {'mean':>9} {'std':>9} {'min':>9} {'max':>9}"
    for column, values in columns.items():
        if values:
            numbers = (statistics.fmean(values), statistics.pstdev(values), min(values), max(values))
            yield f"{column:{width}}  " + " ".join(f"{number:9.4g}" for number in numbers)
    yield from _variance(samples, outcomes)


def _variance(samples: Sequence[Sample], outcomes: Sequence[Outcome]) -> Iterator[str]:
    values = {id(s): outcome.value for s, outcome in zip(samples, outcomes, strict=True) if isinstance(outcome, Reward)}
    groups = [[values[id(sample)] for sample in group if id(sample) in values] for group in siblings(samples)]
    groups = [group for group in groups if len(group) > 1]
    flat = sum(len(set(group)) == 1 for group in groups)
    if groups:
        yield f"{flat} of {len(groups)} groups have one reward for all siblings and would teach nothing"


if __name__ == "__main__":
    sys.exit(main())
