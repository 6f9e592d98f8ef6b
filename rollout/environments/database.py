"""A toolset of the task's own over a database: the general agent's synthetic environments.

A toolset is a Python module whose functions marked with ``@tool`` take a ``sqlite3.Connection`` first, and which says
how its database is made::

    SCHEMA = "CREATE TABLE cities (name TEXT PRIMARY KEY, ...);"

    def fill(database: sqlite3.Connection, seed: int) -> None: ...

    @tool
    def get_all_cities(database: sqlite3.Connection) -> list[str]:
        \"\"\"Lists every city.\"\"\"
        return [name for (name,) in database.execute("SELECT name FROM cities")]

The environment adds ``submit_result``. What was submitted is ``final_state["result"]`` for a verifier (the reward
``state_check``), together with the tables named in ``state_tables``.
"""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from rl.errors import RecipeError
from rl.plugin import describe
from rl.sample import Prompt, ToolCall, ToolResult
from rollout.environments.protocol import (
    Environment,
    ToolError,
    as_result,
    checked_arguments,
    describe_tool,
    is_tool,
    tool,
)

MAX_STEPS = 5_000_000
"""Steps of SQLite's virtual machine after which one call is interrupted."""


class DatabaseTools(Environment):
    """One database in memory for each episode, filled the same way every time.

    Args:
        toolset: dotted path of the module.
        seed: given to ``fill``; a prompt's answer may name another one (``{"seed": 7}``).
        state_tables: tables that the final state holds, as lists of rows.
    """

    def __init__(self, prompt: Prompt, *, toolset: str, seed: int = 0, state_tables: Sequence[str] = ()) -> None:
        module = _module(toolset)
        own = prompt.answer.get("seed", seed) if isinstance(prompt.answer, Mapping) else seed
        self._database = sqlite3.connect(":memory:")
        self._database.executescript(module.SCHEMA)
        module.fill(self._database, own)
        self._database.commit()
        self._functions = _functions(module)
        self._state_tables = tuple(state_tables)
        self._result: Any = None
        self._submitted = False

    @classmethod
    def check(cls, *, toolset: str, state_tables: Sequence[str] = (), **_: Any) -> None:
        module = _module(toolset)
        if not _functions(module):
            raise RecipeError(f"tools: {toolset} has no function that is marked with @tool")
        database = sqlite3.connect(":memory:")
        try:
            database.executescript(module.SCHEMA)
            for table in state_tables:
                database.execute(f"SELECT * FROM {_quoted(table)}")
        except sqlite3.Error as error:
            raise RecipeError(f"tools: the schema of {toolset} does not work ({error})") from error
        finally:
            database.close()

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        own = [describe_tool(function, given=1) for function in self._functions.values()]
        return [*own, describe_tool(self.submit_result)]

    async def call(self, call: ToolCall) -> ToolResult | str:
        if call.name == "submit_result":
            return as_result(self.submit_result(**checked_arguments(self.submit_result, call.arguments)))
        function = self._functions.get(call.name)
        if function is None:
            raise ToolError(
                f"there is no tool '{call.name}'; the tools are {', '.join(self._functions)}, submit_result"
            )
        arguments = checked_arguments(function, call.arguments, given=1)
        steps = iter(range(MAX_STEPS // 1000))
        self._database.set_progress_handler(lambda: next(steps, None) is None, 1000)
        try:
            result = as_result(function(self._database, **arguments))
            self._database.commit()
            return result
        except sqlite3.OperationalError as error:
            self._database.rollback()
            raise ToolError(f"{call.name} took too long" if "interrupted" in str(error) else str(error)) from error
        except Exception:
            self._database.rollback()
            raise

    @tool
    def submit_result(self, result: Any) -> str:
        """Submits the task's result. A later submission takes the place of an earlier one.

        result: what the task asks for, in the form it asks for
        """
        self._result, self._submitted = result, True
        return "submitted"

    def final_state(self) -> dict[str, Any]:
        tables = {
            table: [list(row) for row in self._database.execute(f"SELECT * FROM {_quoted(table)}")]
            for table in self._state_tables
        }
        return {"submitted": self._submitted, "result": self._result, **({"tables": tables} if tables else {})}

    async def close(self) -> None:
        self._database.close()


def _module(path: str) -> ModuleType:
    try:
        module = importlib.import_module(path)
    except Exception as error:
        raise RecipeError(f"tools: the toolset {path} cannot be imported ({describe(error)})") from error
    for name in ("SCHEMA", "fill"):
        if not hasattr(module, name):
            raise RecipeError(f"tools: the toolset {path} has no {name}")
    return module


def _functions(module: ModuleType) -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in vars(module).items() if is_tool(value)}


def _quoted(table: str) -> str:
    return '"' + table.replace('"', '""') + '"'
