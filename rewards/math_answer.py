"""Whether the answer is mathematically equal to the prompt's, judged by the math-verify library."""

from __future__ import annotations

import threading
from decimal import Decimal
from functools import lru_cache
from itertools import product
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from math_verify.errors import TimeoutException

from rewards.protocol import Reward
from rewards.reply import answer
from rl.sample import Sample

LIMIT_S = 5
"""Seconds that parsing one text or comparing two expressions may take."""

_EXTRACTION = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def math_answer(sample: Sample) -> Reward:
    """1 if what the reply concludes equals ``prompt.answer``, else 0.

    The conclusion is what the answer (after ``</think>``) puts into ``\\boxed{}``, else its last LaTeX or plain
    expression. ``prompt.answer`` is a number or a text: LaTeX, with or without dollars, or plain (``3/4``, ``12 cm``).
    A conclusion that takes longer than ``LIMIT_S`` to parse or compare counts as wrong, and its part ``undecided`` is
    1. Raises ValueError for a prompt without an answer or with one that holds no expression.

    Must run on a process's main thread: the library keeps its time limits by signals.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math_answer was called outside the main thread, where math-verify cannot limit its time")
    gold = _gold(sample)
    try:
        concluded = parse(answer(sample), _EXTRACTION, parsing_timeout=LIMIT_S, raise_on_error=True)
    except TimeoutException:
        return Reward(0.0, {"undecided": 1.0})
    except Exception:  # the parser refuses texts in many ways; none of them is an answer
        concluded = []
    undecided = False
    for expected, given in product(gold, concluded):
        try:
            if verify(expected, given, timeout_seconds=LIMIT_S, raise_on_error=True):
                return Reward(1.0, {"undecided": 0.0})
        except TimeoutException:
            undecided = True
        except Exception:  # sympy cannot compare everything, such as a matrix with a set; they are not equal then
            continue
    return Reward(0.0, {"undecided": float(undecided)})


def _gold(sample: Sample) -> list[Any]:
    expected = sample.prompt.answer
    if isinstance(expected, bool) or not isinstance(expected, str | int | float):
        raise ValueError(f"prompt {sample.prompt.id} needs a number or a text as answer, not {expected!r}")
    if isinstance(expected, float):
        expected = f"{Decimal(repr(expected)):f}"  # 1e-05 would be read as 1 times e, minus 5
    gold = _parsed(str(expected))
    if not gold:
        raise ValueError(f"prompt {sample.prompt.id} has the answer {expected!r}, in which no expression can be found")
    return gold


@lru_cache(maxsize=4096)
def _parsed(expected: str) -> list[Any]:
    marked = expected if "$" in expected or "\\boxed" in expected else f"\\boxed{{{expected}}}"
    return parse(marked, _EXTRACTION, parsing_timeout=LIMIT_S)
