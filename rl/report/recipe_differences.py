"""Where the recipes of several runs differ, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from rl.report.json_lines import Row

LONGEST = 400  # characters of one value


def recipe_differences(recipes: Sequence[str]) -> list[Row]:
    """``{"key": "learner.lr", "values": ["1.0e-06", null]}`` for every key whose value is not the same everywhere.

    A null says that a recipe has no such key. ``name`` and ``runs`` always differ and are left out.
    """
    settings = [dict(flat_settings(text)) for text in recipes]
    keys = dict.fromkeys(key for recipe in settings for key in recipe)
    rows = [{"key": key, "values": [recipe.get(key) for recipe in settings]} for key in keys]
    return [row for row in rows if row["key"] not in ("name", "runs") and len(set(row["values"])) > 1]


def flat_settings(recipe: str) -> Iterator[tuple[str, str]]:
    """``("learner.lr", "1.0e-06")`` and so on, of a recipe as YAML."""
    return _flat(_read(recipe))


def _read(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return {"(recipe.yaml)": text}


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys with their values as text; entries of a list are numbered."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _flat(item, f"{prefix}[{number}]")
    elif prefix:
        yield prefix, _shown(value)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
