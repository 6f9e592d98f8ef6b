"""Saved samples as rewards see them: trajectories of a run, or a few lines written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rl.errors import DataError
from rl.records import Record, read_records
from rl.sample import Prompt, Sample, Status, ToolCall, ToolResult, Turn


def read_samples(path: str | Path) -> list[Sample]:
    """The samples of a JSONL file, such as a run's ``samples/step_3.jsonl``.

    A line needs a ``reply`` and a ``prompt`` (its text) or ``messages``; ``answer``, ``domain``, ``thinking`` (by
    default, whether ``</think>`` occurs), ``status``, ``turns`` and ``final_state`` are as in a run. Lines of one
    prompt are siblings. Where no tokens are saved, every character of the reply stands for a sampled one.

    Raises DataError naming the line.
    """
    found: dict[str, int] = {}
    samples = []
    for record in read_records(path):
        prompt = _prompt(record)
        index = found[prompt.id] = found.get(prompt.id, -1) + 1
        samples.append(_sample(record, prompt, index))
    return samples


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
    if messages:
        said = record.messages(messages)
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
        answer=fields.get("answer"),
        thinking=bool(fields.get("thinking", "</think>" in reply)),
    )


def _sample(record: Record, prompt: Prompt, index: int) -> Sample:
    fields = record.fields
    reply = fields["reply"]
    sampled = np.array(fields.get("sampled") or [0] + [1] * len(reply), dtype=bool)
    token_ids = np.array(fields.get("token_ids") or np.zeros(len(sampled)), dtype=np.int32)
    logprobs = np.array(fields.get("rollout_logprobs") or np.zeros(len(sampled)), dtype=np.float32)
    try:
        return Sample(
            prompt=prompt,
            index=index,
            token_ids=token_ids,
            sampled=sampled,
            rollout_logprobs=np.where(sampled, logprobs, 0).astype(np.float32),
            versions=np.array(fields.get("versions") or np.where(sampled, 0, -1), dtype=np.int32),
            status=Status(fields.get("status", Status.FINISHED)),
            reply=reply,
            turns=tuple(_turn(turn) for turn in fields.get("turns") or ()),
            final_state=fields.get("final_state"),
        )
    except DataError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise record.error(f"is no sample ({error})") from error


def _turn(fields: Mapping[str, Any]) -> Turn:
    return Turn(
        reply=fields["reply"],
        calls=tuple(ToolCall(**call) for call in fields.get("calls") or ()),
        results=tuple(ToolResult(**result) for result in fields.get("results") or ()),
        malformed=fields.get("malformed") or "",
        user=fields.get("user") or "",
    )
