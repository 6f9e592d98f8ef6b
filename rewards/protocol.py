"""What a reward is, and how a recipe's ``{use: ..., args: ...}`` becomes a function that can be called.

A reward is a function of one sample, sync or async, that returns a number or a :class:`Reward`:

    def brevity(sample: Sample, *, target: int = 200) -> float: ...

* ``args`` of the recipe are its keyword arguments.
* A function whose first parameter is called ``samples`` is given a whole group, siblings of one prompt in a list, and
  returns one result for each in the same order. It may judge them against each other.
* A class is constructed once in each worker process with ``args``; its instances are then called like functions. That
  is the place to check arguments and to load what is slow to load.
* An async function or instance with an attribute ``concurrency`` is never awaited more often than that at the same
  time, and its timeout begins when its turn comes.

Samples arrive as :class:`rl.sample.Sample` without ``routes``, ``selections`` and ``kept``, which are large and no
reward's business.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from rl.config import Domain, RewardUse
from rl.errors import RecipeError, did_you_mean
from rl.plugin import as_dotted, check_arguments, describe, import_callable

BUILT_IN = {
    "code_tests": "rewards.code_tests:CodeTests",
    "format": "rewards.format:follows_format",
    "language_consistency": "rewards.language_consistency:LanguageConsistency",
    "length_penalty": "rewards.length_penalty:LengthPenalty",
    "math_answer": "rewards.math_answer:math_answer",
    "proof_generator": "rewards.proof:ProofGenerator",
    "proof_verifier": "rewards.proof:ProofVerifier",
    "reasoning_gym": "rewards.reasoning_gym:reasoning_gym_score",
    "rubric": "rewards.rubric:Rubric",
    "rubric_comparison": "rewards.rubric_comparison:RubricComparison",
    "state_check": "rewards.state_check:StateCheck",
    "test_suite": "rewards.test_suite:TestSuite",
    "tool_protocol": "rewards.tool_protocol:tool_protocol",
}
"""The rewards that ship with Keel, by the name recipes use."""
JUDGED = {"proof_generator", "proof_verifier", "rubric", "rubric_comparison"}
"""Those of them that ask a judge."""


MAX_COMMENT = 4000
"""Characters of a comment that are kept."""


@dataclass(frozen=True, slots=True)
class Reward:
    """A reward with the numbers it was made of, which show up in metrics and reports as ``<name>/<part>``.

    Example: ``Reward(0.7, {"style": 0.9, "facts": 0.5}, comment="The treaty's year is wrong.")``.
    """

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)
    comment: str = ""
    """Why, in words, for people: a judge's reasons, a test that failed. Reports show up to ``MAX_COMMENT`` of it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a reward has no value for a sample."""

    reason: str


Outcome = Reward | Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFunction:
    """A reward that is ready to be called: ``call(sample)``, or ``call(samples)`` when it is batched."""

    name: str
    call: Callable[..., Any]
    is_async: bool
    is_batched: bool
    timeout_s: float
    retries: int
    concurrency: int | None = None
    """How many calls of an async function may be awaited at the same time."""
    cache: bool = False


def part_name(use: RewardUse) -> str:
    """The reward's name in metrics: ``name`` if the recipe gives one, else the last word of ``use``."""
    return use.name or use.use.rpartition(":")[2]


