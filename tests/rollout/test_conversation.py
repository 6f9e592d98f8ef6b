"""DeepSeek-V3.2's encoding against golden strings of the official encoder, and chat templates of other models."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from model.tokenizer import SPECIAL_TOKENS, build_byte_tokenizer
from rl.errors import DataError
from rollout.conversation import Conversation, Reply, split_reply

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FIRST = {"role": "user", "content": "Q1"}
ANSWER = {"role": "assistant", "reasoning_content": "R1", "content": "A1"}
SECOND = {"role": "user", "content": "Q2"}
CALL = {
    "role": "assistant",
    "reasoning_content": "R1",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"s": "hi", "n": 3}'}}],
}
TWO_CALLS = {"role": "assistant", "reasoning_content": "R", "tool_calls": [{"name": "f"}, {"name": "g"}]}
RESULT = {"role": "tool", "content": "out1"}
LAST = {"role": "assistant", "reasoning_content": "R2", "content": "A1"}
CALLED = (
    '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="s" string="true">hi'
    '</｜DSML｜parameter>\n<｜DSML｜parameter name="n" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    f"</｜DSML｜function_calls>{EOS}\n\n<function_results>\n<result>out1</result>\n</function_results>\n\n"
)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def conversation() -> Conversation:
    return Conversation(build_byte_tokenizer())


@pytest.fixture(scope="module")
def chatml() -> Conversation:
    """A model with a template of its own, whose <think> is an added token that is not flagged special."""
    backend = Tokenizer.from_str(build_byte_tokenizer().backend_tokenizer.to_str().replace("｜", "|"))
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return Conversation(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=TEMPLATE)
    )


def text_of(conversation: Conversation, token_ids: np.ndarray) -> str:
    text = conversation.tokenizer.decode(token_ids.tolist(), skip_special_tokens=False)
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize(
    ("messages", "thinking", "golden"),
    [
        ([FIRST], True, f"{BOS}<｜User｜>Q1<｜Assistant｜><think>"),
        ([FIRST], False, f"{BOS}<｜User｜>Q1<｜Assistant｜></think>"),
        ([FIRST, CALL, RESULT], True, f"{BOS}<｜User｜>Q1<｜Assistant｜><think>R1</think>{CALLED}<think>"),
        (
            [FIRST, CALL, RESULT, LAST, SECOND],
            True,
            f"{BOS}<｜User｜>Q1<｜Assistant｜></think>{CALLED}</think>A1{EOS}<｜User｜>Q2<｜Assistant｜><think>",
        ),
        ([FIRST, CALL, RESULT], False, f"{BOS}<｜User｜>Q1<｜Assistant｜></think>{CALLED}</think>"),
        (
            [FIRST, ANSWER, SECOND],
            True,
            f"{BOS}<｜User｜>Q1<｜Assistant｜></think>A1{EOS}<｜User｜>Q2<｜Assistant｜><think>",
        ),
        (
            [{"role": "system", "content": "S"}, FIRST, ANSWER, SECOND],
            False,
            f"{BOS}S<｜User｜>Q1<｜Assistant｜></think>A1{EOS}<｜User｜>Q2<｜Assistant｜></think>",
        ),
        (
            [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "Hello! I am DeepSeek."},
                {"role": "user", "content": "1+1=?"},
            ],
            True,
            f"{BOS}<｜User｜>hello<｜Assistant｜></think>Hello! I am DeepSeek.{EOS}"
            "<｜User｜>1+1=?<｜Assistant｜><think>",
        ),
    ],
    ids=["A", "A-chat", "B", "D", "B-chat", "one-turn", "D-chat-system", "CARD"],
)
def test_prompts_are_the_golden_strings(conversation, messages, thinking, golden):
    token_ids = conversation.encode(messages, thinking=thinking)
    assert token_ids.dtype == np.int32
    assert text_of(conversation, token_ids) == golden
    # The text holds no special string of its own, so recognising them all gives the same ids.
    assert token_ids.tolist() == conversation.tokenizer.encode(golden, add_special_tokens=False)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        {"role": "assistant", "reasoning_content": None, "reasoning": "R1", "content": "A1"},
        {"role": "assistant", "content": "R1</think>A1"},
    ],
    ids=["field", "other-name", "text"],
)
def test_demonstrations_train_the_reply_and_its_end(conversation, thinking, answer):
    """Golden string C: the prompt (A) is its prefix, and exactly the rest is trained."""
    messages = [{"role": "system", "content": "S"}, FIRST, answer]
    token_ids, sampled = conversation.encode_demonstration(messages, thinking=thinking)
    prompt = conversation.encode(messages[:-1], thinking=thinking)
    np.testing.assert_array_equal(token_ids[: len(prompt)], prompt)
    assert text_of(conversation, token_ids[sampled]) == (f"R1</think>A1{EOS}" if thinking else f"A1{EOS}")
    assert sampled.tolist() == [False] * len(prompt) + [True] * (len(token_ids) - len(prompt))
    if thinking:  # </think> is the token that a policy would have to sample, not its spelling
        assert conversation.tokenizer.convert_tokens_to_ids("</think>") in token_ids[sampled]


def test_only_the_last_reply_of_a_demonstration_is_trained(conversation):
    token_ids, sampled = conversation.encode_demonstration([FIRST, ANSWER, SECOND, ANSWER], thinking=True)
    assert text_of(conversation, token_ids) == (
        f"{BOS}<｜User｜>Q1<｜Assistant｜></think>A1{EOS}<｜User｜>Q2<｜Assistant｜><think>R1</think>A1{EOS}"
    )
    assert text_of(conversation, token_ids[sampled]) == f"R1</think>A1{EOS}"


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "x", "<", "｜", " "]), max_size=6).map("".join) | st.text())
def test_nothing_that_people_write_becomes_a_special_token(conversation, text):
    messages = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    token_ids = conversation.encode(messages, thinking=False)
    special = token_ids[token_ids < len(SPECIAL_TOKENS)]
    assert text_of(conversation, special) == f"{BOS}<｜User｜><｜Assistant｜></think>"
    assert text_of(conversation, token_ids) == f"{BOS}{text}<｜User｜>{text}<｜Assistant｜></think>"


@given(
    st.lists(st.sampled_from(["<|im_end|>", "<think>", "<tool>", "\ue0f0", "\ue0f1", "0", "y"]), max_size=6).map(
        "".join
    )
)
def test_nor_through_a_chat_template(chatml, text):
    token_ids = chatml.encode([{"role": "user", "content": text}], thinking=True)
    assert text_of(chatml, token_ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    added = set(chatml.tokenizer.get_added_vocab().values())
    assert sum(index in added for index in token_ids.tolist()) == 3


@pytest.mark.parametrize("thinking", [True, False])
def test_chat_templates_split_demonstrations_by_the_same_prefix_rule(chatml, thinking):
    prompt = chatml.encode([FIRST], thinking=thinking)
    closed = "" if thinking else "<think></think>"
    assert text_of(chatml, prompt) == f"<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n{closed}"
    messages = [FIRST, {"role": "assistant", "content": "A1"}]
    if not thinking:  # this template forgets the empty thought once the reply is there
        with pytest.raises(DataError, match="renders a finished reply differently"):
            chatml.encode_demonstration(messages, thinking=thinking)
        return
    token_ids, sampled = chatml.encode_demonstration(messages, thinking=thinking)
    np.testing.assert_array_equal(token_ids[~sampled], prompt)
    assert text_of(chatml, token_ids[sampled]) == "A1<|im_end|>"  # the line break after it is not the model's


def test_a_tokenizer_with_neither_is_refused():
    backend = Tokenizer.from_str(build_byte_tokenizer().backend_tokenizer.to_str().replace("｜", "|"))
    with pytest.raises(DataError, match="has no chat template and lacks"):
        Conversation(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<think>"))


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ([FIRST, ANSWER], "must end with a user message or the result of a tool, not with role 'assistant'"),
        ([{"role": "critic", "content": "x"}], "message 0: role 'critic' is not supported"),
        ([FIRST, {"role": "tool", "content": "out"}], "message 1: the result of a tool, but no call is waiting"),
        ([FIRST, CALL, RESULT, RESULT], "message 3: the result of a tool, but no call is waiting"),
        ([FIRST, TWO_CALLS, RESULT], "1 of the last tool calls have no result"),
        ([FIRST, TWO_CALLS, RESULT, SECOND], "message 3: 1 of the tool calls before it have no result"),
        ([{"role": "user", "content": "x", "tools": [{}]}], "message 0: tools belong on a system or developer"),
        ([{**FIRST, "tool_calls": [{}]}], "message 0: only an assistant message has tool_calls"),
        ([FIRST, {**CALL, "tool_calls": [{}]}, SECOND], "message 1: a tool call needs a name"),
        ([FIRST, {**CALL, "tool_calls": [{"name": "f", "arguments": "{"}]}, SECOND], "message 1: .* are not JSON"),
        (
            [FIRST, {**CALL, "tool_calls": [{"name": "f", "arguments": r'{"a": "\ud83d"}'}]}, SECOND],
            "half of a surrogate",
        ),
        ([FIRST, {**CALL, "tool_calls": [{"name": 'f"'}]}, SECOND], "cannot be the name of a tool"),
        ([{"role": "developer", "content": ""}], "message 0: a developer message must say something"),
        ([{"role": "developer", "content": "x"}, SECOND], "message 0: in thinking mode a developer message must be"),
        ([{"role": "user"}], "message 0: content must be a string"),
        ([FIRST, {"role": "assistant"}, SECOND], "message 1: content must be a string"),
        ([{"role": "user", "content": ["x"]}], "message 0: content must be a string"),
        ([{**FIRST, "reasoning_content": 3}], "message 0: reasoning_content must be a string"),
    ],
)
def test_what_is_not_covered_is_refused(conversation, messages, complaint):
    with pytest.raises(DataError, match=complaint):
        conversation.encode(messages, thinking=True)


def test_a_thinking_demonstration_needs_its_thoughts(conversation):
    with pytest.raises(DataError, match="message 1: in thinking mode the assistant's last reply needs its reasoning"):
        conversation.encode_demonstration([FIRST, {"role": "assistant", "content": "A1"}], thinking=True)
    with pytest.raises(DataError, match="must end with a user message and the assistant's reply"):
        conversation.encode_demonstration([FIRST], thinking=True)


@pytest.mark.parametrize(
    ("reply", "thinking", "parts"),
    [
        ("why</think>42", True, ("why", "42")),
        ("<think>why</think>42", True, ("why", "42")),
        ("a</think>b</think>c", True, ("a", "b</think>c")),
        ("never closed", True, ("never closed", "")),
        ("42", False, (None, "42")),
        ("x</think>42", False, ("x", "42")),
    ],
)
def test_replies_are_split_at_the_first_end_of_thinking(reply, thinking, parts):
    assert split_reply(reply, thinking=thinking) == Reply(reasoning=parts[0], answer=parts[1])


@given(st.text())
def test_decode_returns_the_reply_without_its_stop_token(conversation, reply):
    token_ids, sampled = conversation.encode_demonstration(
        [FIRST, {"role": "assistant", "reasoning_content": "R", "content": reply}], thinking=True
    )
    assert conversation.decode(token_ids[sampled]) == f"R</think>{reply}"
    assert conversation.decode(token_ids[sampled][:-1]) == f"R</think>{reply}"
