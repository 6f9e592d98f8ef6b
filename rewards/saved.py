"""Saved samples as rewards see them: trajectories of a run, or a few lines written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl.errors import DataError
from rl.records import Record, read_records
from rl.sample import NDArray, Prompt, Sample, Status, ToolCall, ToolResult, Turn


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a JSONL file, such as a run's ``samples/step_3.jsonl``.

    A line needs a ``reply`` and a ``prompt`` (its text) or ``messages``; ``tools``, ``answer``, ``domain``,
    ``thinking`` (by default, whether ``</think>`` occurs), ``index``, ``status``, ``turns``, ``final_state`` and
    ``earlier`` are as in a run. Lines of one prompt are siblings. Where no tokens are saved, every character of the
    reply stands for a sampled one. What a run saved is what its rewards saw, but for log-probabilities, which have five
    digits.

    Raises DataError naming the line.
    """
    found: dict[str, int] = {}
    samples = []
    for record in read_records(path):
        prompt = _prompt(record)
        index = found[prompt.id] = found.get(prompt.id, -1) + 1
        samples.append(_whole(record, prompt, index))
    return samples


def sample_of(prompt: Prompt, reply: str) -> Sample:
    """As of a saved line with no more than a reply."""
    return _sequence({"reply": reply}, prompt)


def siblings(samples: Sequence[Sample]) -> list[list[Sample]]:
    """The samples by prompt, in the order in which prompts first occur."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.prompt.id, []).append(sample)
    return list(groups.values())


def _prompt(record: Record) -> Prompt:
    fields = record.fields
    messages = fields.get("messages")
    name = fields.get("prompt")
    token_ids = None
    if messages:
        said = record.messages(messages)
    elif messages == [] and fields.get("token_ids"):  # it came encoded
        said, token_ids = (), _prompt_tokens(fields)
    elif isinstance(name, str) and name:
        said = ({"role": "user", "content": name},)
    else:
        raise record.error("needs messages, or a text as prompt")
    reply = fields.get("reply")
    if not isinstance(reply, str):
        raise record.error("needs a text as reply")
    return Prompt(
        id=name if isinstance(name, str) else record.place,
        domain=str(fields.get("domain", "saved")),
        messages=said,
        token_ids=token_ids,
        tools=tuple(fields.get("tools") or ()),
        answer=fields.get("answer"),
        thinking=bool(fields.get("thinking", "</think>" in reply)),
    )


def _prompt_tokens(fields: Mapping[str, Any]) -> NDArray:
    """What stands before the first token that the policy chose, in the first sequence."""
    first = (fields.get("earlier") or [fields])[0]
    length = next((place for place, chosen in enumerate(first["sampled"]) if chosen), len(first["sampled"]))
    return np.array(first["token_ids"][:length], dtype=np.int32)


def _whole(record: Record, prompt: Prompt, index: int) -> Sample:
    fields = record.fields
    try:
        index = int(fields.get("index", index))
        earlier = (
            _sequence(one, prompt, index=index, part=part) for part, one in enumerate(fields.get("earlier") or ())
        )
        return _sequence(
            fields,
            prompt,
            index=index,
            status=Status(fields.get("status", Status.FINISHED)),
            turns=tuple(_turn(turn) for turn in fields.get("turns") or ()),
            final_state=fields.get("final_state"),
            earlier=tuple(earlier),
        )
    except DataError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise record.error(f"is no sample ({error})") from error


def _sequence(fields: Mapping[str, Any], prompt: Prompt, **others: Any) -> Sample:
    reply = fields.get("reply", "")
    sampled = np.array(fields.get("sampled") or [0] + [1] * len(reply), dtype=bool)
    token_ids = np.array(fields.get("token_ids") or np.zeros(len(sampled)), dtype=np.int32)
    logprobs = np.array(fields.get("rollout_logprobs") or np.zeros(len(sampled)), dtype=np.float32)
    return Sample(
        prompt=prompt,
        token_ids=token_ids,
        sampled=sampled,
        rollout_logprobs=np.where(sampled, logprobs, 0).astype(np.float32),
        versions=np.array(fields.get("versions") or np.where(sampled, 0, -1), dtype=np.int32),
        reply=reply,
        **others,
    )


def _turn(fields: Mapping[str, Any]) -> Turn:
    return Turn(
        reply=fields["reply"],
        calls=tuple(ToolCall(**call) for call in fields.get("calls") or ()),
        results=tuple(ToolResult(**result) for result in fields.get("results") or ()),
        malformed=fields.get("malformed") or "",
        user=fields.get("user") or "",
    )
