"""Conversations as token ids, in DeepSeek-V3.2's encoding or, for other models, in their own chat template.

V3.2 ships no template. Its rules: a system message stands as it is, followed by its tools and its response format; a
user message is ``<｜User｜>{content}<｜Assistant｜>``, then ``<think>`` when it is the last one and the reply shall
think, else ``</think>``; a developer message is a user message that begins with tools and format; an assistant message
is ``{content}{calls}<｜end▁of▁sentence｜>``, preceded by ``{reasoning}</think>`` only behind the last user message in
thinking mode. Results of tools follow a reply directly (`rollout.dsml`). So reasoning stays while only results of tools
are appended, one turn of a user with any number of calls is one append-only sequence of tokens, and earlier reasoning
is dropped as soon as a new user message comes: those tokens are not a prefix of the next turn's prompt.

What people write, and what tools return, is always encoded as plain text: the string ``<｜Assistant｜>`` in a message
never becomes the token.

Text and refusals are those of DeepSeek's own script (tests/rollout/test_official_encoding.py), except for what that
script lets through and this module refuses with a sentence:

* a developer message before the last message that asks, in thinking mode: the script drops it and then fails, or, told
  not to drop thoughts, keeps it;
* calls of which some have a result and some have none: the block of results stays open;
* a result in front of every message, tools or calls on a message of another role, a content that is not text, an
  assistant message that says, thinks and calls nothing: each is written as if nothing were wrong, or passed over;
* a name that its own parser cannot read back.

It also encodes special strings in messages as the tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from model.tokenizer import ASSISTANT, BEGIN_OF_SENTENCE, DSML, END_OF_SENTENCE, END_THINK, THINK, USER
from rl.errors import DataError
from rl.sample import NDArray, ToolCall
from rollout import dsml
from rollout.chat_template import ChatTemplate
from rollout.dsml import MalformedReply, Part, Reply

__all__ = ["Conversation", "MalformedReply", "Message", "Reply", "split_reply"]

Message = Mapping[str, Any]
"""``{"role": "system" | "developer" | "user" | "assistant" | "tool", "content": str}``. A system or developer message
may add ``tools`` and ``response_format``, an assistant's ``reasoning_content`` and ``tool_calls`` (OpenAI's form)."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_ASKING = ("user", "developer")


def split_reply(reply: str, *, thinking: bool) -> Reply:
    """Takes a sampled reply apart at the first ``</think>``, whatever else is wrong with it.

    In thinking mode the prompt has opened ``<think>``, so a reply that never closes it is all reasoning and has an
    empty answer. Without thinking everything is the answer, unless the reply closes a thought nevertheless.
    """
    reasoning, closed, answer = reply.partition(END_THINK)
    if closed:
        return Reply(reasoning=reasoning.removeprefix(THINK), answer=answer)
    if thinking:
        return Reply(reasoning=reply.removeprefix(THINK), answer="")
    return Reply(reasoning=None, answer=reply)


