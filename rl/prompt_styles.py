"""Ready-made system messages for a cold start (DeepSeek-V3.2, section 3.2.2 and appendix B), in our own words.

A model that was trained to reason and, apart from that, to use tools does both at once only when it is asked to, and
then only sometimes. These messages ask; the replies that succeed are what reinforcement learning starts from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl.config import PromptStyle

MAX_CALLS = 20

_REASONING = (
    "You are an expert at the task below. Think it through first, inside <think></think>: try ideas, check them, and "
    "correct yourself. Write your final answer after </think>, so that it can be understood without your thoughts."
)
_TOOLS = (
    "You are an assistant with tools. Call them whenever they help: what a program computes or a search finds is worth "
    "more than a guess. Programs run in a stateful session, one call may take up to 120 seconds, and the user sees "
    "neither your calls nor their results, so repeat in your final answer whatever matters. Always write calls in "
    "exactly the format that is described with the tools."
)
_THINKING_TOOLS = (
    "You are an expert at the task below. Think it through inside <think></think>, and call your tools while you "
    f"think: as early as they can help, and at most {MAX_CALLS} times. Prefer a short program or a search to long "
    "reasoning by hand, read what comes back, and think on. Always write calls in exactly the format that is described "
    "with the tools. Your final answer comes after the last thought, calls no tool, and can be understood without your "
    "thoughts."
)
_MESSAGES = {
    PromptStyle.reasoning: _REASONING,
    PromptStyle.tools: _TOOLS,
    PromptStyle.thinking_tools: _THINKING_TOOLS,
}


def styled(messages: Sequence[Mapping[str, Any]], style: PromptStyle) -> tuple[Mapping[str, Any], ...]:
    """The messages with the style's system message in front; one that is there already follows it."""
    text = _MESSAGES.get(style)
    if text is None:
        return tuple(messages)
    first, rest = messages[0], messages[1:]
    if first["role"] == "system":
        return ({**first, "content": f"{text}\n\n{first.get('content') or ''}"}, *rest)
    return ({"role": "system", "content": text}, *messages)
