"""Conversations as token ids, in DeepSeek-V3.2's encoding or, for other models, in their own chat template.

V3.2 ships no template. Its rules for plain conversations: a system message stands as it is; a user message is
``<｜User｜>{content}<｜Assistant｜>``, then ``<think>`` when it is the last one and the reply shall think, else
``</think>``; an assistant message is ``{content}<｜end▁of▁sentence｜>``, preceded by ``{reasoning}</think>`` only when
it answers the last user message in thinking mode. So earlier reasoning is dropped as soon as a new user message comes,
and the tokens of one turn are not a prefix of the next turn's prompt.

What people write is always encoded as plain text: the string ``<｜Assistant｜>`` in a message never becomes the token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from model.tokenizer import ASSISTANT, BEGIN_OF_SENTENCE, END_OF_SENTENCE, END_THINK, THINK, USER
from rl.errors import DataError
from rl.sample import NDArray

Message = Mapping[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": str}``; an assistant may add ``reasoning_content``."""

# Characters of a private-use area that stand for a special string while a chat template runs over a message.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply taken apart at ``</think>``. `reasoning` is None where there is none."""

    reasoning: str | None
    answer: str


@dataclass(frozen=True, slots=True)
class _Part:
    text: str
    special: bool = False  # one special token, rather than text in which none is recognised
    sampled: bool = False  # what the model itself says


