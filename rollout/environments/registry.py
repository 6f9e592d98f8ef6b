"""Environments by the name that recipes use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from rl.config import EnvironmentUse
from rl.errors import RecipeError, UserError, did_you_mean
from rl.plugin import check_arguments, describe, describe_raised, import_callable
from rl.sample import Prompt
from rollout.environments.protocol import Environment, EnvironmentFailed, FunctionEnvironment

BUILT_IN = {
    "code_interpreter": "rollout.environments.code_interpreter:CodeInterpreter",
    "mcp": "rollout.environments.mcp:McpTools",
    "repository": "rollout.environments.repository:Repository",
    "search": "rollout.environments.search:Search",
    "tools": "rollout.environments.database:DatabaseTools",
}
"""The environments that ship with Keel, by the name recipes use."""


def resolve(use: str, args: Mapping[str, Any]) -> Any:
    """The class, or the function, at a name or a dotted path; its arguments are checked but not used.

    Raises RecipeError for what does not import, is not an environment, or does not take the arguments.
    """
    place = f"environment '{use}'"
    if ":" not in use and use not in BUILT_IN:
        raise RecipeError(
            f"{place} is neither built in ({did_you_mean(use, BUILT_IN)}) nor a dotted path such as "
            "my_package.tools:Shop"
        )
    found = _find(use)
    if inspect.isclass(found):
        if not issubclass(found, Environment):
            raise RecipeError(f"{place} is a class that does not derive from rollout.environments.protocol.Environment")
        given = {**args, "sandbox": None} if takes_sandbox(found) else args
        check_arguments(found, given, given=1, place=place)
        try:
            found.check(**args)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise RecipeError(f"{place} does not take these args: {describe(error)}") from error
    elif args:
        raise RecipeError(f"{place} is a function, the tool itself, and takes no args from the recipe")
    return found


def takes_sandbox(environment: Any) -> bool:
    """Whether its constructor asks for the driver's sandbox."""
    return "sandbox" in inspect.signature(environment).parameters


def construct(use: EnvironmentUse, prompt: Prompt, sandbox: Any = None) -> Environment:
    """One episode's environment. Raises EnvironmentFailed when its constructor does."""
    found = _find(use.use)
    if inspect.isfunction(found):
        return FunctionEnvironment(prompt, function=found)
    given = {**use.args, "sandbox": sandbox} if takes_sandbox(found) else use.args
    try:
        return found(prompt, **given)
    except Exception as error:
        raise EnvironmentFailed(f"it could not be made for prompt {prompt.id}: {describe_raised(error)}") from error


def _find(use: str) -> Any:
    return import_callable(BUILT_IN.get(use, use), role="environment")
