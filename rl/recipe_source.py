"""YAML that remembers the line of every key, and writes what it would read back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from rl.config import MISSING
from rl.errors import RecipeError

_FLOAT = re.compile(r"^[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")


class _Loader(yaml.SafeLoader):
    """YAML with less surprise: ``1e-6`` is a number, a date is text, and ``{path: ???}`` needs no quotes."""

    def check_key(self) -> bool:
        return not self._at_missing() and super().check_key()

    def check_plain(self) -> bool:
        return self._at_missing() or super().check_plain()

    def scan_plain(self) -> yaml.Token:
        if not self._at_missing():
            return super().scan_plain()
        start = self.get_mark()
        self.forward(len(MISSING))
        return yaml.ScalarToken(MISSING, True, start, self.get_mark())

    def _at_missing(self) -> bool:
        return self.prefix(len(MISSING)) == MISSING and self.peek(len(MISSING)) in "\0 \t\r\n,]}"


class _Dumper(yaml.SafeDumper):
    """Quotes exactly the texts that the loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source, or several on top of each other, set: plain values, and where each key is written."""

    source: str
    tree: dict[str, Any]
    places: Mapping[str, str] = field(default_factory=dict)

    def place(self, key: str) -> str:
        """``file:line`` of ``key`` (``domains.math.rewards[0].use``), or of the nearest section around it."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return self.source

    def under(self, above: Layer) -> Layer:
        """This layer with the other one on top of it."""
        replaced = tuple(f"{key}[" for key in above.places)
        kept = {key: place for key, place in self.places.items() if not key.startswith(replaced)}
        return Layer(above.source, merge(self.tree, above.tree), {**kept, **above.places})


def merge(below: Any, above: Any) -> Any:
    """Mappings key by key; of anything else, lists too, the upper one."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: merge(below[key], value) if key in below else value for key, value in above.items()}}


def parse(text: str, source: str) -> Layer:
    """A YAML mapping as a layer. Raises RecipeError with the line of what is wrong."""
    places: dict[str, str] = {}
    tree = parse_value(text, source, places)
    if tree is not None and not isinstance(tree, dict):
        raise RecipeError(f"{source}: a recipe maps keys to values, but this is {tree!r}")
    return Layer(source, tree or {}, places)


def parse_value(text: str, source: str, places: dict[str, str] | None = None) -> Any:
    """Any YAML value; fills ``places`` with the line of every key."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _locate(node, source, "", {} if places is None else places)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{source}{line}: this is not YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(f"{source}: this is not YAML: {str(error).splitlines()[0]}") from error
    finally:
        loader.dispose()


def dump(tree: dict[str, Any]) -> str:
    """YAML that :func:`parse` reads back as the same tree."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _locate(node: yaml.Node, source: str, key: str, places: dict[str, str]) -> None:
    """Notes the line of every key below ``node``, and refuses one that is written twice."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            places[f"{key}[{index}]"] = f"{source}:{item.start_mark.line + 1}"
            _locate(item, source, f"{key}[{index}]", places)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            child = f"{key}.{name.value}" if key else str(name.value)
            if str(name.value) in seen:
                raise RecipeError(f"{source}:{line}: {child} is already set in line {seen[str(name.value)]}")
            seen[str(name.value)] = line
            places[child] = f"{source}:{line}"
            _locate(value, source, child, places)
