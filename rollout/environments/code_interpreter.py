"""Python in a Jupyter kernel of the episode's own, inside the sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rl.errors import RecipeError
from rl.sample import Prompt, ToolResult
from rollout.environments.protocol import Environment, EnvironmentFailed, tool

_PROGRAM = Path(__file__).parent / "kernel_program.py"
_GRACE_S = 5.0  # beyond the time limit, for a cell that cannot be interrupted
_START_S = 60.0


class CodeInterpreter(Environment):
    """One stateful session: what a cell defines is there for the next ones, and so are the files it writes.

    Args:
        timeout_s: seconds one cell may run. It is interrupted then and the session goes on; a cell that does not let
            itself be interrupted ends the session, and the policy is told.
        memory_mb: of the whole session.
        files: a folder whose contents the session finds in its working directory.
        max_output: characters of one cell's output; what is longer loses its middle.
    """

    isolated = False

    def __init__(
        self,
        prompt: Prompt,
        *,
        sandbox: Any,
        timeout_s: float = 120.0,
        memory_mb: int = 1024,
        files: str | None = None,
        max_output: int = 12_000,
    ) -> None:
        self._sandbox = sandbox
        self._limits = replace(sandbox.limits, wall_s=None, cpu_s=None, memory_bytes=memory_mb << 20, processes=128)
        self._timeout_s = timeout_s
        self._files = files
        self._max_output = max_output
        self._folder: Any = None
        self._process: Any = None
        self._running = contextlib.AsyncExitStack()
        self._turn = asyncio.Lock()  # a kernel runs one cell at a time
        self._num_cells = 0

    @classmethod
    def check(cls, *, timeout_s: float = 120.0, files: str | None = None, **_: Any) -> None:
        if not timeout_s > 0:
            raise RecipeError(f"code_interpreter: timeout_s is {timeout_s}; it must be above 0")
        if files is not None and not Path(files).is_dir():
            raise RecipeError(f"code_interpreter: files names {files}, which is not a folder")

    @tool
    async def python(self, code: str) -> ToolResult:
        """Runs code in a stateful Jupyter notebook with Python. Returns what it prints and the value of its last line.
        Variables and files stay until the end of the conversation. There is no internet access.

        code: the Python code of one cell
        """
        async with self._turn:
            if self._process is None:
                await self._start()
            self._num_cells += 1
            answer = await self._ask({"code": code, "timeout_s": self._timeout_s, "limit": self._max_output})
        if answer is None:
            await self._end_process()
            lost = "the session has ended and a fresh one begins: variables are lost, files are kept"
            return ToolResult(
                text=f"error: the code broke or blocked its session, or used too much memory; {lost}", failed=True
            )
        text = answer["text"]
        if answer["timed_out"]:
            text = f"{text}\nerror: interrupted after {self._timeout_s:g} s".strip()
        return ToolResult(text=text or "(no output)", failed=answer["failed"])

    def final_state(self) -> dict[str, int]:
        return {"cells": self._num_cells}

    async def close(self) -> None:
        await self._end_process()
        if self._folder is not None:
            await asyncio.to_thread(self._folder.close)
            self._folder = None

    async def _start(self) -> None:
        if self._folder is None:
            self._folder = await asyncio.to_thread(self._sandbox.folder)
            if self._files is not None:
                await asyncio.to_thread(self._folder.add, Path(self._files))
        command = ["python3", "-c", _PROGRAM.read_text(encoding="utf-8")]
        opened = await self._sandbox.open(command, folder=self._folder, limits=self._limits)
        self._process = await self._running.enter_async_context(opened)
        self._running.callback(asyncio.create_task(_discard(self._process.stderr)).cancel)
        ready = await self._ask({"code": "", "timeout_s": 10.0, "limit": 1000}, _START_S)
        if ready is None:
            await self._end_process()
            raise EnvironmentFailed(
                f"no Jupyter kernel could be started in the sandbox ({self._sandbox.isolation}); the Python that Keel "
                "runs on must have ipykernel, and be readable for the user that programs run as there"
            )

    async def _ask(self, command: Mapping[str, Any], limit_s: float | None = None) -> dict[str, Any] | None:
        """The kernel's answer; None when there is none in time."""
        limit_s = self._timeout_s + _GRACE_S if limit_s is None else limit_s
        try:
            async with asyncio.timeout(limit_s):
                self._process.stdin.write(json.dumps(command).encode() + b"\n")
                await self._process.stdin.drain()
                line = await self._process.stdout.readline()
            answer = json.loads(line)
            return answer if {"text", "failed", "timed_out"} <= set(answer) else None
        except (TimeoutError, ConnectionError, ValueError, TypeError):
            return None

    async def _end_process(self) -> None:
        self._process = None
        await self._running.aclose()


async def _discard(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass
