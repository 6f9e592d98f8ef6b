"""What DeepSeek's own encoding script makes of the random conversations and replies, written down as short digests.

The script is `encoding/encoding_dsv32.py` of deepseek-ai/DeepSeek-V3.2 on Hugging Face. It is not part of this project;
SGLang ships it whole, vLLM without its parser. With a copy of it at hand,

    python -m tests.rollout.official_script encoding_dsv32.py "SGLang 0.5.23"

writes `official_outcomes.txt` again, one outcome a line. An outcome is 10 hexadecimal digits of the SHA-256 of what the
script returns, or ``refused``. Where it returns something that this project refuses on purpose, the reason from
`REASONS` stands behind the digest; it is found from the conversation and the script's result alone.

    python -m tests.rollout.official_script encoding_dsv32.py --show conversation 17

prints one case and the script's result in full.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from model.tokenizer import DSML, END_OF_SENTENCE
from tests.rollout.random_conversations import Conversation, Reply, conversation, reply

RECORDED = Path(__file__).with_name("official_outcomes.txt")
NUM_CONVERSATIONS = NUM_REPLIES = 4000
REFUSED = "refused"
REASONS = {
    "nothing-to-answer": "a conversation must end with what a reply can follow, or with a reply to somebody",
    "unanswered-calls": "the block of results is left open when a call has none",
    "result-first": "a result that stands before every message is taken for one of the last message's calls",
    "unreadable-name": "a name is written that the parser cannot read back",
    "no-text": "a content that is not a string is printed as Python prints it, an absent one as None",
    "says-nothing": "an assistant message without content, thought and calls is an empty reply",
    "misplaced": "tools and calls on a message of another role are passed over in silence",
    "developer-history": "a developer message before the last message that asks is kept only if drop_thinking is off",
    "no-call": "a block of calls without a call is no call",
    "no-end": "a block of calls may end without its closing tag where the end-of-sentence token is missing too",
    "quoted-name": "a name with a quotation mark cannot be written back",
    "half-character": "a JSON parameter holds half of a surrogate pair, which no text can hold",
    "not-json": "a parameter says that it is JSON and is not, or is so only together with the next one",
}
"""What the script lets through and this project refuses, with a sentence, in conversations and in replies."""


def load(path: Path) -> ModuleType:
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location("official_encoding", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def without_empty_lines(text: str) -> str:
    """The text without the empty lines between the fixed words about tools, which SGLang's and vLLM's copies lost.

    DeepSeek's published prompts have them; test_official_encoding.py holds ours to those.
    """
    return re.sub(r"## Tools\n.*?\n<functions>", lambda words: re.sub("\n+", "\n", words[0]), text, flags=re.DOTALL)


def encoded(script: ModuleType, case: Conversation) -> str | None:
    """What the script writes for a conversation; None where it raises.

    A thought has one name in DeepSeek's script and in SGLang's copy, and another in vLLM's.
    """
    messages = [
        {**message, "reasoning": message["reasoning_content"]} if "reasoning_content" in message else dict(message)
        for message in case.messages
    ]
    mode = "thinking" if case.thinking else "chat"
    return _returned(partial(script.encode_messages, messages, mode, drop_thinking=case.drop_thinking))


def parsed(script: ModuleType, case: Reply) -> Mapping[str, Any] | None:
    """The message that the script reads from a reply; None where it raises.

    A reply that lacks its end-of-sentence token is read once more with it: whether a reply ended is what the engine
    says of it here, and its text is read without the token.
    """
    mode = "thinking" if case.thinking else "chat"
    ends = (END_OF_SENTENCE,) if case.ended else ("", END_OF_SENTENCE)
    read = (_returned(partial(script.parse_message_from_completion_text, case.text + end, mode)) for end in ends)
    return next((message for message in read if message is not None), None)


def _returned(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception:  # AssertionError, ValueError, KeyError, IndexError, ...: the script has no errors of its own
        return None


def encoding_outcome(script: ModuleType, case: Conversation) -> str:
    text = encoded(script, case)
    return _line(None if text is None else without_empty_lines(text), encoding_reasons(case))


def parsing_outcome(script: ModuleType, case: Reply) -> str:
    message = parsed(script, case)
    if message is None:
        return REFUSED
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message["tool_calls"]]
    reasons = parsing_reasons(case, calls)
    read = [(name, arguments if reasons else json.loads(arguments)) for name, arguments in calls]
    return _line(spelled_reply(message["reasoning_content"], message["content"], read), reasons)


def spelled_reply(reasoning: str, answer: str, calls: Iterable[tuple[str, Any]]) -> str:
    return json.dumps([reasoning, answer, list(calls)], ensure_ascii=False)


def _line(text: str | None, reasons: Iterable[str]) -> str:
    return REFUSED if text is None else " ".join([digest(text), *reasons])


def encoding_reasons(case: Conversation) -> list[str]:
    """Every one of REASONS that a conversation gives."""
    messages = case.messages
    roles = [message["role"] for message in messages]
    asking = [index for index, role in enumerate(roles) if role in ("user", "developer")]
    calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    names = [name for call in calls for name in (call["name"], *_keys(call["arguments"]))]
    found = {
        "nothing-to-answer": roles[-1] == "system" or (roles[-1] == "assistant" and not asking),
        "unanswered-calls": any(_is_cut_short(messages, index) for index in range(len(messages))),
        "result-first": roles[0] == "tool",
        "unreadable-name": any('"' in name or DSML in name for name in names),
        "no-text": any(not _is_text(message) for message in messages),
        "says-nothing": any(_says_nothing(message) for message in messages),
        "misplaced": any(_is_misplaced(message) for message in messages),
        "developer-history": case.thinking and "developer" in roles[: asking[-1] if asking else 0],
    }
    return [reason for reason, holds in found.items() if holds]


def _keys(arguments: str) -> list[str]:
    try:
        read = json.loads(arguments)
    except ValueError:
        return []
    return list(read) if isinstance(read, dict) else []


def _is_cut_short(messages: list[dict[str, Any]], index: int) -> bool:
    """Whether a message's calls have some results, but not as many as there are calls."""
    num_results = 0
    while index + 1 + num_results < len(messages) and messages[index + 1 + num_results]["role"] == "tool":
        num_results += 1
    return 0 < num_results < len(messages[index].get("tool_calls") or ())