class Conversation:
    """Encodes conversations for one tokenizer, and reads its replies.

    Example: ``Conversation(tokenizer).encode([{"role": "user", "content": "2+2?"}], thinking=True)``.
    Raises DataError when the tokenizer has neither V3.2's tokens nor a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; the model needs a tokenizer.json")
        known = {token.content: index for index, token in backend.get_added_tokens_decoder().items()}
        needed = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, USER, ASSISTANT, THINK, END_THINK)
        absent = next((token for token in needed if token not in known), None)
        name = tokenizer.name_or_path or "this model"
        if absent and not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer of {name} has no chat template and lacks DeepSeek-V3.2's token {absent}, so "
                "conversations cannot be encoded for it"
            )
        if not isinstance(tokenizer.eos_token_id, int):
            raise DataError(f"the tokenizer of {name} has no end-of-sentence token")
        self._template = ChatTemplate(tokenizer, [t for t in known if not t.isspace()]) if absent else None
        self._token_ids = known
        self.stop_token_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        """Tokens that end a reply."""
        self.end_of_thought: int | None = known.get(END_THINK)
        """The token of ``</think>``; None where it is spelled in several."""
        self._plain = _without_special_tokens(backend)

    def encode(
        self, messages: Sequence[Message], *, thinking: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> NDArray:
        """int32 [P]: the prompt that the next assistant message continues.

        `tools` (JSON functions) join those of the first system message, or of the first developer message where there
        is no system message, or get a system message of their own. Raises DataError for a conversation that no reply
        can follow, or that is not one.
        """
        _check(messages)
        last = messages[-1]["role"]
        if last not in (*_ASKING, "tool"):
            raise DataError(f"a prompt must end with a user message or the result of a tool, not with role {last!r}")
        if self._template:
            given, messages = _tools_of(messages, tools)
            return self._encoded(self._template.prompt(messages, thinking=thinking, tools=given))[0]
        return self._encoded(_v32_parts(_with_tools(messages, tools), thinking=thinking))[0]

    def encode_demonstration(
        self, messages: Sequence[Message], *, thinking: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[NDArray, NDArray]:
        """(token ids int32 [T], sampled bool [T]) of a conversation that ends with the assistant's reply.

        `sampled` marks what the assistant said since the last user message, each reply with its end-of-sentence token:
        what supervised training learns. The tokens before the first of them equal the prompt that :meth:`encode` gives.
        A reply may hold its reasoning in ``reasoning_content`` or in front of a ``</think>`` in its content; in
        thinking mode it must have some, unless it calls a tool.
        """
        _check(messages)
        if messages[-1]["role"] != "assistant" or not any(message["role"] in _ASKING for message in messages):
            raise DataError("a demonstration must end with a user message and the assistant's reply to it")
        if self._template:
            given, messages = _tools_of(messages, tools)
            return self._encoded(self._template.demonstration(messages, thinking=thinking, tools=given))
        return self._encoded(_v32_parts(_with_tools(messages, tools), thinking=thinking))

    def encode_results(
        self,
        messages: Sequence[Message],
        calls: Sequence[ToolCall],
        results: Sequence[str],
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> NDArray:
        """int32 [R]: what follows a reply that made `calls`, up to where the next reply begins.

        `messages` are those that the reply answers. There is one result a call, or one for a reply whose calls could
        not be read. Appended to the prompt and the reply's own tokens this is the next prompt, whatever the spelling
        of the reply: nothing that was sampled is encoded again.
        """
        if self._template:
            given, messages = _tools_of(messages, tools)
            parts = self._template.results(messages, calls, results, thinking=thinking, tools=given)
            return self._encoded(parts)[0]
        return self._encoded(dsml.results_parts(results, thinking=thinking))[0]

    def encode_next_turn(
        self,
        token_ids: NDArray,
        replies: Sequence[tuple[int, int]],
        messages: Sequence[Message],
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> NDArray:
        """int32 [P]: the prompt after one more user message, the last of `messages`.

        `token_ids` are all tokens before it, the stretches ``[begin, end)`` of `replies` as they were sampled. V3.2
        drops their reasoning and keeps every other token as it is; a chat template renders `messages` anew.
        """
        if self._template:
            return self.encode(messages, thinking=thinking, tools=tools)
        user = messages[-1]["content"]
        parts = (Part(USER, special=True), Part(user), Part(ASSISTANT, special=True))
        opened = Part(THINK if thinking else END_THINK, special=True)
        history = self._without_reasoning(token_ids, replies)
        return np.concatenate([history, self._encoded((*parts, opened))[0]])

    def _without_reasoning(self, token_ids: NDArray, replies: Sequence[tuple[int, int]]) -> NDArray:
        """Every ``<think>R</think>`` since the last user message becomes ``</think>``.

        A reply begins behind the ``<think>`` of its prompt; in one that never closes its thought, all is reasoning.
        """
        think, end_think, assistant = self._encoded(Part(t, special=True) for t in (THINK, END_THINK, ASSISTANT))[0]
        first = replies[0][0]
        asked = np.flatnonzero(token_ids[:first] == assistant)[-1]
        # A prompt that ends with results of tools holds replies of its own.
        given = [at + 1 for at in np.flatnonzero(token_ids[: first - 1] == think) if at > asked]
        said = [(begin, end) for begin, end in replies if token_ids[begin - 1] == think]
        kept, stripped = np.ones(len(token_ids), bool), token_ids.copy()
        stops = np.flatnonzero(np.isin(token_ids, self.stop_token_ids)) + 1
        for begin, end in (*((begin, stops[stops > begin][0]) for begin in given), *said):
            closing = np.flatnonzero(token_ids[begin:end] == end_think)
            if len(closing):
                kept[begin - 1 : begin + closing[0]] = False
            else:
                stripped[begin - 1] = end_think
                kept[begin : end - int(token_ids[end - 1] in self.stop_token_ids)] = False
        if replies[-1][1] < len(token_ids) and token_ids[-1] == think:  # opened behind results for a reply not to come
            stripped[-1] = end_think
        return stripped[kept]

    def parse_reply(self, text: str, *, thinking: bool) -> Reply:
        """Reads a whole reply strictly. Raises MalformedReply, whose message says what is wrong with it."""
        text = text.removesuffix(str(self.tokenizer.eos_token))
        if self._template:
            return self._template.parse_reply(text, thinking=thinking)
        return dsml.parse_reply(text, thinking=thinking)

    def decode(self, token_ids: NDArray) -> str:
        """The text of a reply: without its stop token, other special tokens spelled out."""
        if len(token_ids) and int(token_ids[-1]) in self.stop_token_ids:
            token_ids = token_ids[:-1]
        return self.spell(token_ids.tolist())

    def spell(self, token_ids: list[int]) -> str:
        """The text of any tokens, special ones spelled out."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _encoded(self, parts: Iterable[Part]) -> tuple[NDArray, NDArray]:
        """Token ids, and which of them belong to sampled parts. Text that stands together is encoded together."""
        ids: list[int] = []
        sampled: list[bool] = []
        for part in _joined(self._resolved(parts)):
            if part.special and part.text in self._token_ids:
                encoded = [self._token_ids[part.text]]
            elif part.special:
                encoded = self.tokenizer.encode(part.text, add_special_tokens=False)
            else:
                encoded = self._plain.encode(part.text, add_special_tokens=False).ids
            ids += encoded
            sampled += [part.sampled] * len(encoded)
        return np.array(ids, np.int32), np.array(sampled, bool)

    def _resolved(self, parts: Iterable[Part]) -> Iterator[Part]:
        """A structural token that this vocabulary lacks (only DSML may be missing) is text."""
        for part in parts:
            yield replace(part, special=False) if part.text == DSML and DSML not in self._token_ids else part


