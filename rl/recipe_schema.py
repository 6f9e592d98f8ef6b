"""Whether a tree of plain values has the keys and types of the recipe's dataclasses."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from rl.config import MISSING, Recipe
from rl.errors import RecipeError, did_you_mean
from rl.recipe_source import Layer

_SCALARS = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str, int), "text"),
}


def conform(layer: Layer) -> Layer:
    """The layer, with sections that are left empty removed.

    Raises:
        RecipeError: an unknown key or a value of the wrong type. Interpolations (``${...}``) are let through.
    """
    return Layer(layer.source, _section(layer.tree, Recipe, "", layer), layer.places)


def _section(tree: Any, section: type, key: str, layer: Layer) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise _wrong(layer, key, tree, f"a section with keys such as {', '.join(list(_hints(section))[:3])}")
    hints, conformed = _hints(section), {}
    for name, value in tree.items():
        child = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise RecipeError(f"{layer.place(child)}: unknown key '{child}'; {_nearest(str(name), section)}")
        hint, optional = _without_none(hints[name])
        if value is None and not optional and (is_dataclass(hint) or get_origin(hint) in (dict, list)):
            continue  # a section whose lines are all commented out sets nothing
        conformed[name] = _value(value, hints[name], child, layer)
    return conformed


def _value(value: Any, hint: Any, key: str, layer: Layer) -> Any:
    hint, optional = _without_none(hint)
    if hint is Any or (optional and value is None) or (isinstance(value, str) and (value == MISSING or "${" in value)):
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return _section({} if value is None else value, hint, key, layer)
    if get_origin(hint) is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) and name for name in value):
            raise _wrong(layer, key, value, "a mapping from names to values")
        return {name: _value(child, get_args(hint)[1], f"{key}.{name}", layer) for name, child in value.items()}
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise _wrong(layer, key, value, "a list")
        return [_value(item, get_args(hint)[0], f"{key}[{index}]", layer) for index, item in enumerate(value)]
    if issubclass(hint, Enum):
        names = [str(member.value) for member in hint]
        if value not in names:
            raise _wrong(layer, key, value, f"one of {', '.join(names)}")
        return value
    accepted, words = _SCALARS[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        raise _wrong(layer, key, value, words)
    return value


def _wrong(layer: Layer, key: str, value: Any, expected: str) -> RecipeError:
    shown = "empty" if value is None else repr(value)
    return RecipeError(f"{layer.place(key)}: {key} is {shown}; it must be {expected}")


def _nearest(name: str, section: type) -> str:
    """A hint at the key that was meant: one of the same name that belongs elsewhere, or one of a similar name here."""
    elsewhere = [key for key in _all_keys(Recipe, "") if key.rpartition(".")[2] == name]
    return f"did you mean '{elsewhere[0]}'?" if elsewhere else did_you_mean(name, _hints(section))


def _all_keys(section: type, key: str) -> Iterator[str]:
    for name, hint in _hints(section).items():
        child = f"{key}.{name}" if key else name
        yield child
        hint, _ = _without_none(hint)
        if get_origin(hint) in (dict, list):
            hint = get_args(hint)[-1]
            child = f"{child}.<name>" if get_origin(hint) is dict else child
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _all_keys(hint, child)


@cache
def _hints(section: type) -> dict[str, Any]:
    resolved = get_type_hints(section)
    return {field.name: resolved[field.name] for field in fields(section)}


def _without_none(hint: Any) -> tuple[Any, bool]:
    """``X`` and whether None is allowed, of ``X`` or ``Optional[X]``."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = [option for option in get_args(hint) if option is not type(None)]
        return inner, True
    return hint, hint is Any
