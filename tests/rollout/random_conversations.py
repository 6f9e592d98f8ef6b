"""Random conversations and replies for DeepSeek-V3.2's encoding: the same ones from the same seed in every Python.

Most are what people and models write: several turns, tools on system and developer messages, response formats, calls
with parameters of every JSON type, thoughts present and absent, texts with quotes, line breaks, markup and the model's
own special strings in them. The rest breaks a rule on purpose, because what is refused must agree as well.

Only :meth:`random.Random.random` is drawn from, whose sequence Python promises for a seed.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from model.tokenizer import BEGIN_OF_SENTENCE, DSML, END_OF_SENTENCE, END_THINK, SPECIAL_TOKENS, THINK

T = TypeVar("T")
Message = dict[str, Any]

_WORDS = (
    "a", "weather in ", "Paris", " ", "\n", "\n\n", "\t", "\r\n", "é", "日本語", "🙂", "👩‍🚀", "עברית", "ｆｕｌｌ",
    '"', "'", "\\", "\\n", "%s", "%", "{", "}", "{content}", "{0}", "[1, 2]", "null", "<", ">", "</", "&lt;", "`", "$",
    "<result>", "</result>", "<function_results>", "</function_results>", "name=", "```json\n", "3.50", "-1", "\u2028",
)  # fmt: skip
_STRUCTURE = (
    *(token for token in SPECIAL_TOKENS if token != END_THINK),
    f"<{DSML}invoke name=", f"</{DSML}invoke>", f"</{DSML}parameter>", f"\n\n<{DSML}function_calls>",
)  # fmt: skip
_MARKS = (END_THINK, THINK, BEGIN_OF_SENTENCE, END_OF_SENTENCE, "\n", "\n\n", " ", '"', "<", ">", "/", "x")
_NAMES = (
    "f", "get_weather", "search", "データ", "a b", "x-1", "", "id", "snake_case_name", "café", "null", "n\n", "<v>",
)  # fmt: skip
_EMPTY = ("\n", "\n", "")  # what stands between the tags of a call without parameters
_ODD_VALUES = (
    '1, "b": 2', '1, "a": 2', '{"x": 1', "2}", " 1\n", "01", "[1,]", "'a'", "True", r'"\ud83d"', r'{"\uDE42": 1}',
)  # fmt: skip
_UNSPEAKABLE = ('say "hi"', '"', f"{DSML}f", f'f"><{DSML}')
_SCALARS = (None, True, False, 0, 1, -7, 10**20, 1.0, -0.0, 1e-7, 2.5e300, float("nan"), float("inf"), "", "3", "true")


@dataclass(frozen=True, slots=True)
class Conversation:
    messages: list[Message]
    thinking: bool
    drop_thinking: bool
    """What the official encoder is told; ours has no such switch."""

    def __str__(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)


@dataclass(frozen=True, slots=True)
class Reply:
    text: str
    """Without the end-of-sentence token at its end, except where it stands there once too often."""
    thinking: bool
    ended: bool
    """Whether the end-of-sentence token followed."""

    def __str__(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False, indent=1)


class _Dice:
    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def between(self, low: int, high: int) -> int:
        """Both ends included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self._random() * len(items))]

    def text(self, longest: int = 6) -> str:
        words = [self.pick(_WORDS) for _ in range(self.between(0, longest))]
        if self.chance(0.08):
            words.insert(self.between(0, len(words)), self.pick(_STRUCTURE))
        return "".join(words)

    def json(self, depth: int = 2) -> Any:
        kind = self.between(0, 5) if depth else 0
        if kind == 4:
            return [self.json(depth - 1) for _ in range(self.between(0, 3))]
        if kind == 5:
            return {self.pick(_NAMES): self.json(depth - 1) for _ in range(self.between(0, 3))}
        return self.text() if self.chance(0.5) else self.pick(_SCALARS)


def conversation(seed: int) -> Conversation:
    """Ends with any role; about one in five breaks a rule."""
    dice = _Dice(seed)
    messages = _opening(dice)
    for _ in range(dice.between(1, 3)):
        messages += _turn(dice)
    if dice.chance(0.4):
        messages = messages[: dice.between(1, len(messages))]
    if dice.chance(0.2):
        dice.pick(_BREAKS)(dice, messages)
    return Conversation(messages, thinking=dice.chance(0.5), drop_thinking=dice.chance(0.8))


def _opening(dice: _Dice) -> list[Message]:
    if dice.chance(0.35):
        return []
    system: Message = {"role": "system", "content": dice.text()}
    if dice.chance(0.1):
        system["content"] = None
    _offer(dice, system)
    return [system, {"role": "system", "content": dice.text()}] if dice.chance(0.05) else [system]


