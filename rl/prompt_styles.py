"""Ready-made system messages for a cold start (DeepSeek-V3.2, section 3.2.2 and appendix B), in our own words.

A model that was trained to reason and, apart from that, to use tools does both at once only when it is asked to, and
then only sometimes. These messages ask; the replies that succeed are what reinforcement learning starts from.

A call stands behind a closed thought, and its result opens the next one: DeepSeek-V3.2's encoding has no calls inside a
thought and its parser refuses them (`rollout.dsml`), though the report's own words are "inside <think></think>".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rl.choices import PromptStyle

_REASONING = (
    "You are an expert at the task below. Think it through first, inside <think></think>: try ideas, check them, and "
    "correct yourself. Write your final answer after </think>, so that it can be understood without your thoughts."
)
_TOOLS = (
    "You are an assistant with tools. Call them whenever they help: what a program computes or a search finds is worth "
    "more than a guess. The user sees neither your calls nor their results, so repeat in your final answer whatever "
    "matters. Always write calls in exactly the format that is described with the tools. You have {replies} replies "
    "in all, those that call tools and the final answer."
)
_THINKING_TOOLS = (
    "You are an expert at the task below. Think inside <think></think>, and use your tools in between: as soon as one "
    "can help, close the thought with </think>, write the call behind it, never inside the thought, and end your reply "
    "there. The result is shown to you, and you think on with all your thoughts so far before you. Call early, and "
    "prefer a short program or a search to long reasoning by hand. Always write calls in exactly the format that is "
    "described with the tools. You have {replies} replies in all, those that call tools and the final answer. Your "
    "final answer comes after the last thought, calls no tool, and can be understood without your thoughts."
)
_MESSAGES = {
    PromptStyle.reasoning: _REASONING,
    PromptStyle.tools: _TOOLS,
    PromptStyle.thinking_tools: _THINKING_TOOLS,
}


def styled(messages: Sequence[Mapping[str, Any]], style: PromptStyle, *, replies: int) -> tuple[Mapping[str, Any], ...]:
    """The messages with the style's system message in front; one that is there already follows it.

    ``replies``: how many an episode may have (``environment.max_turns``), which the styles with tools tell the policy.
    """
    text = _MESSAGES.get(style)
    if text is None:
        return tuple(messages)
    text = text.format(replies=replies)
    first, rest = messages[0], messages[1:]
    if first["role"] == "system":
        return ({**first, "content": f"{text}\n\n{first.get('content') or ''}"}, *rest)
    return ({"role": "system", "content": text}, *messages)
