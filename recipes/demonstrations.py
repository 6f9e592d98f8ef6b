"""Worked solutions for cold starts: ``supervised.demonstrations: {function: recipes.demonstrations:...}``."""

from __future__ import annotations

from typing import Any

import numpy as np

from rl.sample import Prompt


def running_totals(prompt: Prompt, rng: np.random.Generator) -> dict[str, Any]:
    """Solves a chain_sum problem term by term: ``4 - 1 - 7`` becomes ``4-1=3;3-7=-4`` and the answer ``-4``."""
    terms = prompt.answer["metadata"]["expression"].split()
    total = int(terms[0])
    steps = []
    for sign, term in zip(terms[1::2], terms[2::2], strict=True):
        before, total = total, total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{before}{sign}{term}={total}")
    return {"reasoning_content": ";".join(steps), "content": str(total)}
