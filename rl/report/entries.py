"""Trajectories as the page reads them: an entry holds a whole one, a summary what lists and filters need of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from rl.report.json_lines import Row

NUMBERS = ("rollout_logprobs", "log_ratios")  # streams of one number a token
COUNTS = ("kept_sizes", "versions")  # streams of one whole number a token
FLAGS = ("sampled", "routed")  # streams of 0 and 1
DIGITS = 3
SNIPPET = 140  # characters of a summary
EVALUATION = "evaluation"
"""Flag of the samples of step 0, which nobody learned from: they have neither advantage nor log-ratios."""


def entry_of(row: Row, max_tokens: int, max_characters: int) -> dict[str, Any] | None:
    """A record of ``samples/step_N.jsonl`` (``rl.trajectory``) as the page reads it; None when it is not one.

    Flags become strings of 0 and 1, numbers are rounded, and what is past a limit is cut: of each sequence, tokens,
    which ``cut`` counts, and of each text, characters, which the text says.
    """
    earlier = row.get("earlier") or []
    sequences = [_sequence(one, max_tokens) for one in (*earlier, row) if isinstance(one, dict)]
    if not isinstance(earlier, list) or len(sequences) != len(earlier) + 1:
        return None
    whole = [one for one in sequences if one is not None]
    if len(whole) != len(sequences):
        return None
    return {
        "step": row["step"],
        "id": str(row.get("id", "")),
        "prompt": str(row.get("prompt", "")),
        "domain": str(row.get("domain", "")),
        "status": str(row.get("status", "")),
        "reward": finite(row.get("reward"), 6),
        "advantage": finite(row.get("advantage"), 6),
        "parts": {str(name): finite(value, 6) for name, value in _mapping(row.get("parts")).items()},
        "comments": {str(name): _text(value, max_characters) for name, value in _mapping(row.get("comments")).items()},
        "messages": [_message(one, max_characters) for one in _list(row.get("messages")) if isinstance(one, dict)],
        "answer": _answer(row.get("answer"), max_characters),
        "turns": [_turn(turn, max_characters) for turn in _list(row.get("turns")) if isinstance(turn, dict)],
        "state": None if row.get("final_state") is None else _text(row["final_state"], max_characters),
        "sequences": whole,
    }


def summary_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What the list shows of an entry, and what it is filtered and ordered by."""
    sequences = entry["sequences"]
    ratios = [abs(ratio) for one in sequences for ratio in one["log_ratios"] or () if ratio is not None]
    said = sequences[-1]
    reply = "".join(text for text, flag in zip(said["tokens"], said["sampled"], strict=True) if flag == "1")
    names = ("step", "id", "prompt", "domain", "status", "reward", "advantage")
    return {name: entry[name] for name in names} | {
        "flags": list(_flags(entry)),
        "tokens": sum(one["sampled"].count("1") for one in sequences),
        "turns": len(entry["turns"]),
        "mismatch": max(ratios, default=None),
        "snippet": " ".join(reply[: 4 * SNIPPET].split())[:SNIPPET],
    }


def finite(value: Any, digits: int) -> float | int | None:
    """The number with so many significant digits; None for what is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def _flags(entry: Mapping[str, Any]) -> list[str]:
    sequences, turns = entry["sequences"], entry["turns"]
    found = {
        EVALUATION: entry["step"] == 0,
        "masked": any(one["masked"] for one in sequences),
        "live routes": any("0" in (one["routed"] or "")[:-1] for one in sequences),  # the last token is never fed
        "several versions": len({v for one in sequences for v in one["versions"] or () if v is not None and v >= 0})
        > 1,
        "calls tools": any(turn["calls"] for turn in turns),
        "tool errors": any(result["failed"] for turn in turns for result in turn["results"]),
        "malformed": any(turn["malformed"] for turn in turns),
        "commented": bool(entry["comments"]),
        "restarted context": len(sequences) > 1,
    }
    return [name for name, holds in found.items() if holds]


def _sequence(row: Mapping[str, Any], max_tokens: int) -> dict[str, Any] | None:
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not all(isinstance(text, str) for text in tokens):
        return None
    kept = min(len(tokens), max_tokens)
    streams: dict[str, Any] = {"tokens": tokens[:kept], "masked": bool(row.get("masked")), "cut": len(tokens) - kept}
    for name in (*NUMBERS, *COUNTS, *FLAGS):
        stream = row.get(name)
        if stream is None:
            streams[name] = "1" * kept if name == "sampled" else None
            continue
        if not isinstance(stream, list) or len(stream) != len(tokens):
            return None
        streams[name] = _compact(name, stream[:kept])
    return streams


def _compact(name: str, stream: list[Any]) -> Any:
    if name in FLAGS:
        return "".join("1" if flag else "0" for flag in stream)
    if name in COUNTS:
        return [value if type(value) is int else None for value in stream]
    return [_short(value) for value in stream]


def _short(value: Any) -> float | int | None:
    if type(value) is not float:
        return value if type(value) is int else None
    return float(f"{value:.{DIGITS}g}") if value and math.isfinite(value) else 0 if value == 0 else None


def _turn(turn: Mapping[str, Any], limit: int) -> dict[str, Any]:
    calls = [call for call in _list(turn.get("calls")) if isinstance(call, dict)]
    results = [result for result in _list(turn.get("results")) if isinstance(result, dict)]
    return {
        "reply": _text(turn.get("reply", ""), limit),
        "calls": [{"name": _text(call.get("name", ""), 200), "arguments": _arguments(call, limit)} for call in calls],
        "results": [{"text": _text(one.get("text", ""), limit), "failed": bool(one.get("failed"))} for one in results],
        "malformed": _text(turn.get("malformed") or "", limit),
        "user": _text(turn.get("user") or "", limit),
    }


def _arguments(call: Mapping[str, Any], limit: int) -> dict[str, str]:
    return {str(name): _text(value, limit) for name, value in _mapping(call.get("arguments")).items()}


def _message(message: Mapping[str, Any], limit: int) -> dict[str, str]:
    return {"role": _text(message.get("role", ""), 40), "content": _text(message.get("content", ""), limit)}


def _answer(answer: Any, limit: int) -> str | None:
    """The answer alone, where a reward needs a whole entry around it (reasoning_gym)."""
    if isinstance(answer, dict):
        answer = answer.get("answer", answer)
    return None if answer is None else _text(answer, limit)


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text) - limit:,} more characters)"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