def _joined(parts: Iterable[Part]) -> Iterator[Part]:
    pending: Part | None = None
    for part in parts:
        if pending and not pending.special and not part.special and pending.sampled == part.sampled:
            pending = replace(pending, text=pending.text + part.text)
            continue
        if pending:
            yield pending
        pending = part
    if pending:
        yield pending


def _v32_parts(messages: Sequence[Message], *, thinking: bool) -> Iterator[Part]:
    last_user = max((i for i, message in enumerate(messages) if message["role"] in _ASKING), default=-1)
    yield Part(BEGIN_OF_SENTENCE, special=True)
    for index, message in enumerate(messages):
        opened = Part(THINK if thinking and index >= last_user else END_THINK, special=True)
        match message["role"]:
            case "system":
                yield Part(message.get("content") or "")
                yield from _offers(message)
            case "developer":
                if thinking and index < last_user:
                    raise DataError(
                        f"message {index}: in thinking mode a developer message must be the last one that asks; "
                        "DeepSeek-V3.2's encoding drops it otherwise"
                    )
                yield Part(USER, special=True)
                yield from _offers(message)
                yield Part(f"\n\n# The user's message is: {message['content']}")
                yield from (Part(ASSISTANT, special=True), opened)
            case "user":
                yield from (Part(USER, special=True), Part(message["content"]), Part(ASSISTANT, special=True), opened)
            case "tool":
                results = _results_from(messages, index)
                if results:
                    yield from dsml.results_parts(results, thinking=thinking and index >= last_user)
            case _:
                said = index > last_user and messages[-1]["role"] == "assistant"
                parts = _reply_parts(index, message, thinking=thinking and index > last_user)
                yield from (replace(part, sampled=said) for part in parts)


def _offers(message: Message) -> Iterator[Part]:
    """Tools and response format of a system or developer message."""
    if message.get("tools"):
        yield Part("\n\n")
        yield from dsml.tools_parts(message["tools"])
    if message.get("response_format"):
        yield Part("\n\n")
        yield from dsml.response_format_parts(message["response_format"])


