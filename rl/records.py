"""Rows of JSONL and Parquet files, each with the place that errors about it name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

_SURROGATE = re.compile("[\\ud800-\\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One row: ``place`` is, for example, ``data/math.jsonl line 17``."""

    place: str
    fields: Mapping[str, Any]

    def error(self, problem: str) -> DataError:
        return DataError(f"{self.place}: {problem}")

    def check_spelling(self, known: Sequence[str]) -> None:
        """Raises for a field one slip away from a known one that is absent. Other fields are ignored."""
        for name in self.fields:
            for absent in known:
                if absent not in self.fields and len(absent) > 3 and _one_slip_apart(name, absent):
                    raise self.error(f"unknown field '{name}'; did you mean '{absent}'?")

    def messages(self, value: Any) -> tuple[dict[str, Any], ...]:
        """Checks a chat: objects with a known role and text. An assistant message may carry tool calls instead."""
        if not isinstance(value, list) or not value:
            raise self.error("messages must be a list of at least one {role, content}")
        return tuple(self._message(number, message) for number, message in enumerate(value))

    def _message(self, number: int, message: Any) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise self.error(f"messages[{number}] must be an object with role and content, not {_kind(message)}")
        present = {key: value for key, value in message.items() if value is not None}
        role = present.get("role")
        if role not in ROLES:
            raise self.error(f"messages[{number}] has role {role!r}; use one of {', '.join(ROLES)}")
        content = present.get("content")
        without_text = role == "assistant" and content is None and present.get("tool_calls")
        if not isinstance(content, str) and not without_text:
            raise self.error(f"messages[{number}] needs a text as content, not {_kind(content)}")
        return present


def read_records(path: str | Path) -> list[Record]:
    """All rows of a ``.jsonl`` or ``.parquet`` file, relative to the current directory.

    Raises DataError for a file that is missing, of another kind, empty or broken, with the line where there is one.
    """
    path = Path(path)
    if not path.is_file():
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        problem = "is a directory; name a file in it" if path.is_dir() else f"does not exist{looked}"
        raise DataError(f"data file {path} {problem}")
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"data file {path} must end in .jsonl or .parquet")
    records = readers[path.suffix](path)
    if not records:
        raise DataError(f"data file {path} holds no rows")
    return records


def _read_jsonl(path: Path) -> list[Record]:
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        place = f"{path} line {number}"
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place}: is not UTF-8 ({error.reason} at byte {error.start})") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{place}: is not JSON ({error.msg} at column {error.colno})") from error
        except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's own limits
            raise DataError(f"{place}: cannot be read ({error})") from error
        if not isinstance(fields, dict):
            raise DataError(f"{place}: must be a JSON object, not {_kind(fields)}")
        if b"\\ud" in line.lower() and _SURROGATE.search(json.dumps(fields, ensure_ascii=False)):
            raise DataError(f"{place}: holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
        records.append(Record(place=place, fields=fields))
    return records


def _read_parquet(path: Path) -> list[Record]:
    # Imported here: it takes half a second, and runs that read JSONL do without it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data file {path} is not readable Parquet: {str(error).splitlines()[0]}") from error
    return [
        Record(place=f"{path} row {number}", fields={key: value for key, value in row.items() if value is not None})
        for number, row in enumerate(rows, start=1)
    ]


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "a boolean"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _one_slip_apart(name: str, known: str) -> bool:
    """Whether the names differ by one letter (put in, left out or mistaken) or by the order of their letters."""
    if abs(len(name) - len(known)) > 1 or name == known:
        return False
    shorter, longer = sorted((name, known), key=len)
    if len(shorter) == len(longer):
        return sorted(name) == sorted(known) or sum(a != b for a, b in zip(name, known, strict=True)) == 1
    return any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
