"""What a model is told by each style, from the recipe's domain to the encoded prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from model.tokenizer import END_THINK, THINK, build_byte_tokenizer
from rl.choices import PromptStyle
from rl.config import Domain, EnvironmentUse
from rl.prompts import load_split
from rollout.conversation import Conversation, MalformedReply

GOLDEN = {
    PromptStyle.none: "",
    PromptStyle.reasoning: (
        "You are an expert at the task below. Think it through first, inside <think></think>: try ideas, check them, "
        "and correct yourself. Write your final answer after </think>, so that it can be understood without your "
        "thoughts."
    ),
    PromptStyle.tools: (
        "You are an assistant with tools. Call them whenever they help: what a program computes or a search finds is "
        "worth more than a guess. The user sees neither your calls nor their results, so repeat in your final answer "
        "whatever matters. Always write calls in exactly the format that is described with the tools. You have 7 "
        "replies in all, those that call tools and the final answer."
    ),
    PromptStyle.thinking_tools: (
        "You are an expert at the task below. Think inside <think></think>, and use your tools in between: as soon as "
        "one can help, close the thought with </think>, write the call behind it, never inside the thought, and end "
        "your reply there. The result is shown to you, and you think on with all your thoughts so far before you. Call "
        "early, and prefer a short program or a search to long reasoning by hand. Always write calls in exactly the "
        "format that is described with the tools. You have 7 replies in all, those that call tools and the final "
        "answer. Your final answer comes after the last thought, calls no tool, and can be understood without your "
        "thoughts."
    ),
}
CALL = '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'


@pytest.mark.parametrize("style", PromptStyle)
def test_the_styled_message_reaches_the_encoded_prompt(style: PromptStyle, tmp_path: Path):
    source = tmp_path / "data.jsonl"
    with_system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q2"}]
    source.write_text(json.dumps({"prompt": "Q1"}) + "\n" + json.dumps({"messages": with_system}) + "\n")
    thinking = style != PromptStyle.tools
    domain = Domain(
        prompts=str(source),
        thinking=thinking,
        prompt_style=style,
        environment=EnvironmentUse(use="search", max_turns=7),
    )
    conversation = Conversation(build_byte_tokenizer())
    (alone, second), _ = load_split("d", domain, 0, seed=0)
    opened = "<think>" if thinking else "</think>"
    for prompt, system, question in ((alone, "", "Q1"), (second, "Be kind.", "Q2")):
        token_ids = conversation.encode(prompt.messages, thinking=thinking)
        golden = "\n\n".join(filter(None, (GOLDEN[style], system)))
        expected = f"<｜begin▁of▁sentence｜>{golden}<｜User｜>{question}<｜Assistant｜>{opened}"
        assert conversation.spell(token_ids.tolist()) == expected
        # The thought that the message speaks of is text; the only token is the one that opens the reply.
        structural = conversation.tokenizer.convert_tokens_to_ids([THINK, END_THINK])
        assert [int(token) for token in token_ids if token in structural] == [token_ids[-1]]


def test_a_model_that_obeys_the_merged_style_is_understood():
    """Behind the closed thought, and never inside."""
    conversation = Conversation(build_byte_tokenizer())
    reply = conversation.parse_reply(f"I look it up.</think>{CALL}", thinking=True)
    assert [call.name for call in reply.calls] == ["f"]
    with pytest.raises(MalformedReply, match="must come after </think>, not inside the thought"):
        conversation.parse_reply(f"I look it up.{CALL}</think>", thinking=True)
