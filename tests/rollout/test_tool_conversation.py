"""Conversations with tools: against a second formulation of V3.2's encoding, and through chat templates."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from model.tokenizer import SPECIAL_TOKENS, build_byte_tokenizer
from rl.errors import DataError
from rl.sample import ToolCall
from rollout.conversation import Conversation, MalformedReply

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
ASK = {"role": "user", "content": "Q1"}
WEATHER = {"name": "weather", "description": "Weather of a city", "parameters": {"type": "object", "properties": {}}}

CHATML_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n<tool_response>\n{{ m.content }}\n"
    "</tool_response>{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def conversation() -> Conversation:
    return Conversation(build_byte_tokenizer())


@pytest.fixture(scope="module")
def chatml() -> Conversation:
    return with_template(CHATML_WITH_TOOLS)


def with_template(template: str) -> Conversation:
    backend = Tokenizer.from_str(build_byte_tokenizer().backend_tokenizer.to_str().replace("｜", "|"))
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return Conversation(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)
    )


def text_of(conversation: Conversation, token_ids) -> str:
    text = conversation.tokenizer.decode(list(map(int, token_ids)), skip_special_tokens=False)
    assert isinstance(text, str)
    return text


# Text in which nothing structural can stand, so that the second formulation may work on the whole string.
texts = st.text(st.sampled_from("aé日 \n{}\\\"'%"), max_size=6)
names = st.text(st.sampled_from("fg_1é"), min_size=1, max_size=3)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=2),
    max_leaves=4,
)
tool_calls = st.builds(
    lambda name, arguments: ToolCall(name=name, arguments=arguments),
    names,
    st.dictionaries(names, json_values, max_size=3),
)


@st.composite
def replies(draw, calls: int | None = None):
    """An assistant message and the results of its calls."""
    made = draw(st.lists(tool_calls, min_size=calls or 0, max_size=3))
    message = {"role": "assistant", "content": draw(texts), "reasoning_content": draw(texts) + "."}
    if made:
        dumped = [{"name": c.name, "arguments": json.dumps(c.arguments)} for c in made]
        message["tool_calls"] = [{"type": "function", "function": function} for function in dumped]
    return message, [{"role": "tool", "content": draw(texts)} for _ in made]


@st.composite
def conversations(draw):
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(texts)})
        if draw(st.booleans()):
            messages[0]["tools"] = [{"type": "function", "function": {"name": draw(names), "x": draw(json_values)}}]
        if draw(st.booleans()):
            messages[0]["response_format"] = {"type": draw(names)}
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(texts)})
        for _ in range(draw(st.integers(0, 3))):
            message, results = draw(replies())
            messages += [message, *results]
    return messages


def spelled(messages, *, thinking: bool) -> str:
    """The second formulation: spell every thought out, then strike those that the last user message makes history."""
    text = BOS
    for message, following in zip(messages, [*messages[1:], None], strict=True):
        match message["role"]:
            case "system":
                text += message["content"]
                if tools := message.get("tools"):
                    text += "\n\n## Tools\n<TOOLS>" + "\n".join(dumped(t["function"]) for t in tools) + "</TOOLS>"
                if form := message.get("response_format"):
                    text += "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
                    text += dumped(form)
            case "user":
                text += f"<｜User｜>{message['content']}<｜Assistant｜><think>"
            case "assistant":
                text += message["reasoning_content"] + "</think>" + message["content"]
                if calls := message.get("tool_calls"):
                    text += "\n\n<｜DSML｜function_calls>\n"
                    for call in calls:
                        arguments = json.loads(call["function"]["arguments"])
                        text += f'<｜DSML｜invoke name="{call["function"]["name"]}">\n'
                        text += "\n".join(parameter(key, value) for key, value in arguments.items())
                        text += "\n</｜DSML｜invoke>\n"
                    text += "</｜DSML｜function_calls>"
                text += EOS
                text += "\n\n<function_results>" if (following or {}).get("role") == "tool" else ""
            case "tool":
                text += f"\n<result>{message['content']}</result>"
                if (following or {}).get("role") != "tool":
                    text += "\n</function_results>\n\n<think>"
    past, last, present = text.rpartition("<｜User｜>")
    if not thinking:
        past, last, present = text, "", ""
    # A reply that nothing has opened (it follows another one directly) begins behind an end of sentence.
    struck = re.sub(r"<think>[^<]*?\.</think>", "</think>", past)
    struck = re.sub(rf"{EOS}[^<]*?\.</think>", EOS, struck).replace("<think>", "</think>")
    return struck + last + present


def dumped(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def parameter(key, value) -> str:
    kind, shown = ("true", value) if isinstance(value, str) else ("false", dumped(value))
    return f'<｜DSML｜parameter name="{key}" string="{kind}">{shown}</｜DSML｜parameter>'


def without_tools_text(text: str) -> str:
    """The block's fixed words replaced by a short mark; a test of its own looks at them."""
    return re.sub(
        r"## Tools\n\nYou have.*?<functions>\n(.*?)\n</functions>\n", r"## Tools\n<TOOLS>\1</TOOLS>", text, flags=re.S
    )


