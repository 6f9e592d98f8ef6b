"""From YAML files and command-line overrides to a checked :class:`rl.config.Recipe`, and back to YAML.

A recipe may build on another one, ``extends: ../base.yaml``. Mappings are merged key by key; everything else, lists
too, is replaced. ``${key.path}`` stands for another value. Relative paths of data and models are relative to the file
they are written in, those of an override to the current directory; among the arguments of an environment, a text that
begins with ``./`` or ``../`` is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rl.config import MISSING, RESUME_AUTO, RESUME_NEVER, Recipe
from rl.errors import RecipeError, did_you_mean
from rl.recipe_checks import violations
from rl.recipe_schema import conform
from rl.recipe_source import Layer, dump, merge, parse, parse_value
from rl.secrets import learn_secrets, redact

_LOOKS_RELATIVE = re.compile(r"\.\.?/")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe with everything it extends, applies ``key.path=value`` overrides, and checks the whole.

    Values of overrides are YAML; an element of a list is reached by its number: ``domains.math.rewards.0.weight=0.5``.

    Raises:
        RecipeError: one sentence, opened by the place (``recipes/math.yaml:12``), about a file that is missing or is
            not YAML, an unknown key, a value of the wrong type or out of range, or a mandatory key without a value.
    """
    layer = _read(Path(path), extended_by=())
    for override in overrides:
        layer = layer.under(_override(override, layer.tree))
    try:
        config = OmegaConf.merge(OmegaConf.structured(Recipe), layer.tree)
        missing = sorted(OmegaConf.missing_keys(config) | set(_left_open(layer.tree)))
        if missing:
            raise RecipeError(_no_value(layer, str(path), missing))
        recipe = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or ""
        raise RecipeError(f"{layer.place(key)}: {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(recipe, Recipe)
    learn_secrets(asdict(recipe))
    for key, sentence in violations(recipe):
        raise RecipeError(f"{layer.place(key)}: {sentence}")
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included; loading it gives an equal recipe. A secret becomes a reference to it."""
    return dump(to_plain(recipe))


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """The same as plain values."""
    return _plain(asdict(recipe))


def _read(path: Path, extended_by: tuple[Path, ...]) -> Layer:
    """The file at ``path`` on top of everything it extends."""
    if path.resolve() in [below.resolve() for below in extended_by]:
        raise RecipeError(f"recipes extend each other in a circle: {' -> '.join(map(str, (*extended_by, path)))}")
    try:
        layer = parse(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {path}") from None
    except IsADirectoryError:
        raise RecipeError(f"{path} is a directory; name a recipe in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    extends = layer.tree.pop("extends", None)
    layer = _with_absolute_paths(conform(layer), path.parent)
    if extends is None:
        return layer
    place = layer.place("extends")
    if not isinstance(extends, str):
        raise RecipeError(f"{place}: extends is {extends!r}; it must be the path of one other recipe")
    below = path.parent / extends
    if not below.is_file():
        raise RecipeError(
            f"{place}: extends {extends}, but there is no file {below}; write its path from the folder of {path}"
        )
    return _read(below, (*extended_by, path)).under(layer)


def _no_value(layer: Layer, path: str, missing: list[str]) -> str:
    """Of a domain that nobody else mentions, most likely another one was meant."""
    first = missing[0]
    sentence = f"no value for {', '.join(missing)}; write it there or add {first}=..."
    section, _, name = first.rpartition(".")[0].rpartition(".")
    others = [other for other in layer.tree.get("domains", {}) if other != name]
    if section != "domains" or not others:
        return f"{path}: {sentence}"
    written = next(iter(layer.tree["domains"][name]), "")
    place = layer.place(f"domains.{name}.{written}")
    return f"{place}: {sentence}; if it is no new domain, {did_you_mean(name, others)}"


def _left_open(tree: Any, key: str = "") -> Iterator[str]:
    """Keys that are written as ``???``; merging them into a default would silently bring the default back."""
    if tree == MISSING:
        yield key
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from _left_open(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _left_open(value, f"{key}[{index}]")


def _override(text: str, tree: dict[str, Any]) -> Layer:
    """The layer that ``key.path=value`` puts on top of ``tree``."""
    source = f"override '{text}'"
    key, equals, value = text.partition("=")
    key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key.strip())
    names = key.replace("[", ".").replace("]", "").split(".")
    if not equals or not all(names):
        raise RecipeError(f"{source}: an override is written key.path=value")
    inside: dict[str, str] = {}
    nested = _nest(names, parse_value(value, source, inside), tree, source)
    places = {key: source} | {f"{key}{'' if name[0] == '[' else '.'}{name}": source for name in inside}
    return _with_absolute_paths(conform(Layer(source, nested, places)), Path.cwd())


def _nest(names: list[str], value: Any, below: Any, source: str) -> Any:
    """``value`` under the path ``names``, with the siblings it has in a list, as lists are replaced whole."""
    if not names:
        return value
    if isinstance(below, list):
        if not names[0].isdigit() or int(names[0]) >= len(below):
            raise RecipeError(f"{source}: '{names[0]}' is not one of the {len(below)} elements, numbered from 0")
        index = int(names[0])
        element = merge(below[index], _nest(names[1:], value, below[index], source))
        return [*below[:index], element, *below[index + 1 :]]
    inside = below.get(names[0]) if isinstance(below, dict) else None
    return {names[0]: _nest(names[1:], value, inside, source)}


def _with_absolute_paths(layer: Layer, folder: Path) -> Layer:
    tree = layer.tree
    for section, key in _path_keys(tree):
        written = section.get(key)
        if isinstance(written, str) and written and written != MISSING and not written.startswith("${"):
            section[key] = str((folder / Path(written).expanduser()).resolve())
    return layer


def _path_keys(tree: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every mapping and key of a recipe whose value is the path of something to read."""
    sources = [(domain, key) for domain in _sections(tree.get("domains")) for key in ("prompts", "eval_prompts")]
    sources += [(supervised, "demonstrations") for supervised in _sections({"": tree.get("supervised")})]
    for section, key in sources:
        yield section, key
        if isinstance(section.get(key), dict):
            yield section[key], "file"
    for domain in _sections(tree.get("domains")):
        for environment in _sections({"": domain.get("environment")}):
            for args in _sections({"": environment.get("args")}):
                # What an environment's arguments mean is its own affair, so a path says that it is one.
                yield from ((args, key) for key, value in args.items() if _LOOKS_RELATIVE.match(str(value)))
    if tree.get("resume") not in (None, RESUME_NEVER, RESUME_AUTO):
        yield tree, "resume"
    yield from ((section, "path") for key in ("model", "judge") for section in _sections({"": tree.get(key)}))


def _sections(parent: Any) -> Iterator[dict[str, Any]]:
    yield from (child for child in (parent or {}).values() if isinstance(child, dict))


def _plain(value: Any) -> Any:
    """Values as YAML has them, without secrets, and with ``${`` kept from being read as a reference to another key."""
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, str):
        return redact(re.sub(r"(\\*)\$\{", r"\1\1\\${", value))
    return value
