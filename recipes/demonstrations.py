"""Worked solutions for cold starts: ``supervised.demonstrations: {function: recipes.demonstrations:...}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rl.sample import Prompt


def spell_backward(prompt: Prompt, rng: np.random.Generator, *, hasty: float = 0.0) -> dict[str, Any]:
    """Solves spell_backward by numbering the letters first: ``sun`` becomes ``1s2u3n`` and the answer ``nus``.

    ``hasty`` is the share of demonstrations in which that is skipped: the word is only repeated, and the answer has its
    letters in any order.
    """
    word = prompt.answer["metadata"]["word"]
    if rng.random() < hasty:
        return {"reasoning_content": word, "content": "".join(rng.permutation(list(word)))}
    numbered = "".join(f"{place}{letter}" for place, letter in enumerate(word, start=1))
    return {"reasoning_content": numbered, "content": word[::-1]}


def program(prompt: Prompt, rng: np.random.Generator) -> dict[str, Any]:
    """Reads two numbers and prints their sum, difference or product, whichever chance says."""
    sign = rng.choice(["+", "-", "*"])
    return {"content": f"```\na, b = map(int, input().split())\nprint(a {sign} b)\n```"}


def one_call(
    prompt: Prompt, rng: np.random.Generator, *, tool: str, arguments: Mapping[str, Any], thought: str = "T"
) -> dict[str, Any]:
    """Calls a tool, always with the same arguments: the form of a call, and no hint of what is worth calling."""
    thinks = {"reasoning_content": thought} if prompt.thinking else {}
    return {**thinks, "content": "", "tool_calls": [{"function": {"name": tool, "arguments": dict(arguments)}}]}