def split_reply(reply: str, *, thinking: bool) -> Reply:
    """Takes a sampled reply apart at the first ``</think>``.

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
    """Encodes conversations for one tokenizer.

    Example: ``Conversation(tokenizer).encode([{"role": "user", "content": "2+2?"}], thinking=True)``.
    Raises DataError when the tokenizer has neither V3.2's tokens nor a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise DataError(f"{type(tokenizer).__name__} is not a fast tokenizer; the model needs a tokenizer.json")
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        needed = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, USER, ASSISTANT, THINK, END_THINK)
        self._is_v32 = all(token in known for token in needed)
        # Text holding the veil's own character must be veiled first, or it would read as a veil.
        self._veiled = [_OPEN, *sorted((token for token in known if not token.isspace()), key=len, reverse=True)]
        if not self._is_v32 and not tokenizer.chat_template:
            absent = next(token for token in needed if token not in known)
            raise DataError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template and lacks "
                f"DeepSeek-V3.2's token {absent}, so conversations cannot be encoded for it"
            )
        if not isinstance(tokenizer.eos_token_id, int):
            raise DataError(f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no end-of-sentence token")
        self.stop_token_ids: tuple[int, ...] = (tokenizer.eos_token_id,)
        """Tokens that end a reply."""
        self._plain = _without_special_tokens(backend)

    def encode(self, messages: Sequence[Message], *, thinking: bool) -> NDArray:
        """int32 [P]: the prompt that the next assistant message continues.

        Raises DataError for a conversation that does not end with a user message, or whose messages this encoding
        does not cover (tools, other roles).
        """
        _check(messages)
        if messages[-1]["role"] != "user":
            raise DataError(f"a prompt must end with a user message, not with role {messages[-1]['role']!r}")
        if not self._is_v32:
            return self._encode_rendered(self._render_template(messages, thinking=thinking, open_reply=True))
        return self._encode_parts(_v32_parts(messages, thinking=thinking))[0]

    def encode_demonstration(self, messages: Sequence[Message], *, thinking: bool) -> tuple[NDArray, NDArray]:
        """(token ids int32 [T], sampled bool [T]) of a conversation that ends with the assistant's reply.

        `sampled` marks the last reply with its end-of-sentence token: what supervised training learns. The tokens
        before it equal ``encode(messages[:-1])``. A reply may hold its reasoning in ``reasoning_content`` or in
        front of a ``</think>`` in its content; in thinking mode it must have some.
        """
        _check(messages)
        if messages[-1]["role"] != "assistant" or len(messages) < 2 or messages[-2]["role"] != "user":
            raise DataError("a demonstration must end with a user message and the assistant's reply to it")
        if self._is_v32:
            return self._encode_parts(_v32_parts(messages, thinking=thinking))
        prompt = self.encode(messages[:-1], thinking=thinking)
        opening = self._render_template(messages[:-1], thinking=thinking, open_reply=True)
        whole = self._render_template(messages, thinking=thinking, open_reply=False)
        if not whole.startswith(opening):
            raise DataError(
                "the model's chat template renders a finished reply differently from the prompt it answers, so a "
                "demonstration cannot be split into prompt and reply"
            )
        reply = self._encode_rendered(whole[len(opening) :])
        ends = np.flatnonzero(np.isin(reply, self.stop_token_ids))
        if len(ends) == 0:
            raise DataError("the model's chat template does not end a reply with the end-of-sentence token")
        reply = reply[: ends[-1] + 1]
        sampled = np.arange(len(prompt) + len(reply)) >= len(prompt)
        return np.concatenate([prompt, reply]), sampled

    def decode(self, token_ids: NDArray) -> str:
        """The text of a reply: without its stop token, other special tokens spelled out."""
        if len(token_ids) and int(token_ids[-1]) in self.stop_token_ids:
            token_ids = token_ids[:-1]
        text = self.tokenizer.decode(token_ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _encode_parts(self, parts: Iterator[_Part]) -> tuple[NDArray, NDArray]:
        ids: list[int] = []
        sampled: list[bool] = []
        for part in parts:
            encoded = [self._special_id(part.text)] if part.special else self._encode_text(part.text)
            ids += encoded
            sampled += [part.sampled] * len(encoded)
        return np.array(ids, np.int32), np.array(sampled, bool)

    def _special_id(self, token: str) -> int:
        index = self.tokenizer.convert_tokens_to_ids(token)
        assert isinstance(index, int)
        return index

    def _encode_text(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def _render_template(self, messages: Sequence[Message], *, thinking: bool, open_reply: bool) -> str:
        try:
            rendered = self.tokenizer.apply_chat_template(
                [self._veil(message) for message in messages],
                tokenize=False,
                add_generation_prompt=open_reply,
                thinking=thinking,
                enable_thinking=thinking,
            )
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses the conversation: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _veil(self, message: Message) -> dict[str, Any]:
        """Replaces special strings in what people wrote; a template also reads ``</think>`` in the model's replies."""
        content = message["content"]
        strings = self._veiled[:1] if message["role"] == "assistant" else self._veiled
        for index, string in enumerate(strings):
            content = content.replace(string, f"{_OPEN}{index}{_CLOSE}")
        return {**message, "content": content}

    def _encode_rendered(self, rendered: str) -> NDArray:
        """Encodes a rendered template: special tokens are recognised, veiled strings become text again."""
        ids: list[int] = []
        head, *veiled = rendered.split(_OPEN)
        ids += self.tokenizer.encode(head, add_special_tokens=False)
        for piece in veiled:
            index, _, tail = piece.partition(_CLOSE)
            ids += self._encode_text(self._veiled[int(index)])
            ids += self.tokenizer.encode(tail, add_special_tokens=False)
        return np.array(ids, np.int32)


def _v32_parts(messages: Sequence[Message], *, thinking: bool) -> Iterator[_Part]:
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    yield _Part(BEGIN_OF_SENTENCE, special=True)
    for index, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "system":
            yield _Part(content)
        elif message["role"] == "user":
            yield _Part(USER, special=True)
            yield _Part(content)
            yield _Part(ASSISTANT, special=True)
            yield _Part(THINK if thinking and index == last_user else END_THINK, special=True)
        else:
            reply = _reply_of(message)
            said = index == len(messages) - 1
            if thinking and index > last_user:
                if reply.reasoning is None:
                    raise DataError(
                        f"message {index}: in thinking mode the assistant's last reply needs its reasoning, in "
                        f"'reasoning_content' or in front of {END_THINK}"
                    )
                yield _Part(reply.reasoning, sampled=said)
                yield _Part(END_THINK, special=True, sampled=said)
            yield _Part(reply.answer, sampled=said)
            yield _Part(END_OF_SENTENCE, special=True, sampled=said)


def _reply_of(message: Message) -> Reply:
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if reasoning is not None:
        return Reply(reasoning=reasoning, answer=message["content"])
    return split_reply(message["content"], thinking=False)


def _check(messages: Sequence[Message]) -> None:
    if not messages:
        raise DataError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        role = message.get("role")
        if role not in ("system", "user", "assistant"):
            raise DataError(f"message {index}: role {role!r} is not supported; use system, user or assistant")
        if message.get("tools") or message.get("tool_calls"):
            raise DataError(f"message {index}: tools are not supported in conversations")
        for field in ("content", "reasoning_content", "reasoning"):
            value = message.get(field, "")
            if (field == "content" and field not in message) or not isinstance(value, str):
                raise DataError(f"message {index}: {field} must be a string")


def _without_special_tokens(backend: Tokenizer) -> Tokenizer:
    """The same tokenizer, knowing none of its added tokens, so that no text can produce one.

    Tokenizers' own switch for this passes over added tokens that are not flagged special, as V3.2's <think> is not.
    """
    description = json.loads(backend.to_str())
    # Runs of spaces, which some vocabularies add, are plain text.
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"].isspace()]
    description["post_processor"] = None
    return Tokenizer.from_str(json.dumps(description))