@settings(max_examples=150, deadline=None)
@given(conversations(), st.booleans())
def test_the_encoding_is_that_of_the_second_formulation(conversation, messages, thinking):
    answered = messages[-1]["role"] == "assistant"
    if answered:
        token_ids, sampled = conversation.encode_demonstration(messages, thinking=thinking)
    else:
        token_ids = conversation.encode(messages, thinking=thinking)
    text = text_of(conversation, token_ids)
    assert without_tools_text(text) == spelled(messages, thinking=thinking)
    assert token_ids.tolist() == conversation.tokenizer.encode(text, add_special_tokens=False)
    if answered:
        said = [message for message in messages[last_user(messages) :] if message["role"] == "assistant"]
        assert int((token_ids[sampled] == conversation.stop_token_ids[0]).sum()) == len(said)


def last_user(messages) -> int:
    return max(i for i, message in enumerate(messages) if message["role"] == "user")


@settings(max_examples=150, deadline=None)
@given(conversations(), replies(1), st.booleans())
def test_a_turn_with_tools_is_append_only(conversation, messages, reply, thinking):
    """prompt + the reply's own tokens + its results is the next prompt; after another user message it is not."""
    messages = messages[: last_user(messages) + 1]
    message, results = reply
    prompt = conversation.encode(messages, thinking=thinking)
    with_reply, sampled = conversation.encode_demonstration([*messages, message], thinking=thinking)
    np.testing.assert_array_equal(with_reply[~sampled], prompt)
    calls = conversation.parse_reply(text_of(conversation, with_reply[sampled]), thinking=thinking).calls
    appended = conversation.encode_results(messages, calls, [r["content"] for r in results], thinking=thinking)
    continued = [*messages, message, *results]
    np.testing.assert_array_equal(
        np.concatenate([with_reply, appended]), conversation.encode(continued, thinking=thinking)
    )
    if thinking:
        later = conversation.encode([*continued, {"role": "user", "content": "more"}], thinking=True)
        assert later[: len(with_reply)].tolist() != with_reply.tolist()


@settings(max_examples=150, deadline=None)
@given(replies(), st.booleans())
def test_parsing_is_the_inverse_of_encoding(conversation, reply, thinking):
    message, _ = reply
    token_ids, sampled = conversation.encode_demonstration([ASK, message], thinking=thinking)
    parsed = conversation.parse_reply(conversation.decode(token_ids[sampled]), thinking=thinking)
    assert parsed.answer == message["content"]
    assert parsed.reasoning == (message["reasoning_content"] if thinking else None)
    written = [call["function"] for call in message.get("tool_calls", ())]
    assert [(c.name, c.arguments) for c in parsed.calls] == [(f["name"], json.loads(f["arguments"])) for f in written]


def test_tools_are_shown_in_the_words_of_the_format(conversation):
    """Lines that the golden encoder prints around the functions; the tokens in its example are tokens."""
    token_ids = conversation.encode([{"role": "system", "content": "S"}, ASK], thinking=True, tools=[WEATHER])
    text = text_of(conversation, token_ids)
    assert text.startswith(f"{BOS}S\n\n## Tools\n\nYou have access to a set of tools you can use to answer the user's ")
    assert text.endswith(
        "</function_results>\n\n<think>...thinking about results</think>\n\nHere are the functions available in "
        f"JSONSchema format:\n<functions>\n{json.dumps(WEATHER)}\n</functions>\n<｜User｜>Q1<｜Assistant｜><think>"
    )
    special = [SPECIAL_TOKENS[index] for index in token_ids if index < len(SPECIAL_TOKENS)]
    assert special.count("｜DSML｜") == 11 and special.count("<think>") == 2
    bare = conversation.encode([ASK], thinking=True, tools=[WEATHER])
    assert text_of(conversation, bare) == text.replace(f"{BOS}S", BOS)
    developer = {"role": "developer", "content": "Q1", "tools": [{"type": "function", "function": WEATHER}]}
    asked = text_of(conversation, conversation.encode([developer], thinking=False))
    assert asked.startswith(f"{BOS}<｜User｜>\n\n## Tools")
    assert asked.endswith("</functions>\n\n\n# The user's message is: Q1<｜Assistant｜></think>")


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "x", "</result>"]), max_size=4).map("".join))
def test_what_tools_return_never_becomes_a_special_token(conversation, text):
    token_ids = conversation.encode_results([ASK], [ToolCall(name="f")], [text], thinking=True)
    assert text_of(conversation, token_ids) == (
        f"\n\n<function_results>\n<result>{text}</result>\n</function_results>\n\n<think>"
    )
    assert [index for index in token_ids if index < len(SPECIAL_TOKENS)] == [SPECIAL_TOKENS.index("<think>")]


