"""Functions that users name by dotted path, ``package.module:function``, and the arguments recipes give them."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rl.errors import RecipeError, did_you_mean

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


def import_callable(path: str, *, role: str) -> Callable[..., Any]:
    """The function (or class) at ``package.module:name``, importable from the current directory.

    ``role`` ("reward", "demonstrations") opens the sentence of the RecipeError when there is none.
    """
    module_name, _, name = path.partition(":")
    if not module_name or not name or "/" in module_name or module_name.endswith(".py"):
        raise RecipeError(f"{role} '{path}' is not a dotted path; write it as {as_dotted(path)}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        where = f" (looked in {os.getcwd()})" if isinstance(error, ModuleNotFoundError) else ""
        raise RecipeError(f"{role} '{path}' cannot be imported: {describe_raised(error)}{where}") from error
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RecipeError(f"{role} '{path}': {module_name} has no '{name}'; {did_you_mean(name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise RecipeError(f"{role} '{path}' is a {type(function).__name__}, not a function")
    return function


def as_dotted(path: str, *, example: str = "my_package.my_module:my_function") -> str:
    """What was probably meant by ``my_rewards.brevity`` or ``my_rewards.py:brevity``; an example where that is open."""
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    module = module.removesuffix(".py").replace("/", ".").strip(".")
    meant = all(part.isidentifier() for part in (*module.split("."), name))
    return f"{module}:{name}" if meant else example


def check_arguments(function: Callable[..., Any], args: Mapping[str, Any], *, given: int, place: str) -> None:
    """Raises a RecipeError, opened by ``place``, unless ``function(<given values>, **args)`` is a possible call."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables written in C have no signature; the call itself will tell
        return
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    takes_any = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    if len(positional) < given and not takes_any:
        raise RecipeError(f"{place} takes {len(positional)} positional arguments, but is called with {given}")
    filled = {parameter.name for parameter in positional[:given]}
    rest = [parameter for parameter in parameters if parameter.name not in filled]
    accepted = {parameter.name for parameter in rest if parameter.kind in _NAMED}
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in rest):
        for name in args:
            if name not in accepted:
                known = did_you_mean(name, accepted) if accepted else "it takes none"
                raise RecipeError(f"{place} does not take the argument '{name}'; {known}")
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p.name for p in rest if p.default is p.empty and p.kind not in variadic]
    missing = [name for name in required if name not in args]
    if missing:
        raise RecipeError(f"{place} needs the argument{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}")


def describe(error: BaseException) -> str:
    """An exception as part of a sentence: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def describe_raised(error: BaseException) -> str:
    """As :func:`describe`, with the line that raised it: ``KeyError: 'year' (my_rewards.py:12)``.

    Of code that was called from a user's function into a library, the line is the user's.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    places = [frame for frame in frames if not _is_library(frame.filename)] or frames
    if not places or isinstance(error, SyntaxError) or places[-1].filename == __file__:
        return describe(error)
    return f"{describe(error)} ({Path(places[-1].filename).name}:{places[-1].lineno})"


def _is_library(filename: str) -> bool:
    return filename.startswith((sys.prefix + os.sep, os.path.dirname(os.__file__) + os.sep))