def _offer(dice: _Dice, message: Message) -> None:
    if dice.chance(0.3):
        message["tools"] = [_tool(dice) for _ in range(dice.between(0, 3))]
    if dice.chance(0.25):
        message["response_format"] = dice.pick(({"type": "json_object"}, {}, {"schema": dice.json(3)}))


def _tool(dice: _Dice) -> Message:
    properties = {dice.pick(_NAMES): {"type": "string", "description": dice.text()} for _ in range(dice.between(0, 2))}
    function = {"name": dice.pick(_NAMES), "description": dice.text(), "parameters": {"properties": properties}}
    if dice.chance(0.2):
        function["strict"] = dice.json()
    return {"type": "function", "function": function}


def _turn(dice: _Dice) -> list[Message]:
    """A message that asks, and the replies to it with their results."""
    asking: Message = {"role": "user", "content": dice.text()}
    if dice.chance(0.25):
        asking = {"role": "developer", "content": dice.text() or "?"}
        _offer(dice, asking)
    messages = [asking]
    for _ in range(dice.pick((0, 1, 1, 2, 3))):
        messages += _reply(dice)
    return messages


def _reply(dice: _Dice) -> list[Message]:
    message: Message = {"role": "assistant", "content": dice.text()}
    if dice.chance(0.85):
        message["reasoning_content"] = dice.text() if dice.chance(0.9) else dice.pick((None, ""))
    if dice.chance(0.1):
        message["content"] = None
    if not dice.chance(0.45):
        return [message]
    calls = [_call(dice) for _ in range(dice.pick((1, 1, 2, 3)))]
    message["tool_calls"] = calls
    num_results = len(calls) if dice.chance(0.92) else dice.between(0, len(calls))
    return [message, *({"role": "tool", "content": dice.text()} for _ in range(num_results))]


def _call(dice: _Dice) -> Message:
    arguments = {dice.pick(_NAMES): dice.json() for _ in range(dice.between(0, 3))}
    written = json.dumps(arguments, ensure_ascii=dice.chance(0.5), indent=dice.pick((None, None, 2)))
    return {"type": "function", "function": {"name": dice.pick(_NAMES), "arguments": written}}


def _drop(dice: _Dice, messages: list[Message]) -> None:
    if len(messages) > 1:
        del messages[dice.between(0, len(messages) - 1)]


def _repeat(dice: _Dice, messages: list[Message]) -> None:
    messages.insert(dice.between(0, len(messages)), copy.deepcopy(dice.pick(messages)))


def _swap(dice: _Dice, messages: list[Message]) -> None:
    one, other = dice.between(0, len(messages) - 1), dice.between(0, len(messages) - 1)
    messages[one], messages[other] = messages[other], messages[one]


def _misplace(dice: _Dice, messages: list[Message]) -> None:
    field, value = dice.pick((("tools", [_tool(dice)]), ("tool_calls", [_call(dice)]), ("response_format", {"a": 1})))
    dice.pick(messages)[field] = value


def _unsay(dice: _Dice, messages: list[Message]) -> None:
    dice.pick(messages)[dice.pick(("content", "content", "reasoning_content"))] = dice.pick((None, "", 3, ["x"]))


def _rename(dice: _Dice, messages: list[Message]) -> None:
    dice.pick(messages)["role"] = dice.pick(("critic", "Assistant", "tool", "user", "developer", "assistant"))


def _break_call(dice: _Dice, messages: list[Message]) -> None:
    calling = [message for message in messages if message.get("tool_calls")]
    if not calling:
        return messages.append({"role": "tool", "content": dice.text()})
    function = dice.pick(dice.pick(calling)["tool_calls"])["function"]
    unspeakable = dice.pick(_UNSPEAKABLE)
    change = dice.pick(
        (
            {"name": unspeakable},
            {"arguments": json.dumps({unspeakable: 1})},
            {"arguments": dice.pick(("[1]", "{", "", "3", '"a"', "null"))},
        )
    )
    function.update(change)


def _begin_with_result(dice: _Dice, messages: list[Message]) -> None:
    messages.insert(0, {"role": "tool", "content": dice.text()})
    if dice.chance(0.5):
        messages += _reply(dice)[:1]


_BREAKS: tuple[Callable[[_Dice, list[Message]], None], ...] = (
    *(_drop, _repeat, _swap, _misplace, _unsay, _rename, _break_call, _break_call, _begin_with_result),
)  # fmt: skip


