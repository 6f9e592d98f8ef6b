"""What an environment is: a class whose methods are tools, one instance for each episode.

    class Counter(Environment):
        def __init__(self, prompt: Prompt, *, start: int = 0) -> None:
            self.value = start

        @tool
        def add(self, amount: int) -> str:
            \"\"\"Adds to the counter.

            amount: what to add, negative to subtract
            \"\"\"
            self.value += amount
            return f"the counter is at {self.value}"

        def final_state(self) -> int:
            return self.value

A plain function is an environment too: its only tool. Every method may be a coroutine.
"""

from __future__ import annotations

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Union, get_args, get_origin

from rl.plugin import describe
from rl.sample import Prompt, ToolCall, ToolResult

_MARK = "__keel_tool__"
_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}


class ToolError(Exception):
    """A tool that could not do what it was asked; the policy reads the message as the call's result."""


class EnvironmentFailed(Exception):
    """An environment that is broken, through no fault of the policy: its episode counts as failed."""


class Environment:
    """The world of one episode. Constructed with the prompt and the recipe's ``args``; override what you need."""

    isolated = True
    """Whether a process of its own runs it, which may hang or die without harm. Environments that only wait for other
    processes turn this off."""

    def __init__(self, prompt: Prompt) -> None:
        """Called in the process where it will run; anything that takes time belongs in :meth:`start`."""

    @classmethod
    def check(cls, **args: Any) -> None:
        """Before a run starts: raises RecipeError for arguments of the recipe that cannot be."""

    async def start(self) -> None:
        """Before the first reply."""

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """JSON functions ``{name, description, parameters}``: by default of the methods marked with :func:`tool`."""
        return [describe_tool(method) for method in _marked(self).values()]

    async def call(self, call: ToolCall) -> ToolResult | str:
        """Answers one call. Calls of one reply run at the same time where they are coroutines.

        A :class:`ToolError`, an unknown tool or arguments that do not fit are results that the policy reads. Any other
        exception is one too, under its name.
        """
        method = _marked(self).get(call.name)
        if method is None:
            raise ToolError(f"there is no tool '{call.name}'; the tools are {', '.join(_marked(self)) or 'none'}")
        result = method(**checked_arguments(method, call.arguments))
        return await result if inspect.isawaitable(result) else result

    async def next_user_message(self, answer: str) -> str | None:
        """What the user says to a final answer; None ends the episode, as it does by default."""
        return None

    def final_state(self) -> Any:
        """The state at the end, as JSON values, for the rewards (``sample.final_state``)."""
        return None

    async def close(self) -> None:
        """After the last reply, however the episode ended."""


class FunctionEnvironment(Environment):
    """One function as the only tool."""

    def __init__(self, prompt: Prompt, *, function: Callable[..., Any]) -> None:
        setattr(self, function.__name__, tool(function))


