"""The text of DeepSeek-V3.2's tool use: how tools, calls and results are written, and the strict parser of replies.

    reply    : {reasoning}</think>{answer}{calls}          without thinking: {answer}{calls}
    calls    : \\n\\n<｜DSML｜function_calls>\\n{one or more invokes}</｜DSML｜function_calls>
    invoke   : <｜DSML｜invoke name="{name}">\\n{parameters, or an empty line}</｜DSML｜invoke>\\n
    parameter: <｜DSML｜parameter name="{name}" string="true">{text as it is}</｜DSML｜parameter>\\n
               <｜DSML｜parameter name="{name}" string="false">{JSON}</｜DSML｜parameter>\\n
    results  : \\n\\n<function_results>\\n<result>{text}</result>...\\n</function_results>\\n\\n<think> (or </think>)

Format and fixed texts are those of `encoding/encoding_dsv32.py` in deepseek-ai/DeepSeek-V3.2 on Hugging Face (MIT):
a checkpoint was trained on exactly these words, with the empty lines that SGLang's and vLLM's copies of them lack. The
parser reads and refuses what the official one does, and refuses three things more: a block without a call or without
its end (which the official parser demands only of a reply that ended); a name with a quotation mark; and a parameter
that says it is JSON and is not, is so only together with the next one, or holds half of a surrogate pair.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from model.tokenizer import BEGIN_OF_SENTENCE, DSML, END_OF_SENTENCE, END_THINK, THINK
from rl.errors import DataError
from rl.sample import ToolCall

CALLS_BEGIN = f"\n\n<{DSML}function_calls"

_TOOLS = f"""## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{DSML}function_calls>" block like the following as part of your reply to the \
user:
<{DSML}function_calls>
<{DSML}invoke name="$FUNCTION_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$FUNCTION_NAME2">
...
</{DSML}invoke>
</{DSML}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<{DSML}function_calls>
...
</{DSML}function_calls>

<function_results>
...
</function_results>

{THINK}...thinking about results{END_THINK}

Here are the functions available in JSONSchema format:
<functions>
"""
_RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
_STRUCTURE = re.compile(f"({DSML}|{THINK}|{END_THINK})")
_SURROGATE = re.compile("[\\ud800-\\udfff]")
_FORBIDDEN = (BEGIN_OF_SENTENCE, END_OF_SENTENCE, THINK, END_THINK, DSML)

# Each lets one more line break pass at its end, as the official parser does, whose patterns end in `$`.
_NAME = re.compile(r'\s*name="([^"]*)">\n\n?')
_PARAMETER = re.compile(r' name="([^"]*)" string="(true|false)">(.*)<\n?', re.DOTALL)


class MalformedReply(ValueError):
    """A reply that breaks the format; the message is a sentence that the policy may be shown."""

    def __init__(self, reason: str, *, in_calls: bool) -> None:
        super().__init__(reason)
        self.in_calls = in_calls
        """Whether it is the tool calls that cannot be read, rather than thought and answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A reply taken apart. `reasoning` is None where there is none."""

    reasoning: str | None
    answer: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a prompt: one special token, or text in which none is recognised."""

    text: str
    special: bool = False
    sampled: bool = False  # what the model itself says


def read_call(call: Any) -> ToolCall:
    """A call as messages hold it: ``{"function": {"name", "arguments": object or JSON}}``. Raises DataError."""
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    name, arguments = function.get("name"), function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = _whole(arguments, json.loads(arguments))
        except ValueError as error:
            raise DataError(f"the arguments of a tool call are not JSON ({error})") from error
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise DataError(f"a tool call needs a name and an object of arguments, not {call!r}")
    return ToolCall(name=name, arguments=arguments)


def tools_parts(tools: Sequence[Mapping[str, Any]]) -> Iterator[Part]:
    """The block that shows tools to the model, one JSON function a line."""
    yield from _fixed(_TOOLS)
    yield Part("\n".join(_json(tool.get("function", tool)) for tool in tools))
    yield from _fixed("\n</functions>\n")


def response_format_parts(schema: Any) -> Iterator[Part]:
    yield Part(_RESPONSE_FORMAT + _json(schema))


def calls_parts(calls: Sequence[ToolCall]) -> Iterator[Part]:
    """The block of calls that ends a reply. Raises DataError for a name that the format cannot hold."""
    yield from _fixed(f"{CALLS_BEGIN}>\n")
    for call in calls:
        yield from _fixed(f"<{DSML}invoke ")
        yield Part(f'name="{_checked(call.name)}">\n')
        for name, value in call.arguments.items():
            is_text = isinstance(value, str)
            yield from _fixed(f"<{DSML}parameter ")
            yield Part(f'name="{_checked(name)}" string="{"true" if is_text else "false"}">')
            yield Part(value if is_text else _json(value))
            yield from _fixed(f"</{DSML}parameter>\n")
        yield from _fixed(("" if call.arguments else "\n") + f"</{DSML}invoke>\n")
    yield from _fixed(f"</{DSML}function_calls>")


