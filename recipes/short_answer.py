"""Whether a short text answer is the one that was asked for."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from rl.sample import Sample

_BOX = re.compile(r"\\boxed\{([^{}]*)\}")
_ARTICLES = {"a", "an", "the"}


def short_answer(sample: Sample) -> float:
    """1 if the last ``\\boxed{}`` of the answer says the same as ``prompt.answer``, or as one of its list, else 0.

    Compared without case, accents, punctuation and articles, as answers to questions usually are. The answer is what
    follows ``</think>``; a thinking reply that never got there has none. Raises ValueError for a prompt without one.
    """
    expected = sample.prompt.answer
    accepted = expected if isinstance(expected, list) else [expected]
    if not accepted or not all(isinstance(text, str | int) and normalized(text) for text in accepted):
        raise ValueError(f"prompt {sample.prompt.id} needs a short text, or a list of them, as its answer")
    _, closed, said = sample.reply.rpartition("</think>")
    boxed = _BOX.findall(said) if closed or not sample.prompt.thinking else []
    return float(bool(boxed) and normalized(boxed[-1]) in map(normalized, accepted))


def normalized(text: Any) -> str:
    """Lower-case words of letters and digits, one space apart, without articles and accents."""
    plain = "".join(mark for mark in unicodedata.normalize("NFKD", str(text)) if not unicodedata.combining(mark))
    return " ".join(word for word in re.findall(r"\w+", plain.casefold()) if word not in _ARTICLES)
