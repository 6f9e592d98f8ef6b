"""Groups as JSON and arrays, for a checkpoint. Prompts are not in it: they are read from their source again.

Texts that only people read are written without secrets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np

from rl.errors import DataError
from rl.sample import Group, Kept, NDArray, Prompt, Sample, Scored, Status, ToolCall, ToolResult, Turn
from rl.secrets import redact_values
from rl.selections import Selections

Arrays = dict[str, NDArray]
_NESTED = ("prompt", "turns", "earlier", "status", "selections", "kept")
_PLAIN = [field.name for field in fields(Sample) if field.name not in _NESTED]


def group_record(group: Group, place: str, arrays: Arrays) -> dict[str, Any]:
    """What JSON can say of a group; its arrays go into ``arrays``, under names that begin with ``place``."""
    scored = [
        {
            "sample": _sample_record(one.sample, f"{place}.{number}", arrays),
            "reward": one.reward,
            "parts": dict(one.parts),
            "comments": redact_values(one.comments),
        }
        for number, one in enumerate(group.scored)
    ]
    return {"prompt": group.prompt.id, "failed": group.failed, "scored": scored}


def group_of(record: Mapping[str, Any], arrays: Mapping[str, NDArray], prompts: Mapping[str, Prompt]) -> Group:
    """The group of a record. Raises DataError when its prompt is not among ``prompts``, which are by id."""
    prompt = prompt_of(record["prompt"], prompts)
    scored = tuple(
        Scored(
            sample=_sample_of(one["sample"], arrays, prompt),
            reward=one["reward"],
            parts=one["parts"],
            comments=one["comments"],
        )
        for one in record["scored"]
    )
    return Group(prompt=prompt, scored=scored, failed=record["failed"])


def prompt_of(name: str, prompts: Mapping[str, Prompt]) -> Prompt:
    """Raises DataError when there is none of that name."""
    if name not in prompts:
        raise DataError(f"the checkpoint has prompt {name} under way, which its source no longer holds")
    return prompts[name]


def _sample_record(sample: Sample, place: str, arrays: Arrays) -> dict[str, Any]:
    turns = redact_values([asdict(turn) for turn in sample.turns])
    record: dict[str, Any] = {"status": str(sample.status), "turns": turns}
    for name in _PLAIN:
        value = getattr(sample, name)
        if isinstance(value, np.ndarray):
            arrays[f"{place}.{name}"] = value
            value = {"array": f"{place}.{name}"}
        record[name] = redact_values(plain(value)) if name in ("reply", "final_state") else value
    if sample.kept is not None:
        record["kept"] = f"{place}.kept"
        arrays |= {f"{place}.kept.ids": sample.kept.ids, f"{place}.kept.offsets": sample.kept.offsets}
    if (selections := sample.selections) is not None:
        record["selections"] = {"place": f"{place}.selections", "top_k": selections.top_k}
        arrays |= {
            f"{place}.selections.recorded": selections.recorded,
            f"{place}.selections.rows": selections.rows,
        }
    record["earlier"] = [_sample_record(one, f"{place}.{number}", arrays) for number, one in enumerate(sample.earlier)]
    return record


def _sample_of(record: Mapping[str, Any], arrays: Mapping[str, NDArray], prompt: Prompt) -> Sample:
    values: dict[str, Any] = {name: record[name] for name in _PLAIN}
    values |= {
        name: arrays[value["array"]]
        for name, value in values.items()
        if name != "final_state" and isinstance(value, dict)
    }
    if kept := record.get("kept"):
        values["kept"] = Kept(ids=arrays[f"{kept}.ids"], offsets=arrays[f"{kept}.offsets"])
    if selections := record.get("selections"):
        recorded, rows = (arrays[f"{selections['place']}.{name}"] for name in ("recorded", "rows"))
        values["selections"] = Selections(top_k=selections["top_k"], recorded=recorded, rows=rows)
    return Sample(
        prompt=prompt,
        status=Status(record["status"]),
        turns=tuple(_turn_of(turn) for turn in record["turns"]),
        earlier=tuple(_sample_of(one, arrays, prompt) for one in record["earlier"]),
        **values,
    )


def _turn_of(record: Mapping[str, Any]) -> Turn:
    calls = tuple(ToolCall(**call) for call in record["calls"])
    results = tuple(ToolResult(**result) for result in record["results"])
    return Turn(**{**record, "calls": calls, "results": results})


def plain(value: Any) -> Any:
    """What JSON can hold of an environment's final state; a scored sample's is only read by people."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [plain(item) for item in value]
    return str(value)
