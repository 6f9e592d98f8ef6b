"""The scorers of the reasoning_gym library, for prompts that come from its tasks.

Nine of its scorers evaluate the answer, as Python or through sympy, which evaluates Python too. Four of them mean
lists: they get a reader of literals instead. The others mean arithmetic or algebra: an answer that is anything else,
or that would take for ever, is not evaluated.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Mapping
from functools import cache

from rewards.protocol import Reward
from rewards.reply import answer
from rl.procedural import library, scorer
from rl.sample import Sample

_LITERALS = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
"""Tasks whose scorers call ``eval`` where they expect a list."""
_ARITHMETIC = ("countdown", "puzzle24")
_ALGEBRA = ("intermediate_integration", "polynomial_multiplication", "simple_integration")

_FUNCTIONS = {"sqrt", "exp", "log", "ln", "pi", "E", "Abs", "sign"}
_FUNCTIONS |= {
    arc + name + h for arc in ("", "a") for name in ("sin", "cos", "tan", "cot", "sec", "csc") for h in ("", "h")
}
_SUMS = re.compile(r"[\d\s+\-*/().]*")
_TERMS = re.compile(r"[\w\s+\-*/^().,]*", re.ASCII)
_NAME = re.compile(r"[A-Za-z_]\w*")
_LONGEST = 2000


def reasoning_gym_score(sample: Sample) -> Reward:
    """What the task's own ``score_answer`` gives the answer (after ``</think>``, stripped), from 0 to 1.

    ``prompt.answer`` is the library's entry ``{question, answer, metadata}``; its metadata name the task. Many tasks
    give partial credit, and a few give 0.01 for any answer. A reply without an answer is scored as the library scores
    none. A few scorers raise on an answer that they cannot read, and some answers are not theirs to evaluate: both
    count as 0, and the part ``unreadable`` is 1. Raises ValueError for a prompt that does not come from the library.
    """
    entry = sample.prompt.answer
    if not isinstance(entry, Mapping) or "source_dataset" not in entry.get("metadata", {}):
        raise ValueError(f"prompt {sample.prompt.id} does not come from reasoning_gym: its answer is no entry of it")
    entry = dict(entry)
    task = entry["metadata"]["source_dataset"]
    score = _safe_scorer(task)
    said = answer(sample)
    if not may_evaluate(task, said):
        return Reward(0.0, {"unreadable": 1.0})
    try:
        return Reward(float(score(said or None, entry)), {"unreadable": 0.0})
    except Exception:
        score(entry["answer"], entry)  # raises again if the entry is at fault, and not the reply
        return Reward(0.0, {"unreadable": 1.0})


def may_evaluate(task: str, said: str) -> bool:
    """Whether an answer is what a task's scorer may evaluate; always true of the scorers that evaluate nothing."""
    if task in _ARITHMETIC:
        return len(said) <= _LONGEST and "**" not in said and _SUMS.fullmatch(said) is not None
    if task in _ALGEBRA:
        names = set(_NAME.findall(said))
        return (
            len(said) <= _LONGEST
            and _TERMS.fullmatch(said) is not None
            and all(len(name) == 1 or name in _FUNCTIONS for name in names)
            and not re.search(r"\.\s*[A-Za-z_]", said)
            and not re.search(r"\d{12}", said)
            and _powers_are_small(said)
        )
    return True


@cache
def _safe_scorer(task: str) -> Callable[[str | None, dict[str, object]], float]:
    function = scorer(task)
    if task in _LITERALS:
        # The name shadows the built-in function in that module alone.
        importlib.import_module(library().DATASETS[task][0].__module__).eval = ast.literal_eval  # pyright: ignore
    return function


def _powers_are_small(said: str) -> bool:
    """Whether no exponent has more than two digits or is itself a power or a bracket that could hide one."""
    for match in re.finditer(r"(?:\*\*|\^)", said):
        rest = said[match.end() :].lstrip(" \t+-")
        simple = re.match(r"(\d{1,2}|[A-Za-z]|\([\s\d+\-*/xyzA-Za-z.]{1,12}\))(?![\d\w])", rest)
        if simple is None or "**" in simple[0] or re.search(r"\d{3}", simple[0]):
            return False
        if rest[simple.end() :].lstrip().startswith(("**", "^")):
            return False
    return True
