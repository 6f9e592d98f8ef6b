"""Procedural tasks and their scorers, from the reasoning_gym library.

The library is imported at the first use: it takes more than a second, and most runs that read files do without it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import Any

from rl.errors import RecipeError, did_you_mean
from rl.plugin import describe


@cache
def library() -> ModuleType:
    """reasoning_gym's factory module, which knows every task and its configuration."""
    # pycosat needs a C compiler to install and only zebra puzzles solve with it, so the import must not depend on it.
    if "pycosat" not in sys.modules and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = _AbsentSolver("pycosat")
    try:
        import reasoning_gym.factory
    except ImportError as error:
        raise RecipeError(f"reasoning_gym cannot be imported ({describe(error)}); install reasoning-gym") from error
    return reasoning_gym.factory


class _AbsentSolver(ModuleType):
    """Stands where pycosat would be. Using it says what is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise RecipeError(
            "this reasoning_gym task solves puzzles with pycosat, which is not installed; "
            "install a C compiler and pycosat, or use another task"
        )


def entries(task: str, *, size: int, seed: int, args: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The entries ``{question, answer, metadata}`` of a task, a function of the arguments alone.

    Raises RecipeError for an unknown task, for an argument that the task does not have, and for values it refuses.
    """
    config_class = _registered(task)[1]
    fields = {field.name for field in dataclasses.fields(config_class)} - {"size", "seed"}
    for name in args:
        if name not in fields:
            raise RecipeError(f"reasoning_gym task '{task}' has no argument '{name}'; {did_you_mean(name, fields)}")
    try:
        dataset = library().create_dataset(task, size=size, seed=seed, **args)
        for index in range(size):
            yield dataset[index]
    except RecipeError:
        raise
    except Exception as error:  # the library refuses values by assertion, and some of them only when it generates
        values = {"size": size, "seed": seed, **args}
        raise RecipeError(f"reasoning_gym task '{task}' does not accept {values} ({describe(error)})") from error


@cache
def scorer(task: str) -> Callable[[str | None, dict[str, Any]], float]:
    """The task's own ``score_answer(answer, entry)``, with the task's default configuration; None is no answer."""
    dataset_class, config_class = _registered(task)
    return dataset_class(config=config_class()).score_answer


def _registered(task: str) -> tuple[Any, Any]:
    datasets = library().DATASETS
    if task not in datasets:
        raise RecipeError(f"reasoning_gym has no task '{task}'; {did_you_mean(task, datasets)}")
    return datasets[task]