def resolve(use: RewardUse) -> RewardFunction:
    """Finds a reward by its name or dotted path and binds the recipe's arguments to it.

    Raises RecipeError, in one sentence, for a path that does not import, something that cannot be called, arguments
    that it does not take or lacks, and arguments that its class refuses.
    """
    place = f"reward '{use.use}'"
    if not use.timeout_s > 0 or use.retries < 0:
        raise RecipeError(f"{place} needs a timeout_s above 0 and retries from 0 on")
    if not math.isfinite(use.weight):
        raise RecipeError(f"{place} has the weight {use.weight}, which is not a finite number")
    check_use(use)
    function = import_callable(BUILT_IN.get(use.use, use.use), role="reward")
    args = use.args
    if inspect.isclass(function):
        check_arguments(function, args, given=0, place=place)
        try:
            function = function(**args)
        except RecipeError:
            raise
        except Exception as error:
            raise RecipeError(f"{place} refuses its arguments {dict(args)} ({describe(error)})") from error
        if not callable(function):
            raise RecipeError(f"{place} is a class whose instances cannot be called; give it __call__(self, sample)")
        args = {}
    check_arguments(function, args, given=1, place=place)
    return RewardFunction(
        name=part_name(use),
        call=_bind(function, args),
        is_async=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__),
        is_batched=_first_parameter(function) == "samples",
        timeout_s=use.timeout_s,
        retries=use.retries,
        concurrency=_concurrency(function, place),
        cache=use.cache and _first_parameter(function) != "samples",
    )


def check_use(use: RewardUse) -> None:
    """Raises RecipeError for what is neither the name of a reward that ships nor a dotted path; imports nothing."""
    if ":" not in use.use and use.use not in BUILT_IN:
        raise RecipeError(
            f"reward '{use.use}' is neither built in ({did_you_mean(use.use, BUILT_IN)}) nor a dotted path "
            f"such as {as_dotted(use.use, example='my_package.rewards:brevity')}"
        )


def check_names(name: str, domain: Domain) -> None:
    """Raises RecipeError for a domain without rewards, with two that would go by one name in metrics, or with one that
    :func:`check_use` refuses."""
    if not domain.rewards:
        raise RecipeError(f"domains.{name} has no rewards; add one, such as {{use: math_answer}}")
    taken: set[str] = set()
    for use in domain.rewards:
        check_use(use)
        part = part_name(use)
        if part in taken:
            raise RecipeError(f"domains.{name} has two rewards called '{part}'; give one of them a name")
        taken.add(part)


def read_result(result: Any) -> Outcome:
    """A function's return value as a :class:`Reward`, or the fault that it is not one."""
    reward = result if isinstance(result, Reward) else Reward(result)
    if not isinstance(reward.parts, Mapping):
        return Fault(f"returned {_shown(reward.parts)} as parts, which is not a mapping of names to numbers")
    for name, value in (("", reward.value), *reward.parts.items()):
        what = f"the part '{name}' as {_shown(value)}" if name else _shown(value)
        if inspect.isawaitable(value):
            return Fault("returned something to await; declare the function with async def")
        if not isinstance(value, Real | np.bool_):
            return Fault(f"returned {what}, which is not a number")
        if not _is_finite(value):
            return Fault(f"returned {what}, which is not finite")
    if not isinstance(reward.comment, str):
        return Fault(f"returned {_shown(reward.comment)} as comment, which is not a text")
    parts = {str(name): float(value) for name, value in reward.parts.items()}
    return Reward(float(reward.value), parts, reward.comment[:MAX_COMMENT])


def read_results(results: Any, num_samples: int) -> list[Outcome]:
    """The same for a batched function: one outcome for each sample."""
    if isinstance(results, np.ndarray):
        results = results.tolist()
    if not isinstance(results, Sequence) or isinstance(results, str):
        return [Fault(f"returned {_shown(results)}, not a list with one result for each sample")] * num_samples
    if len(results) != num_samples:
        return [Fault(f"returned {len(results)} results for {num_samples} samples")] * num_samples
    return [read_result(result) for result in results]


def _bind(function: Callable[..., Any], args: Mapping[str, Any]) -> Callable[..., Any]:
    return (lambda given: function(given, **args)) if args else function


def _concurrency(function: Any, place: str) -> int | None:
    limit = getattr(function, "concurrency", None)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise RecipeError(f"{place} has concurrency {limit!r}; it must be a whole number above 0")
    return limit


def _first_parameter(function: Callable[..., Any]) -> str | None:
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except (TypeError, ValueError):
        return None


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
