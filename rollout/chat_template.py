"""Conversations for models that bring a Hugging Face chat template.

A template renders text in which special strings are tokens. What people write must not become one, so it is veiled
while the template runs: a special string in a message is replaced by private-use characters, and unveiled as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from model.tokenizer import END_THINK, THINK
from rl.errors import DataError
from rl.sample import ToolCall
from rollout.dsml import MalformedReply, Part, Reply, read_call, read_value

# Characters of a private-use area that stand for a special string while a chat template runs over a message.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
_REPLY = "\ue0f2"  # stands for a reply of which only what follows is wanted

_CALL_BEGIN, _CALL_END = "<tool_call>", "</tool_call>"
_GLM_ARGUMENT = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>\s*", re.DOTALL)


class ChatTemplate:
    """One tokenizer's template. Calls of tools are read in the two formats that templates announce: JSON between
    ``<tool_call>`` tags (Qwen, Hermes), and ``<arg_key>``/``<arg_value>`` pairs between them (GLM)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: Sequence[str]) -> None:
        """`special`: the strings that the tokenizer turns into tokens of their own."""
        self._tokenizer = tokenizer
        # Text holding a veil's own character must be veiled first, or it would read as a veil.
        self._veiled = [_OPEN, _REPLY, *sorted(special, key=len, reverse=True)]
        template = tokenizer.chat_template
        source = "\n".join(template.values()) if isinstance(template, dict) else str(template)
        self._pairs = "<arg_key>" in source
        self.reads_tools = _CALL_BEGIN in source
        """Whether it is known how this model writes a call."""
        assert isinstance(tokenizer.eos_token, str)
        self._end = tokenizer.eos_token

    def prompt(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Part]:
        """Parts of the prompt that the next assistant message continues."""
        return list(self._parts(self._render(messages, thinking=thinking, tools=tools, open_reply=True)))

    def demonstration(
        self, messages: Sequence[Mapping[str, Any]], *, thinking: bool, tools: Sequence[Mapping[str, Any]] = ()
    ) -> list[Part]:
        """Parts of a conversation that ends with an assistant message; those of the last turn are `sampled`.

        Raises DataError for a template that renders a reply differently from the prompt that it continues.
        """
        turn = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        parts: list[Part] = []
        written = ""
        for index in range(turn + 1, len(messages)):
            if messages[index]["role"] != "assistant":
                continue
            opening = self._render(messages[:index], thinking=thinking, tools=tools, open_reply=True)
            whole = self._render(messages[: index + 1], thinking=thinking, tools=tools, open_reply=False)
            if not (opening.startswith(written) and whole.startswith(opening)):
                raise DataError(
                    "the model's chat template renders a finished reply differently from the prompt it answers, so a "
                    "demonstration cannot be split into prompt and reply"
                )
            reply, ended, _ = whole[len(opening) :].rpartition(self._end)
            if not ended:
                raise DataError("the model's chat template does not end a reply with the end-of-sentence token")
            parts += self._parts(opening[len(written) :])
            parts += self._parts(reply + ended, sampled=True)
            written = opening + reply + ended
        return parts

    def results(
        self,
        messages: Sequence[Mapping[str, Any]],
        calls: Sequence[ToolCall],
        results: Sequence[str],
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
    ) -> list[Part]:
        """Parts that follow a reply with these calls, up to where the next reply begins.

        Raises DataError where the template shows no end of the reply.
        """
        # A reply that cannot be read has made no call; a stand-in lets the template show its error as a result.
        named = calls or (ToolCall(name="unknown"),)
        assistant = {
            "role": "assistant",
            "content": _REPLY,
            "tool_calls": [
                {"id": f"call_{number}", "type": "function", "function": {"name": call.name, "arguments": {}}}
                for number, call in enumerate(named)
            ],
        }
        answers = [
            {"role": "tool", "tool_call_id": f"call_{number}", "name": self._veil(call.name), "content": result}
            for number, (call, result) in enumerate(zip(named, results, strict=True))
        ]
        rendered = self._render(
            [*messages, assistant, *answers], thinking=thinking, tools=tools, open_reply=True, veil_reply=False
        )
        behind = rendered.rpartition(_REPLY)[2]
        _, ended, tail = behind.partition(self._end)
        if not ended:
            raise DataError("the model's chat template does not end a reply before the results of its tools")
        return list(self._parts(tail))

    def parse_reply(self, text: str, *, thinking: bool) -> Reply:
        """Reads a whole reply, without the token that ended it. Raises MalformedReply."""
        before, closed, after = text.partition(END_THINK)
        if thinking and not closed:
            raise MalformedReply(f"the reply never closes its thought with {END_THINK}", in_calls=False)
        reasoning = before.removeprefix(THINK) if closed else None
        answer, *blocks = (after if closed else text).split(_CALL_BEGIN)
        return Reply(reasoning=reasoning, answer=answer, calls=tuple(self._call(block) for block in blocks))

    def _call(self, block: str) -> ToolCall:
        inside, ended, behind = block.partition(_CALL_END)
        if not ended:
            raise MalformedReply(f"a tool call is not closed with {_CALL_END}", in_calls=True)
        if behind.strip():
            raise MalformedReply(f"{behind.strip()[:20]!r} stands behind a tool call", in_calls=True)
        return _read_pairs(inside) if self._pairs else _read_json(inside)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
        open_reply: bool,
        veil_reply: bool = True,
    ) -> str:
        if tools and not self.reads_tools:
            raise DataError(
                "it is not known how this model writes a tool call: its chat template does not mention <tool_call>; "
                "use a model whose template does, or leave tools out"
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [self._veil_message(message, veil_reply) for message in messages],
                tools=[{"type": "function", "function": tool.get("function", tool)} for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=open_reply,
                thinking=thinking,
                enable_thinking=thinking,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the model's chat template refuses the conversation: {error}") from error
        assert isinstance(rendered, str)
        return rendered

    def _veil_message(self, message: Mapping[str, Any], veil_reply: bool) -> dict[str, Any]:
        """A template reads ``</think>`` in what the model said, so only a veil's own characters are veiled there."""
        content = message.get("content") or ""
        if message["role"] != "assistant":
            content = self._veil(content)
        elif veil_reply:
            content = self._veil(content, self._veiled[:2])
        veiled = {**message, "content": content}
        if message.get("tool_calls"):
            calls = [read_call(call) for call in message["tool_calls"]]  # arguments as objects, as templates want them
            functions = [{"name": self._veil(call.name), "arguments": self._veil(call.arguments)} for call in calls]
            veiled["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return veiled

    def _veil(self, value: Any, strings: Sequence[str] | None = None) -> Any:
        """The value with special strings replaced wherever text stands in it."""
        if isinstance(value, Mapping):
            return {self._veil(key): self._veil(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._veil(inner) for inner in value]
        if isinstance(value, str):
            for index, string in enumerate(self._veiled if strings is None else strings):
                value = value.replace(string, f"{_OPEN}{index}{_CLOSE}")
        return value

    def _parts(self, rendered: str, *, sampled: bool = False) -> Iterator[Part]:
        head, *veiled = rendered.split(_OPEN)
        yield Part(head, special=True, sampled=sampled)
        for piece in veiled:
            index, _, tail = piece.partition(_CLOSE)
            yield Part(self._veiled[int(index)], sampled=sampled)
            yield Part(tail, special=True, sampled=sampled)


def _read_json(text: str) -> ToolCall:
    try:
        call = read_value(text)
    except (ValueError, RecursionError) as error:
        raise MalformedReply(f"the tool call is not JSON ({error})", in_calls=True) from error
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise MalformedReply('a tool call must be an object with "name" and "arguments"', in_calls=True)
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise MalformedReply("the arguments of a tool call must be an object", in_calls=True)
    return ToolCall(name=call["name"], arguments=arguments)


def _read_pairs(text: str) -> ToolCall:
    name, _, pairs = text.strip().partition("\n")
    arguments: dict[str, Any] = {}
    if _GLM_ARGUMENT.sub("", pairs).strip() or not name.strip() or "<" in name:
        raise MalformedReply("a tool call must be a name and pairs of <arg_key> and <arg_value>", in_calls=True)
    for key, value in _GLM_ARGUMENT.findall(pairs):
        if key.strip() in arguments:
            raise MalformedReply(f"the parameter '{key.strip()}' is given twice", in_calls=True)
        try:
            arguments[key.strip()] = read_value(value)
        except (ValueError, RecursionError):
            arguments[key.strip()] = value
    return ToolCall(name=name.strip(), arguments=arguments)
