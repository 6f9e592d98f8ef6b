"""How rewards read a reply: ``reasoning</think>answer`` for a prompt that thinks, only the answer for another.

The reply of a thinking prompt begins inside ``<think>``, which is the prompt's last token.
"""

from __future__ import annotations

from rl.sample import Sample

THINK_START = "<think>"
THINK_END = "</think>"
END_OF_SENTENCE = "<｜end▁of▁sentence｜>"


def text(sample: Sample) -> str:
    """The reply without the stop token that ended it."""
    return sample.reply.removesuffix(END_OF_SENTENCE)


def reasoning(sample: Sample) -> str:
    """What stands before the last ``</think>``; all of a thinking reply that never got there; "" without thinking."""
    if not sample.prompt.thinking:
        return ""
    before, closed, after = text(sample).rpartition(THINK_END)
    return (before if closed else after).strip()


def answer(sample: Sample) -> str:
    """What stands after the last ``</think>``, stripped; "" when a thinking reply never got there."""
    _, closed, after = text(sample).rpartition(THINK_END)
    return after.strip() if closed or not sample.prompt.thinking else ""
