"""Demonstrations for the cold start: prompts with the reply the policy should learn to give.

A source (``supervised.demonstrations``) is a JSONL or Parquet file of ``{messages: [...], tools?}`` rows that end in an
assistant message with ``content`` and, for a thinking model, ``reasoning_content`` (or ``reasoning``, as some call it);
or a function that writes the reply,

    demonstrations: {function: my_package.teach:chain_sum, size: 20000, args: {...}}

    def chain_sum(prompt: Prompt, rng: np.random.Generator, **args) -> dict:
        return {"reasoning_content": "17 + 5 = 22", "content": "22"}

called over the training prompts, never over those held out for evaluation.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rl.errors import DataError, RecipeError, did_you_mean
from rl.plugin import check_arguments, describe_raised, import_callable
from rl.prompts import question
from rl.records import read_records
from rl.sample import Prompt

PLACE = "supervised.demonstrations"
_KEYS = ("function", "size", "args")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt and the assistant message ``{role, content, reasoning_content}`` that answers it."""

    prompt: Prompt
    reply: Mapping[str, Any]

    @property
    def messages(self) -> tuple[Mapping[str, Any], ...]:
        """The whole conversation."""
        return (*self.prompt.messages, self.reply)


def load_demonstrations(
    source: Any, training: Sequence[Prompt], *, seed: int, held_out: Sequence[Prompt] = ()
) -> list[Demonstration]:
    """Demonstrations from ``source``; ``training`` are the prompts a function is called with.

    A row of a file that asks one of the ``held_out`` evaluation questions is left out. A function is called ``size``
    times (default: once a prompt) over the prompts in a shuffled order, epoch after epoch, with a generator that
    depends on ``seed`` and the call's number alone. Raises RecipeError or DataError.
    """
    if isinstance(source, str):
        return _from_file(source, held_out)
    if not isinstance(source, Mapping) or "function" not in source:
        raise RecipeError(f"{PLACE} must be a file or {{function: package.module:name}}, not {source!r}")
    for key in source:
        if key not in _KEYS:
            raise RecipeError(f"{PLACE} has no key '{key}'; {did_you_mean(str(key), _KEYS)}")
    if not training:
        raise RecipeError(f"{PLACE}: there are no training prompts to call '{source['function']}' with")
    path, args = source["function"], source.get("args", {})
    function = import_callable(path, role="demonstrations")
    check_arguments(function, args, given=2, place=f"demonstrations '{path}'")
    size = source.get("size", len(training))
    if not isinstance(size, int) or size < 1:
        raise RecipeError(f"{PLACE}.size must be a whole number from 1 on, not {size!r}")
    order = _shuffled(len(training), size, seed)
    return [_from_function(path, function, args, training[place], number, seed) for number, place in enumerate(order)]


def fingerprint(demonstrations: Sequence[Demonstration]) -> str:
    """A checksum of what they say, in their order; ids do not count."""
    digest = hashlib.sha256()
    for one in demonstrations:
        said = [one.messages, one.prompt.tools, one.prompt.thinking]
        digest.update(json.dumps(said, sort_keys=True, default=str).encode() + b"\0")
    return digest.hexdigest()


def _from_file(path: str, held_out: Sequence[Prompt]) -> list[Demonstration]:
    asked = {question(prompt) for prompt in held_out}
    demonstrations = []
    for number, record in enumerate(read_records(path)):
        record.check_spelling(("messages", "tools"))
        if "messages" not in record.fields:
            raise record.error("has no messages")
        messages = record.messages(record.fields["messages"])
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise record.error("messages must end in an assistant message that answers the others")
        prompt = Prompt(
            id=f"demonstration/{number}",
            domain="demonstration",
            messages=messages[:-1],
            tools=tuple(record.fields.get("tools", ())),
            thinking=bool(_reasoning(messages[-1])),
        )
        if question(prompt) not in asked:
            demonstrations.append(Demonstration(prompt=prompt, reply=_reply(messages[-1], prompt, record.place)))
    if not demonstrations:
        raise DataError(f"data file {path}: every demonstration asks a question that is held out for evaluation")
    return demonstrations


def _from_function(
    path: str, function: Callable[..., Any], args: Mapping[str, Any], prompt: Prompt, number: int, seed: int
) -> Demonstration:
    place = f"demonstrations '{path}' on prompt {prompt.id}"
    try:
        written = function(prompt, np.random.default_rng([seed, _CALLS, number]), **args)
    except Exception as error:
        raise DataError(f"{place} raised {describe_raised(error)}") from error
    if not isinstance(written, Mapping):
        raise DataError(f"{place} returned {type(written).__name__}, not a message {{reasoning_content, content}}")
    return Demonstration(prompt=prompt, reply=_reply(written, prompt, place))


def _reply(message: Mapping[str, Any], prompt: Prompt, place: str) -> dict[str, Any]:
    """Checks what the conversation's encoding needs: text, and reasoning exactly where the policy thinks."""
    content, reasoning = message.get("content") or "", _reasoning(message)
    if not isinstance(content, str) or not isinstance(reasoning, str):
        raise DataError(f"{place}: content and reasoning of the assistant message must be texts")
    if not content and not message.get("tool_calls"):
        raise DataError(f"{place}: the assistant message has no content")
    if prompt.thinking and not reasoning:
        raise DataError(f"{place}: the policy thinks in this domain, but the assistant message has no reasoning")
    if not prompt.thinking and reasoning:
        raise DataError(f"{place}: the policy does not think in this domain, but the assistant message has reasoning")
    others = {key: value for key, value in message.items() if key not in ("reasoning", "reasoning_content")}
    thought = {"reasoning_content": reasoning} if reasoning else {}
    return {**others, **thought, "role": "assistant", "content": content}


def _reasoning(message: Mapping[str, Any]) -> Any:
    return message.get("reasoning_content") or message.get("reasoning") or ""


def _shuffled(num_prompts: int, size: int, seed: int) -> list[int]:
    epochs = -(-size // num_prompts)
    orders = [np.random.default_rng([seed, _EPOCHS, epoch]).permutation(num_prompts) for epoch in range(epochs)]
    return np.concatenate(orders)[:size].tolist()


_CALLS, _EPOCHS = 0xDE40, 0xDE41  # separate these uses of the run's seed from each other and from others