def reply(seed: int) -> Reply:
    """About half are well formed; the others are damaged in one to three places, or cut off."""
    dice = _Dice(seed)
    thinking = dice.chance(0.5)
    text = f"{dice.text()}{END_THINK if thinking else ''}{dice.text()}"
    if dice.chance(0.75):
        text += _block(dice)
    if dice.chance(0.5):
        for _ in range(dice.pick((1, 1, 2, 3))):
            text = dice.pick(_DAMAGES)(dice, text)
    return Reply(text, thinking, ended=dice.chance(0.7))


def _block(dice: _Dice) -> str:
    """A block of calls, written out; in a few the calls are missing, or a value is not what it says it is."""
    text = f"\n\n<{DSML}function_calls>\n"
    for _ in range(dice.pick((0, 1, 1, 1, 1, 1, 1, 2, 2, 3))):
        text += f'<{DSML}invoke name="{_spoken(dice)}">\n'
        parameters = "".join(_parameter(dice) for _ in range(dice.between(0, 3)))
        text += f"{parameters or dice.pick(_EMPTY)}</{DSML}invoke>\n"
    return f"{text}</{DSML}function_calls>"


def _spoken(dice: _Dice) -> str:
    return dice.pick(_UNSPEAKABLE) if dice.chance(0.02) else dice.pick(_NAMES)


def _parameter(dice: _Dice) -> str:
    value = dice.json()
    is_text = isinstance(value, str) and not dice.chance(0.05)
    written = value if isinstance(value, str) else json.dumps(value, ensure_ascii=dice.chance(0.5))
    if dice.chance(0.03):
        written = dice.pick(_ODD_VALUES)
    kind = "true" if is_text else "false"
    return f'<{DSML}parameter name="{_spoken(dice)}" string="{kind}">{written}</{DSML}parameter>\n'


def _cut(dice: _Dice, text: str) -> str:
    return text[: dice.between(0, len(text))]


def _cut_behind(dice: _Dice, text: str) -> str:
    """At the end of a line or of a tag, where a parser is most likely to be content with what it has."""
    ends = [at + 1 for at, character in enumerate(text) if character in "\n>e"]
    return text[: dice.pick(ends)] if ends else ""


def _delete(dice: _Dice, text: str) -> str:
    at = dice.between(0, len(text))
    return text[:at] + text[at + dice.pick((1, 1, 2, 5)) :]


def _insert(dice: _Dice, text: str) -> str:
    at = dice.between(0, len(text))
    marks = (
        *_STRUCTURE,
        END_THINK,
        THINK,
        BEGIN_OF_SENTENCE,
        END_OF_SENTENCE,
        "\n",
        "\n\n",
        " ",
        '"',
        "<",
        ">",
        "/",
        "x",
    )
    return text[:at] + dice.pick(marks) + text[at:]


def _append(dice: _Dice, text: str) -> str:
    return text + dice.pick(
        ("\n", " ", "x", END_OF_SENTENCE, f"\n\n<{DSML}function_calls>\n", f"</{DSML}function_calls>")
    )


def _lines(dice: _Dice, text: str) -> str:
    """One line lost, given twice, or moved."""
    lines = text.split("\n")
    line = lines.pop(dice.between(0, len(lines) - 1))
    for _ in range(dice.between(0, 2)):
        lines.insert(dice.between(0, len(lines)), line)
    return "\n".join(lines)


def _misspell(dice: _Dice, text: str) -> str:
    """One of the places where a mark of the format stands, spelled otherwise."""
    mark, other = dice.pick(_MISSPELLINGS)
    places = [at for at in range(len(text)) if text.startswith(mark, at)]
    if not places:
        return text
    at = dice.pick(places)
    return text[:at] + other + text[at + len(mark) :]


_MISSPELLINGS = (
    ('"true"', '"false"'), ('"true"', '"True"'), ('"false"', '"true"'), ('"false"', '"maybe"'), (' name="', " name='"),
    (' name="', '  name="'), (' name="', '\nname="'), (' name="', 'name="'), ('">\n', '">'), ('">\n', '">\n\n'),
    ('">\n', '">\n\n\n'), (">\n", "> \n"), (">\n", ">\r\n"), (">\n<", "><"), ("</", "<\n/"), ("</", "< /"),
    ("</", "<"), (f"</{DSML}", f"<\n/{DSML}"), (f"</{DSML}", f"<</{DSML}"), ("function_calls", "tool_calls"),
    ("\n\n<", "\n<"), ("｜", "|"), ("invoke", "Invoke"), ("parameter", "param"), (' string="', ' type="'),
    (' string="true"', ""), (END_THINK, f"{END_THINK}\n"), (END_THINK, ""), (END_THINK, END_THINK * 2),
)  # fmt: skip
_DAMAGES: tuple[Callable[[_Dice, str], str], ...] = (
    *(_cut, _cut_behind, _delete, _insert, _append, _lines, _misspell, _misspell, _misspell),
)  # fmt: skip
