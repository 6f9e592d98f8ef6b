"""Any server of the Model Context Protocol as a source of tools."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TextIO

from mcp import Client, MCPError, StdioServerParameters, stdio_client

from rl.errors import RecipeError
from rl.plugin import describe
from rl.sample import Prompt, ToolCall, ToolResult
from rollout.environments.protocol import Environment, EnvironmentFailed


class McpTools(Environment):
    """The tools of one server: of a program that is started for each episode, or of one that runs somewhere.

    The program runs outside of the sandbox, with the rights of the run: name only servers that you trust.

    Args:
        command: the program that speaks the protocol over its standard input and output.
        arguments: the program's.
        env: its environment variables beside the few that the protocol's SDK passes on.
        url: of a server that runs already, instead of a command. All episodes share its state.
        timeout_s: seconds one call may take.
        only: names of the tools to show; all of them without it.
    """

    isolated = False

    def __init__(
        self,
        prompt: Prompt,
        *,
        command: str | None = None,
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        url: str | None = None,
        timeout_s: float = 60.0,
        only: Sequence[str] | None = None,
    ) -> None:
        self._server: StdioServerParameters | str = url or StdioServerParameters(
            command=command or "", args=list(arguments), env=dict(env) if env else None
        )
        self._timeout_s = timeout_s
        self._only = only
        self._tools: list[dict[str, Any]] = []
        self._num_calls = 0
        self._client: Client | None = None
        self._closing = asyncio.Event()
        self._session: asyncio.Task[None] | None = None

    @classmethod
    def check(cls, *, command: str | None = None, url: str | None = None, **_: Any) -> None:
        if (command is None) == (url is None):
            raise RecipeError("mcp: give either the command of a server or the url of one that runs")
        if command is not None and shutil.which(command) is None:
            raise RecipeError(f"mcp: there is no program '{command}'")

    async def start(self) -> None:
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # The SDK wants a session to be left in the task that entered it.
        self._session = asyncio.create_task(self._hold_session(connected))
        await connected

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        return self._tools

    async def call(self, call: ToolCall) -> ToolResult:
        assert self._client is not None, "start was not called"
        if call.name not in {one["name"] for one in self._tools}:
            names = ", ".join(one["name"] for one in self._tools)
            return ToolResult(text=f"error: there is no tool '{call.name}'; the tools are {names}", failed=True)
        self._num_calls += 1
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._client.call_tool(call.name, dict(call.arguments))
        except TimeoutError:
            return ToolResult(text=f"error: no answer within {self._timeout_s:g} s", failed=True)
        except MCPError as error:
            return ToolResult(text=f"error: {error}", failed=True)
        except Exception as error:
            raise EnvironmentFailed(f"the MCP server is gone ({describe(error)})") from error
        text = "\n".join(_text_of(block) for block in answer.content)
        return ToolResult(text=text or "(no output)", failed=bool(answer.is_error))

    def final_state(self) -> dict[str, int]:
        return {"calls": self._num_calls}

    async def close(self) -> None:
        self._closing.set()
        if self._session is not None:
            await asyncio.wait([self._session], timeout=5)
            self._session.cancel()
            await asyncio.gather(self._session, return_exceptions=True)

    async def _hold_session(self, connected: asyncio.Future[None]) -> None:
        try:
            async with Client(self._transport()) as client:
                self._client = client
                self._tools = await self._list(client)
                if not connected.done():
                    connected.set_result(None)
                await self._closing.wait()
        except Exception as error:
            if not connected.done():
                failure = EnvironmentFailed(f"no session with the MCP server ({describe(_innermost(error))})")
                connected.set_exception(failure)

    def _transport(self) -> Any:
        """What servers say on their standard error is nobody's to read, thousands of them at once."""
        if isinstance(self._server, str):
            return self._server
        return stdio_client(self._server, errlog=_silence())

    async def _list(self, client: Client) -> list[dict[str, Any]]:
        found, cursor = [], None
        while True:
            page = await client.list_tools(cursor=cursor)
            found += page.tools
            cursor = page.next_cursor
            if cursor is None:
                break
        wanted = {tool.name for tool in found} if self._only is None else set(self._only)
        if absent := wanted - {tool.name for tool in found}:
            raise EnvironmentFailed(f"the server has no tool {', '.join(sorted(absent))}")
        return [
            {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
            for tool in found
            if tool.name in wanted
        ]


@cache
def _silence() -> TextIO:
    return open(os.devnull, "w")


def _text_of(block: Any) -> str:
    return block.text if block.type == "text" else f"({block.type} left out)"


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
