"""The driver's side of environments: a place for each open one, and a process for those that are not trusted to end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from rl.config import EnvironmentUse
from rl.environ import chosen_variables, outside_environment
from rl.sample import Prompt, ToolCall, ToolResult
from rollout.environments.host import LENGTH
from rollout.environments.protocol import Environment, EnvironmentFailed
from rollout.environments.registry import construct, resolve

CLOSE_S = 10.0
"""Seconds that an environment may take to close."""


class EnvironmentPool:
    """The environments of one domain: at most ``use.concurrency`` are open at a time, others wait for a place.

    Raises RecipeError when the recipe's environment cannot be. ``sandbox`` is handed to environments that ask for it,
    and ``env`` names the variables of this process that those in processes of their own have beside the usual ones.
    """

    def __init__(self, use: EnvironmentUse, *, sandbox: Any = None, env: Sequence[str] = ()) -> None:
        self.use = use
        self._env = chosen_variables(env)
        self._sandbox = sandbox
        self._isolated = getattr(resolve(use.use, use.args), "isolated", True)
        self._places = asyncio.Semaphore(use.concurrency)
        self._idle: list[HostProcess] = []
        self._hosts: set[HostProcess] = set()

    @asynccontextmanager
    async def open(self, prompt: Prompt) -> AsyncIterator[Environment]:
        """An environment for one episode, not yet started; closed in any case, by force if it must be."""
        async with self._places:
            if self._isolated:
                async with self._hosted(prompt) as environment:
                    yield environment
                return
            environment = _Unmade(prompt)
            try:
                environment = construct(self.use, prompt, self._sandbox)
            except EnvironmentFailed as error:
                environment = _Unmade(prompt, error)
            try:
                yield environment
            finally:
                # Cancelled or not, what the environment holds outside of this process must go.
                await asyncio.shield(_closed(environment))

    async def close(self) -> None:
        """Ends the processes; nothing may be open any more."""
        await asyncio.gather(*(host.kill() for host in list(self._hosts)))
        self._hosts.clear()
        self._idle.clear()

    @asynccontextmanager
    async def _hosted(self, prompt: Prompt) -> AsyncIterator[Environment]:
        host = self._idle.pop() if self._idle else HostProcess()
        self._hosts.add(host)
        environment = _Hosted(prompt, self.use, host, self._env)
        ended_well = False
        try:
            yield environment
            await _closed(environment)
            ended_well = not host.broken
        finally:
            if ended_well:
                self._idle.append(host)
            else:
                self._hosts.discard(host)
                await asyncio.shield(host.kill())


async def _closed(environment: Environment) -> None:
    """A failure to close is no episode's fault and no reason to stop a run."""
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSE_S):
            await environment.close()


class _Unmade(Environment):
    """Stands for one whose constructor failed, and fails when it is started."""

    def __init__(self, prompt: Prompt, error: EnvironmentFailed | None = None) -> None:
        self._error = error or EnvironmentFailed("it was not made")

    async def start(self) -> None:
        raise self._error


class _Hosted(Environment):
    """An environment in a process of its own."""

    def __init__(self, prompt: Prompt, use: EnvironmentUse, host: HostProcess, env: Mapping[str, str]) -> None:
        self._prompt = prompt
        self._use = use
        self._host = host
        self._env = env
        self._tools: Sequence[Mapping[str, Any]] = ()

    async def start(self) -> None:
        self._tools = await self._host.ask("open", self._use, self._prompt, self._env)

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self._tools

    async def call(self, call: ToolCall) -> ToolResult:
        return ToolResult(**await self._host.ask("call", call))

    async def next_user_message(self, answer: str) -> str | None:
        return await self._host.ask("next_user_message", answer)

    async def final_state(self) -> Any:
        return await self._host.ask("final_state")

    async def close(self) -> None:
        await self._host.ask("close")


class HostProcess:
    """One process, started when it is first asked something."""

    def __init__(self) -> None:
        self.broken = False
        self._process: asyncio.subprocess.Process | None = None
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    async def ask(self, method: str, *arguments: Any) -> Any:
        """Raises EnvironmentFailed when the method did, or the process died; a cancelled question breaks it."""
        if self.broken:
            raise EnvironmentFailed("its process has ended")
        async with self._starting:
            if self._process is None:
                await self._start()
        process = self._process
        assert process is not None and process.stdin is not None
        number = next(self._numbers)
        future = self._waiting[number] = asyncio.get_running_loop().create_future()
        message = pickle.dumps((number, method, arguments))
        try:
            process.stdin.write(LENGTH.pack(len(message)) + message)
            await process.stdin.drain()
            failure, result = await future
        except (ConnectionError, asyncio.CancelledError) as error:
            self.broken = True
            if isinstance(error, asyncio.CancelledError):
                raise
            raise EnvironmentFailed("its process died") from error
        finally:
            self._waiting.pop(number, None)
        if failure is not None:
            raise EnvironmentFailed(failure)
        return result

    async def kill(self) -> None:
        """Ends the process with everything it started in its own process group."""
        self.broken = True
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
        if self._reading is not None:
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "rollout.environments.host",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=outside_environment(),
            start_new_session=True,
        )
        self._reading = asyncio.create_task(self._read(self._process))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        try:
            while True:
                header = await process.stdout.readexactly(LENGTH.size)
                message = await process.stdout.readexactly(LENGTH.unpack(header)[0])
                number, failure, result = json.loads(message)
                if number in self._waiting and not self._waiting[number].done():
                    self._waiting[number].set_result((failure, result))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError):
            self.broken = True
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(EnvironmentFailed("its process died"))