def tool(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a method as a tool. Its type hints become the parameters' schema and its docstring the description; a
    line ``name: text`` of the docstring describes the parameter of that name."""
    setattr(function, _MARK, True)
    return function


def is_tool(value: Any) -> bool:
    """Whether it is a function that :func:`tool` has marked."""
    return bool(getattr(value, _MARK, False))


def describe_tool(function: Callable[..., Any], *, given: int = 0) -> dict[str, Any]:
    """The JSON function that shows a tool to the model, without the `given` first parameters."""
    parameters = _parameters(function, given)
    hints = typing.get_type_hints(function)
    said, about = _read_docstring(inspect.getdoc(function) or "", parameters)
    properties = {}
    for name in parameters:
        schema = _schema(hints.get(name, Any))
        properties[name] = schema | ({"description": about[name]} if name in about else {})
    return {
        "name": function.__name__,
        "description": said,
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": [name for name, parameter in parameters.items() if parameter.default is parameter.empty],
        },
    }


def checked_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], *, given: int = 0) -> dict[str, Any]:
    """The call's arguments, if they fit the function's parameters behind the `given` first ones.

    Raises ToolError, in words for the policy, if they do not.
    """
    parameters = _parameters(function, given)
    hints = typing.get_type_hints(function)
    for name in arguments:
        if name not in parameters:
            raise ToolError(f"{function.__name__} has no parameter '{name}'; it has {', '.join(parameters) or 'none'}")
    for name, parameter in parameters.items():
        if name not in arguments and parameter.default is parameter.empty:
            raise ToolError(f"{function.__name__} needs the parameter '{name}'")
    return {name: _fitted(name, value, hints.get(name, Any)) for name, value in arguments.items()}


def as_result(value: Any) -> ToolResult:
    """What a tool returned as a result: text as it is, anything else as JSON where it can be."""
    if isinstance(value, ToolResult):
        return value
    if isinstance(value, str):
        return ToolResult(text=value)
    try:
        return ToolResult(text=json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError):
        return ToolResult(text=str(value))


async def answer(environment: Environment, call: ToolCall) -> ToolResult:
    """The environment's result for a call, with what it raised turned into a result that says so."""
    try:
        result = as_result(await environment.call(call))
        return replace(result, text=encodable(result.text))
    except ToolError as error:
        return ToolResult(text=encodable(f"error: {error}"), failed=True)
    except EnvironmentFailed:
        raise
    except Exception as error:
        return ToolResult(text=encodable(f"error: {describe(error)}"), failed=True)


def encodable(text: str) -> str:
    r"""The text with lone surrogates, which names of files and JSON may hold, spelled out: ``\ud83d``."""
    return text.encode(errors="backslashreplace").decode()


def _marked(environment: Environment) -> dict[str, Callable[..., Any]]:
    found = {}
    for name in [*vars(type(environment)), *dir(type(environment)), *vars(environment)]:
        if name != "tools" and not name.startswith("_") and name not in found:
            method = getattr(environment, name)
            if is_tool(method):
                found[name] = method
    return found


def _parameters(function: Callable[..., Any], given: int) -> dict[str, inspect.Parameter]:
    parameters = list(inspect.signature(function).parameters.values())[given:]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name: parameter for parameter in parameters if parameter.kind in named}


def _read_docstring(text: str, parameters: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """The description, and what is said about each parameter."""
    kept, about = [], {}
    for line in text.splitlines():
        name, colon, words = line.strip().partition(": ")
        if colon and name in parameters:
            about[name] = words.strip()
        else:
            kept.append(line)
    return "\n".join(kept).strip(), about


def _schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint: scalars, lists, dicts, literals and optional ones; {} for everything else."""
    options = _options(hint)
    if options is not None:
        return _schema(options[0]) if len(options) == 1 else {"anyOf": [_schema(option) for option in options]}
    origin, inner = get_origin(hint) or hint, get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if hint in _SCALARS:
        return {"type": _SCALARS[hint]}
    if origin in (list, Sequence, tuple):
        return {"type": "array"} | ({"items": _schema(inner[0])} if inner else {})
    if origin in (dict, Mapping):
        return {"type": "object"} | ({"additionalProperties": _schema(inner[1])} if len(inner) == 2 else {})
    return {}


def _options(hint: Any) -> list[Any] | None:
    """The members of a union without None; None for what is no union."""
    if get_origin(hint) not in (Union, types.UnionType):
        return None
    return [option for option in get_args(hint) if option is not type(None)]


def _fitted(name: str, value: Any, hint: Any) -> Any:
    """The value, a whole float as an int where that is asked for; raises ToolError for another kind."""
    options = _options(hint)
    if options is not None:
        if value is None:
            return value
        return _fitted(name, value, options[0]) if len(options) == 1 else value
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if get_origin(hint) is typing.Literal and value not in get_args(hint):
        raise ToolError(f"'{name}' must be one of {', '.join(map(repr, get_args(hint)))}, not {value!r}")
    kind = _schema(hint).get("type")
    kinds = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}
    wrong_bool = isinstance(value, bool) and kind in ("integer", "number")
    if kind is not None and (wrong_bool or not isinstance(value, kinds[kind])):
        raise ToolError(f"'{name}' must be of type {kind}, not {json.dumps(value, ensure_ascii=False)[:60]}")
    return value