def _is_text(message: Mapping[str, Any]) -> bool:
    optional = (str, type(None))
    content = optional if message["role"] in ("system", "assistant") else str
    return isinstance(message.get("content"), content) and isinstance(message.get("reasoning_content"), optional)


def _says_nothing(message: Mapping[str, Any]) -> bool:
    said = (message.get(field) for field in ("reasoning_content", "tool_calls"))
    return message["role"] == "assistant" and message.get("content") is None and not any(said)


def _is_misplaced(message: Mapping[str, Any]) -> bool:
    offers = message.get("tools") and message["role"] not in ("system", "developer")
    return bool(offers or (message.get("tool_calls") and message["role"] != "assistant"))


def parsing_reasons(case: Reply, calls: list[tuple[str, str]]) -> list[str]:
    """Every one of REASONS that a reply gives of which the script has read these calls, their arguments as text."""
    _, *block = case.text.partition(f"\n\n<{DSML}function_calls")
    arguments = [_pairs(text) for _, text in calls]
    ending = f"/{DSML}parameter"
    num_parameters = block[1].count(ending) - sum(name.count(ending) for name, _ in calls)
    num_read = sum(len(pairs) for pairs in arguments if pairs is not None)
    names = [name for name, _ in calls] + [name for pairs in arguments if pairs for name, _ in pairs]
    found = {
        "no-call": bool(block[0]) and not calls,
        "no-end": bool(block[0]) and f"</{DSML}function_calls>" not in block[1],
        "quoted-name": any('"' in name for name in names),
        "half-character": any(
            re.search("[\ud800-\udfff]", json.dumps(pairs, ensure_ascii=False)) for pairs in arguments
        ),
        "not-json": None in arguments or num_read != num_parameters,
    }
    return [reason for reason, holds in found.items() if holds]


def _pairs(arguments: str) -> list[tuple[str, Any]] | None:
    """The names and values of a JSON object, those given twice as well; None for what is not one."""
    try:
        pairs = json.loads(arguments, object_pairs_hook=_Pairs, parse_constant=_no_number)
    except ValueError:
        return None
    return pairs if isinstance(pairs, _Pairs) else None


class _Pairs(list[tuple[str, Any]]):
    pass


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def inputs_digest(conversations: Iterable[Conversation], replies: Iterable[Reply]) -> str:
    """Says whether the cases are those that were recorded."""
    return digest("\n".join(map(str, (*conversations, *replies))))


def recorded() -> tuple[str, list[str], list[str]]:
    """The digest of the cases, and the outcomes of the conversations and of the replies."""
    lines = [line for line in RECORDED.read_text().splitlines() if not line.startswith("#")]
    return lines[0], lines[1 : 1 + NUM_CONVERSATIONS], lines[1 + NUM_CONVERSATIONS :]


def record(script: ModuleType, source: str) -> None:
    conversations = [conversation(seed) for seed in range(NUM_CONVERSATIONS)]
    replies = [reply(seed) for seed in range(NUM_REPLIES)]
    lines = (
        "# Outcomes of DeepSeek-V3.2's encoding script, written by tests/rollout/official_script.py.",
        f"# The script: {source}. First a digest of the cases, then a line for each conversation and each reply.",
        inputs_digest(conversations, replies),
        *(encoding_outcome(script, case) for case in conversations),
        *(parsing_outcome(script, case) for case in replies),
    )
    RECORDED.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the official script's outcomes, or shows one of them.")
    parser.add_argument("script", type=Path, help="DeepSeek's encoding_dsv32.py, or a copy of it")
    parser.add_argument(
        "source", nargs="?", default="encoding_dsv32.py", help="what the script is a copy of, and which"
    )
    parser.add_argument("--show", nargs=2, metavar=("KIND", "SEED"), help="'conversation' or 'reply', and its number")
    options = parser.parse_args()
    script = load(options.script)
    if not options.show:
        return record(script, options.source)
    kind, seed = options.show[0], int(options.show[1])
    case = conversation(seed) if kind == "conversation" else reply(seed)
    print(case, encoded(script, case) if isinstance(case, Conversation) else parsed(script, case), sep="\n")


if __name__ == "__main__":
    main()
