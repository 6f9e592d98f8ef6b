"""What a run must not write down, and how it is kept out of every file and off the terminal.

A secret is the value of an environment variable whose name says so (``JUDGE_API_KEY``, ``HF_TOKEN``), what a recipe
holds under such a name (an argument ``password``, a header ``Authorization``), and the password inside an address.
:func:`learn_secrets` notes them when a recipe is loaded; what is written passes through :func:`redact`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

MASK = "***"
SHORTEST = 8
"""Characters. Anything shorter would be found in innocent text."""

_NAME = re.compile(
    "(^|[^a-z])((api|access|auth|refresh|session|bot|client|private)?_?(key|token|secret)|passw(or)?d|passphrase"
    "|credentials?|auth|authorization|cookie|pat|dsn)([^a-z]|$)"
    "|password$|_pwd$|(^|[^a-z])(?<!to_)pass$",
    re.IGNORECASE,
)
_HUMP = re.compile("(?<=[a-z0-9])(?=[A-Z])")
_NAME_OF_A_PLACE = re.compile("_(path|file|dir|sock|mode)$", re.IGNORECASE)
_DRAWN = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])\S{12,}$")
"""How a key or a token looks, whose name alone (``key: question``) says too little."""
_ALWAYS = re.compile("passw|pass$|secret|credential", re.IGNORECASE)

_known: dict[str, str] = {}
"""What must not be written, and what is written in its place."""


def is_secret_name(name: str) -> bool:
    """Whether a variable or an argument of this name holds a secret."""
    words = _HUMP.sub("_", name)  # of accessToken
    return _NAME.search(words) is not None and _NAME_OF_A_PLACE.search(words) is None


def learn_secrets(recipe: Mapping[str, Any]) -> None:
    """Notes the secrets of this process's environment and of a recipe as a tree of plain values."""
    for name, value in os.environ.items():
        if is_secret_name(name):
            _note(value, f"${{oc.env:{name}}}")
        for secret in _in_address(value):
            _note(secret, MASK)
    for secret in _in_recipe(recipe):
        _note(secret, MASK)


def redact(text: str) -> str:
    """``text`` without the secrets that are known; one of the environment becomes a recipe's reference to it."""
    for secret in sorted(_known, key=len, reverse=True):  # one may be part of another
        if secret in text:
            text = re.sub(_pattern(secret), lambda _, secret=secret: _known[secret], text)
    return text


def redact_values(tree: Any) -> Any:
    """The same in every text of a tree of plain values, in those of its keys too."""
    if isinstance(tree, str):
        return redact(tree)
    if isinstance(tree, Mapping):
        return {redact_values(key): redact_values(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [redact_values(child) for child in tree]
    return tree


def redact_pieces(pieces: Sequence[str]) -> list[str]:
    """The same in a text that is cut into pieces: the one in which a secret begins says what stands for it."""
    text = "".join(pieces)
    characters: list[str] = list(text)
    for secret in sorted(_known, key=len, reverse=True):
        for found in re.finditer(_pattern(secret), text) if secret in text else ():
            characters[found.start()] = _known[secret]
            characters[found.start() + 1 : found.end()] = [""] * (len(secret) - 1)
            text = text[: found.start()] + "\0" * len(secret) + text[found.end() :]
    rest = iter(characters)
    return ["".join(islice(rest, len(piece))) for piece in pieces]


def redact_tracebacks() -> None:
    """From now on, the traceback of an exception that ends this process shows no secret."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    sys.excepthook = show


def _pattern(secret: str) -> str:
    """A password of digits alone is not looked for within a longer number."""
    return rf"(?<![\d.]){secret}(?!\d)" if secret.isdecimal() else re.escape(secret)


def _note(secret: str, instead: str) -> None:
    if len(secret) < SHORTEST:
        return
    as_json = (json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1])
    for spelling in (secret, *as_json, secret.replace("${", "\\${")):  # the last one in a recipe
        _known.setdefault(spelling, instead)


def _in_recipe(tree: Any, name: str = "") -> Iterator[str]:
    """``name`` is the key that holds ``tree``."""
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _in_recipe(child, str(key))
    elif isinstance(tree, list | tuple):
        for before, child in zip(["", *tree], tree, strict=False):
            # A command's `--api-key`, with the key behind it.
            option = isinstance(before, str) and before.startswith("-")
            yield from _in_recipe(child, before.lstrip("-").replace("-", "_") if option else name)
    elif isinstance(tree, str) and tree not in os.environ:  # `judge.api_key` names a variable
        yield from _in_address(tree)
        option, equals, value = tree.partition("=")
        if option.startswith("-") and equals:
            name, tree = option.lstrip("-").replace("-", "_"), value
        if is_secret_name(name):
            rest = tree.rpartition(" ")[2]  # behind "Bearer"
            if _ALWAYS.search(name) or _DRAWN.match(rest):
                yield from (tree, rest)


def _in_address(text: str) -> Iterator[str]:
    """The password of an address, and what its query passes under a secret's name."""
    if "://" not in text:
        return
    try:
        parts = urlsplit(text)
    except ValueError:
        return
    if parts.password:
        yield from (parts.password, unquote(parts.password))
    for pair in parts.query.split("&"):
        name, _, written = pair.partition("=")
        if is_secret_name(name):
            yield from (written, unquote(written))