def results_parts(results: Sequence[str], *, thinking: bool) -> Iterator[Part]:
    """What follows a reply whose calls had these results, up to where the next reply begins."""
    lines = "".join(f"\n<result>{result}</result>" for result in results)
    yield Part(f"\n\n<function_results>{lines}\n</function_results>\n\n")
    yield Part(THINK if thinking else END_THINK, special=True)


def parse_reply(text: str, *, thinking: bool) -> Reply:
    """Reads a whole reply, without the token that ended it; it begins inside ``<think>`` in thinking mode.

    Raises MalformedReply where the official parser does, and in the three cases that the module names.
    """
    reasoning = None
    rest = text
    if thinking:
        reasoning, closed, rest = text.partition(END_THINK)
        if CALLS_BEGIN in reasoning:
            raise MalformedReply(f"a tool call must come after {END_THINK}, not inside the thought", in_calls=True)
        if not closed:
            raise MalformedReply(f"the reply never closes its thought with {END_THINK}", in_calls=False)
    answer, opened, block = rest.partition(CALLS_BEGIN)
    for token in _FORBIDDEN:
        if token in answer or (reasoning and token in reasoning):
            raise MalformedReply(f"{token} stands outside a block of tool calls", in_calls=token == DSML)
    return Reply(reasoning=reasoning, answer=answer, calls=tuple(_calls(block)) if opened else ())


def _calls(block: str) -> list[ToolCall]:
    """Everything behind ``<｜DSML｜function_calls``, of which nothing may be left over."""
    calls = []
    while True:
        between, stop, block = _until(block, f"<{DSML}invoke", f"</{DSML}function_calls>")
        if between != ">\n":
            raise MalformedReply(
                f"a line break and <{DSML}invoke or </{DSML}function_calls> must follow the tag before it, "
                f"not {between[:20]!r}",
                in_calls=True,
            )
        if stop != f"<{DSML}invoke":
            break
        call, block = _call(block)
        calls.append(call)
    if not calls:
        raise MalformedReply("the block of tool calls holds no call", in_calls=True)
    if block:
        raise MalformedReply(f"nothing may follow the block of tool calls, but {block[:20]!r} does", in_calls=True)
    return calls


def _call(text: str) -> tuple[ToolCall, str]:
    """The call behind ``<｜DSML｜invoke``, and what follows ``</｜DSML｜invoke``."""
    header, stop, text = _until(text, f"<{DSML}parameter", f"</{DSML}invoke")
    named = _NAME.fullmatch(header)
    if not named:
        raise MalformedReply(f'an invoke tag reads name="..."> and a line break, not {header[:40]!r}', in_calls=True)
    arguments: dict[str, Any] = {}
    while stop == f"<{DSML}parameter":
        inside, _, text = _until(text, f"/{DSML}parameter")
        matched = _PARAMETER.fullmatch(inside)
        if not matched:
            raise MalformedReply(
                f'a parameter reads name="..." string="true|false">value, not {inside[:40]!r}', in_calls=True
            )
        name, is_text, value = matched.groups()
        if name in arguments:
            raise MalformedReply(f"the parameter '{name}' of {named[1]} is given twice", in_calls=True)
        arguments[name] = value if is_text == "true" else _parsed(name, value)
        between, stop, text = _until(text, f"<{DSML}parameter", f"</{DSML}invoke")
        if between != ">\n":
            raise MalformedReply(f"a line break must follow the parameter '{name}' and nothing else", in_calls=True)
    return ToolCall(name=named[1], arguments=arguments), text


def _until(text: str, *stops: str) -> tuple[str, str, str]:
    """What stands before the first of the stops, that stop, and what stands behind it."""
    found = [(text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        raise MalformedReply(f"{' or '.join(stops)} is missing", in_calls=True)
    place, stop = min(found)
    return text[:place], stop, text[place + len(stop) :]


def read_value(text: str) -> Any:
    """A JSON value of a reply. Raises ValueError or RecursionError for anything else, NaN and infinities included."""
    return _whole(text, json.loads(text, parse_constant=_no_number))


def _whole(text: str, value: Any) -> Any:
    """The value, read from this JSON. Raises ValueError for half of a surrogate pair, which no text can hold."""
    if "\\ud" in text.lower() and _SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("it holds half of a surrogate pair, which is no character")
    return value


def _parsed(name: str, value: str) -> Any:
    try:
        return read_value(value)
    except (ValueError, RecursionError):
        raise MalformedReply(
            f"the parameter '{name}' says it is not a string, but its value is not JSON", in_calls=True
        ) from None


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _fixed(text: str) -> Iterator[Part]:
    """Text of the format itself, in which the structural tokens are tokens."""
    for piece in _STRUCTURE.split(text):
        if piece:
            yield Part(piece, special=bool(_STRUCTURE.fullmatch(piece)))


def _checked(name: str) -> str:
    if '"' in name or DSML in name:
        raise DataError(f"{name!r} cannot be the name of a tool or a parameter: the format has no way to quote it")
    return name


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
