"""How rewards read a sample: what was asked, the reasoning, the final answer, the tool calls, the code.

A reply reads ``reasoning</think>answer`` for a prompt that thinks, only ``answer`` for another; it begins inside
``<think>``, which is the prompt's last token, or with it where the model's chat template leaves that to the model. An
episode with an environment has one reply a turn: the final answer is the last one's, reasoning and calls are those of
all turns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rl.sample import Sample, ToolCall

THINK_START = "<think>"
THINK_END = "</think>"
END_OF_SENTENCE = "<｜end▁of▁sentence｜>"

_BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeBlock:
    """A fenced block: ``language`` is the word behind the fence, lower-case, "" without one."""

    language: str
    code: str


def question(sample: Sample) -> str:
    """The prompt's last user message; "" for a prompt that came as token ids."""
    asked = (message for message in reversed(sample.prompt.messages) if message.get("role") == "user")
    return str(next(asked, {}).get("content") or "")


def text(sample: Sample) -> str:
    """The (last) reply without the stop token that ended it."""
    return sample.reply.removesuffix(END_OF_SENTENCE)


def reasoning(sample: Sample) -> str:
    """What stands before the last ``</think>``; all of a thinking reply that never got there; "" without thinking.

    Of an episode with turns: that of every reply, joined by empty lines.
    """
    if not sample.prompt.thinking:
        return ""
    replies = [turn.reply for turn in sample.turns] or [sample.reply]
    return "\n\n".join(filter(None, map(_thought, replies)))


def answer(sample: Sample) -> str:
    """What stands after the last ``</think>``, stripped; "" when a thinking reply never got there."""
    _, closed, after = text(sample).rpartition(THINK_END)
    return after.strip() if closed or not sample.prompt.thinking else ""


def tool_calls(sample: Sample) -> tuple[ToolCall, ...]:
    """Every call of the episode, in order."""
    return tuple(call for turn in sample.turns for call in turn.calls)


def code_blocks(sample: Sample) -> list[CodeBlock]:
    """The closed fenced blocks of the final answer, in order."""
    found = _BLOCK.findall(answer(sample))
    return [CodeBlock(language=(tag.split() or [""])[0].lower(), code=code) for tag, code in found]


def _thought(reply: str) -> str:
    before, closed, after = reply.removesuffix(END_OF_SENTENCE).rpartition(THINK_END)
    return (before if closed else after).removeprefix(THINK_START).strip()
