"""A process that runs environments somebody else wrote, one after another, for :mod:`rollout.environments.worker`.

It is driven over its standard input by pickled messages, each behind its length in 8 bytes, and answers on its standard
output in JSON, because a process that runs tools must not get code into the driver. What the environment prints goes to
standard error. Calls run at the same time where the environment's methods are coroutines.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import pickle
import struct
import sys
from dataclasses import asdict
from typing import Any, BinaryIO

from rl.plugin import describe
from rl.sample import ToolResult
from rollout.environments.protocol import Environment, answer
from rollout.environments.registry import construct

LENGTH = struct.Struct(">Q")


class Host:
    """Answers ``(number, method, arguments)`` with ``(number, failure or None, result)``."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._environment: Environment | None = None

    async def handle(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            result, failure = await self._result(method, arguments), None
        except Exception as error:
            result, failure = None, describe(error)
        try:
            message = json.dumps((number, failure, result), default=_plain).encode()
        except Exception as error:
            failure = f"{method} returned what cannot be sent: {describe(error)}"
            message = json.dumps((number, failure, None)).encode()
        self._out.write(LENGTH.pack(len(message)) + message)
        self._out.flush()

    async def _result(self, method: str, arguments: tuple[Any, ...]) -> Any:
        if method == "open":
            use, prompt, env = arguments
            os.environ.update(env)  # not what the process began with, which all others of the user can read
            self._environment = construct(use, prompt)
            await _settled(self._environment.start())
            return list(self._environment.tools)
        if self._environment is None:
            raise RuntimeError("no environment is open")
        if method == "call":
            return await answer(self._environment, *arguments)
        result = await _settled(getattr(self._environment, method)(*arguments))
        if method == "close":
            self._environment = None
        return result


def _plain(value: Any) -> dict[str, Any]:
    if isinstance(value, ToolResult):
        return asdict(value)
    raise TypeError(f"a {type(value).__name__} is no JSON value")


async def _settled(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


async def serve(source: BinaryIO, out: BinaryIO) -> None:
    """Handles messages until the input ends; then the process is not needed any more."""
    host, tasks = Host(out), set()
    while True:
        header = await asyncio.to_thread(source.read, LENGTH.size)
        if len(header) < LENGTH.size:
            return
        message = await asyncio.to_thread(source.read, LENGTH.unpack(header)[0])
        task = asyncio.create_task(host.handle(*pickle.loads(message)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


def main() -> None:
    """Serves one environment's calls over the standard streams, until they close."""
    source = os.fdopen(os.dup(0), "rb")
    out = os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    sys.path.insert(0, os.getcwd())
    asyncio.run(serve(source, out))
    os._exit(0)  # a method that still blocks a thread must not keep the process


if __name__ == "__main__":
    main()