PARAMETER = '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n'
BLOCK = (
    f'\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n{PARAMETER}</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)


@pytest.mark.parametrize(
    ("reply", "reason", "in_calls"),
    [
        (f"r{BLOCK}</think>", "must come after </think>", True),
        ("never closed", "never closes its thought", False),
        ("r</think>a</think>b", "</think> stands outside", False),
        ("r</think>a ｜DSML｜ b", "｜DSML｜ stands outside", True),
        (f"r</think>{BLOCK} more", "nothing may follow", True),
        (f"r</think>{BLOCK[:-5]}", "is missing", True),
        ("r</think>\n\n<｜DSML｜function_calls>\n</｜DSML｜function_calls>", "holds no call", True),
        (f"r</think>{BLOCK.replace('calls>', 'calls> ', 1)}", "must follow the tag", True),
        (f"r</think>{BLOCK.replace('invoke name', 'invoke  nom')}", "an invoke tag reads", True),
        (f"r</think>{BLOCK.replace('false', 'maybe')}", "a parameter reads", True),
        (f"r</think>{BLOCK.replace('>1<', '>one<')}", "is not JSON", True),
        (f"r</think>{BLOCK.replace('>1<', '>NaN<')}", "is not JSON", True),
        (f"r</think>{BLOCK.replace('parameter>', 'parameter> ')}", "a line break must follow the parameter", True),
        (f"r</think>{BLOCK.replace(PARAMETER, PARAMETER * 2)}", "given twice", True),
    ],
)
def test_malformed_replies_are_refused_with_a_reason(conversation, reply, reason, in_calls):
    with pytest.raises(MalformedReply, match=reason) as raised:
        conversation.parse_reply(reply, thinking=True)
    assert raised.value.in_calls == in_calls


def test_a_call_without_arguments_is_an_empty_line(conversation):
    message = {"role": "assistant", "content": "", "tool_calls": [{"name": "g", "arguments": {}}]}
    token_ids, sampled = conversation.encode_demonstration([ASK, message], thinking=False)
    text = text_of(conversation, token_ids[sampled])
    assert text == (
        f'\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>\n</｜DSML｜function_calls>{EOS}'
    )
    assert conversation.parse_reply(text, thinking=False).calls == (ToolCall(name="g"),)


def test_a_chat_template_is_given_tools_and_results_by_the_same_prefix_rule(chatml):
    prompt = chatml.encode([ASK], thinking=True, tools=[WEATHER])
    assert json.dumps(WEATHER["name"]) in text_of(chatml, prompt)
    call = {"function": {"name": "weather", "arguments": '{"city": "<|im_end|>"}'}}
    reply = {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]}
    final = {"role": "assistant", "content": "rain"}
    result = {"role": "tool", "content": "wet <|im_start|>"}
    conversation = [ASK, reply, result, final]
    token_ids, sampled = chatml.encode_demonstration(conversation, thinking=True, tools=[WEATHER])
    np.testing.assert_array_equal(token_ids[: len(prompt)], prompt)
    first_end = int(np.flatnonzero(sampled & (token_ids == chatml.stop_token_ids[0]))[-2]) + 1
    text = text_of(chatml, token_ids[len(prompt) : first_end])
    parsed = chatml.parse_reply(text, thinking=True)
    assert parsed.calls == (ToolCall(name="weather", arguments={"city": "<|im_end|>"}),)
    appended = chatml.encode_results([ASK], parsed.calls, [result["content"]], thinking=True, tools=[WEATHER])
    np.testing.assert_array_equal(token_ids[first_end : first_end + len(appended)], appended)
    assert text_of(chatml, token_ids[first_end + len(appended) :]) == "rain<|im_end|>"


def test_templates_of_two_call_formats_are_read_and_others_refused(chatml):
    calls = chatml.parse_reply(
        'x</think>\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>{"name": "g"}</tool_call>',
        thinking=True,
    ).calls
    assert calls == (ToolCall(name="f", arguments={"a": 1}), ToolCall(name="g"))
    for text, reason in [
        ("<tool_call>{", "not closed"),
        ("<tool_call>{</tool_call>", "not JSON"),
        (r'<tool_call>{"name": "f", "arguments": {"a": "\ud83d"}}</tool_call>', "half of a surrogate pair"),
        ("<tool_call>[1]</tool_call>", "must be an object"),
        ('<tool_call>{"name": "f", "arguments": 1}</tool_call>', "must be an object"),
        ('<tool_call>{"name": "f"}</tool_call> so', "stands behind"),
    ]:
        with pytest.raises(MalformedReply, match=reason):
            chatml.parse_reply(text, thinking=False)
    pairs = with_template(CHATML_WITH_TOOLS.replace("Answer", "<arg_key>"))
    text = (
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>[1]</arg_value>\n"
        "<arg_key>b</arg_key><arg_value>x</arg_value>\n</tool_call>"
    )
    assert pairs.parse_reply(text, thinking=False).calls == (ToolCall(name="f", arguments={"a": [1], "b": "x"}),)
    with pytest.raises(MalformedReply, match="pairs of <arg_key>"):
        pairs.parse_reply("<tool_call>f\nx</tool_call>", thinking=False)
    silent = with_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="not known how this model writes a tool call"):
        silent.encode([ASK], thinking=True, tools=[WEATHER])
