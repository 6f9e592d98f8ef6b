"""Compares a judge with people: how well its rubric scores agree with gold scores, and what they cost.

    python -m rewards.calibrate gold.jsonl --judge-url http://judge:8000/v1 --judge-model m --votes 3

A line of the gold file holds ``prompt`` (or ``messages``), ``reply``, ``rubric`` (see :mod:`rewards.rubric`), perhaps a
``reference``, and people's judgement: ``score`` from 0 to 1, and perhaps ``scores``, a number from 0 to 1 by the
criterion's name. ``python -m rl.judge RECIPE`` serves a recipe's own judge for this.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from typing import Any

from rewards.check import add_judge_options, judge_of
from rewards.judge import JudgeFailed, Spent, appoint
from rewards.reply import answer, question
from rewards.rubric import Assessment, Rubric, read_rubric, reference_of
from rewards.saved import read_samples
from rl.errors import RecipeError, UserError
from rl.records import read_records
from rl.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """A sample and what people say of it."""

    sample: Sample
    score: float
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How two lists of scores agree. Correlations are nan where one of the lists is constant."""

    num: int
    pearson: float
    spearman: float
    mean_error: float  # mean of judge minus people
    mean_absolute_error: float


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    options = _options().parse_args(arguments)
    try:
        judge = judge_of(options)
        if judge is None:
            raise RecipeError("calibration needs a judge: give --judge-url and --judge-model")
        appoint(judge)
        gold = read_gold(options.gold)
        assessed = asyncio.run(_assess(Rubric(votes=options.votes), gold, options.concurrency))
    except UserError as error:
        print(f"keel: {error}", file=sys.stderr)
        return 1
    finally:
        appoint(None)
    if options.out:
        with open(options.out, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in _records(gold, assessed))
    print("\n".join(report(gold, assessed)))
    return int(any(isinstance(one, JudgeFailed) for one in assessed))


def read_gold(path: str) -> list[Gold]:
    """The gold file. Raises DataError naming the line."""
    gold = []
    for record, sample in zip(read_records(path), read_samples(path), strict=True):
        fields = record.fields
        score, scores = fields.get("score"), fields.get("scores") or {}
        if score is None or not _is_score(score):
            raise record.error(f"needs a number from 0 to 1 as score, not {score!r}")
        asked = {"rubric": fields.get("rubric"), "reference": fields.get("reference")}
        sample = replace(sample, prompt=replace(sample.prompt, answer=asked))
        try:
            names = {one.name for one in read_rubric(sample.prompt)}
        except ValueError as error:
            raise record.error(str(error)) from error
        if not isinstance(scores, Mapping) or not set(scores) <= names or not all(map(_is_score, scores.values())):
            raise record.error("scores must give numbers from 0 to 1 by names of the rubric's criteria")
        gold.append(Gold(sample=sample, score=float(score), scores=scores))
    return gold


def agreement(people: Sequence[float], judge: Sequence[float]) -> Agreement:
    """Of at least one pair."""
    errors = [one - other for one, other in zip(judge, people, strict=True)]
    return Agreement(
        num=len(errors),
        pearson=_correlation(people, judge),
        spearman=_correlation(_ranks(people), _ranks(judge)),
        mean_error=statistics.fmean(errors),
        mean_absolute_error=statistics.fmean(map(abs, errors)),
    )


def report(gold: Sequence[Gold], assessed: Sequence[Assessment | JudgeFailed]) -> Iterator[str]:
    """Lines for people."""
    pairs = [(one, made) for one, made in zip(gold, assessed, strict=True) if isinstance(made, Assessment)]
    yield f"{len(gold)} answers, {len(gold) - len(pairs)} without a verdict"
    if not pairs:
        yield from sorted({str(one) for one in assessed})
        return
    yield f"{'':24} {'n':>5} {'pearson':>8} {'spearman':>8} {'bias':>8} {'error':>8}"
    yield _row("score", agreement([one.score for one, _ in pairs], [made.value for _, made in pairs]))
    for name in sorted({name for one, _ in pairs for name in one.scores}):
        both = [(one.scores[name], made.criteria[name]) for one, made in pairs if name in one.scores and made.criteria]
        if both:
            yield _row(name, agreement(*map(list, zip(*both, strict=True))))
    made = [made for _, made in pairs]
    spent = reduce(add, (one.spent for one in made), Spent())
    replies = max(1, spent.calls)
    yield f"disagreement between votes: {statistics.fmean(one.disagreement for one in made):.3f}"
    yield f"replies that were no verdict: {sum(one.unreadable for one in made) / replies:.1%}"
    yield f"verdicts that met the control criterion: {sum(one.tripped for one in made) / replies:.1%}"
    costs = spent.parts()
    yield f"{spent.calls} calls, {costs['judge_s']:.2f} s and {spent.tokens / replies:.0f} tokens each"


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m rewards.calibrate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("gold", help="a JSONL file of answers with people's scores")
    parser.add_argument("--votes", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=16, help="answers that are judged at the same time")
    parser.add_argument("--out", help="where to write each answer's assessment, as JSONL")
    add_judge_options(parser)
    return parser


async def _assess(rubric: Rubric, gold: Sequence[Gold], concurrency: int) -> list[Assessment | JudgeFailed]:
    places = asyncio.Semaphore(concurrency)

    async def one(gold: Gold) -> Assessment | JudgeFailed:
        prompt = gold.sample.prompt
        async with places:
            try:
                return await rubric.assess(
                    question(gold.sample), answer(gold.sample), read_rubric(prompt), reference_of(prompt)
                )
            except JudgeFailed as failure:
                return failure

    return list(await asyncio.gather(*map(one, gold)))


def _records(gold: Sequence[Gold], assessed: Sequence[Assessment | JudgeFailed]) -> Iterator[dict[str, Any]]:
    for one, made in zip(gold, assessed, strict=True):
        result = {"failed": str(made)} if isinstance(made, JudgeFailed) else asdict(made)
        yield {"id": one.sample.id, "score": one.score, "scores": dict(one.scores), "judge": result}


def _row(name: str, found: Agreement) -> str:
    numbers = (found.pearson, found.spearman, found.mean_error, found.mean_absolute_error)
    return f"{name[:24]:24} {found.num:5} " + " ".join(f"{number:8.3f}" for number in numbers)


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0 on; equal values share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    if len(set(one)) < 2 or len(set(other)) < 2:
        return math.nan
    try:
        return statistics.correlation(one, other)
    except statistics.StatisticsError:  # values so close that their differences vanish
        return math.nan


if __name__ == "__main__":
    sys.exit(main())