def _reply_parts(index: int, message: Message, *, thinking: bool) -> Iterator[Part]:
    reply = _reply_of(index, message)
    if thinking:
        if not reply.reasoning and not reply.calls:
            raise DataError(
                f"message {index}: in thinking mode the assistant's last reply needs its reasoning, in "
                f"'reasoning_content' or in front of {END_THINK}"
            )
        yield Part(reply.reasoning or "")
        yield Part(END_THINK, special=True)
    yield Part(reply.answer)
    if reply.calls:
        yield from dsml.calls_parts(reply.calls)
    yield Part(END_OF_SENTENCE, special=True)


def _reply_of(index: int, message: Message) -> Reply:
    try:
        calls = tuple(dsml.read_call(call) for call in message.get("tool_calls") or ())
    except DataError as error:
        raise DataError(f"message {index}: {error}") from error
    content = message.get("content") or ""
    reasoning = _thought(message)
    if reasoning is not None:
        return Reply(reasoning=reasoning, answer=content, calls=calls)
    return replace(split_reply(content, thinking=False), calls=calls)


def _thought(message: Message) -> Any:
    """An assistant's reasoning under either of its names."""
    thought = message.get("reasoning_content")
    return message.get("reasoning") if thought is None else thought


def _results_from(messages: Sequence[Message], index: int) -> list[str]:
    """All results that begin with message `index`; [] for one that is not the first. Their calls must be as many."""
    if messages[index - 1]["role"] == "tool":
        return []
    end = next((i for i in range(index, len(messages)) if messages[i]["role"] != "tool"), len(messages))
    return [message["content"] for message in messages[index:end]]


def _with_tools(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> Sequence[Message]:
    """The messages with `tools` on the first system message, else the first developer message, else on a new one."""
    if not tools:
        return messages
    for role in ("system", "developer"):
        for index, message in enumerate(messages):
            if message["role"] == role:
                carrying = {**message, "tools": [*(message.get("tools") or ()), *tools]}
                return [*messages[:index], carrying, *messages[index + 1 :]]
    return [{"role": "system", "content": "", "tools": tools}, *messages]


def _tools_of(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> tuple[list[Mapping[str, Any]], list[Message]]:
    """All tools, which a chat template is given apart from the messages, and the messages without them."""
    found, bare = list(tools), []
    for index, message in enumerate(messages):
        if message.get("response_format"):
            raise DataError(f"message {index}: response_format is part of DeepSeek-V3.2's encoding only")
        found = [*(message.get("tools") or ()), *found]
        bare.append({key: value for key, value in message.items() if key != "tools"})
    return found, bare


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("a conversation needs at least one message")
    open_calls = 0  # of the reply before, which have no result yet
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in _ROLES:
            raise DataError(f"message {index}: role {role!r} is not supported; use one of {', '.join(_ROLES)}")
        if message.get("tools") and role not in ("system", "developer"):
            raise DataError(f"message {index}: tools belong on a system or developer message, not on role {role!r}")
        if message.get("tool_calls") and role != "assistant":
            raise DataError(f"message {index}: only an assistant message has tool_calls")
        _check_texts(index, message)
        if role == "tool":
            if not open_calls:
                raise DataError(f"message {index}: the result of a tool, but no call is waiting for one")
            open_calls -= 1
        elif open_calls and messages[index - 1]["role"] == "tool":
            raise DataError(f"message {index}: {open_calls} of the tool calls before it have no result")
        else:
            open_calls = len(message.get("tool_calls") or ())
    if open_calls and messages[-1]["role"] == "tool":
        raise DataError(f"{open_calls} of the last tool calls have no result")


def _check_texts(index: int, message: Message) -> None:
    role = message["role"]
    may_be_silent = role == "system" or (role == "assistant" and (message.get("tool_calls") or _thought(message)))
    for field in ("content", "reasoning_content", "reasoning"):
        value = message.get(field)
        optional = field != "content" or may_be_silent
        if not isinstance(value, str) and not (optional and value is None):
            raise DataError(f"message {index}: {field} must be a string")
    if role == "developer" and not message["content"]:
        raise DataError(f"message {index}: a developer message must say something")


def _without_special_tokens(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer, knowing none of its added tokens, so that no text can produce one.

    Tokenizers' own switch for this passes over added tokens that are not flagged special, as V3.2's <think> is not.
    """
    description = json.loads(backend.to_str())
    # Runs of spaces, which some vocabularies add, are plain text.
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"].isspace()]
    description["post_processor"] = None
    return Tokenizer.from_str(json.dumps(description))
