"""A Model Context Protocol server with a few tools, run as a program by the tests: ``[PORT]`` to serve on loopback."""

import asyncio
import os
import sys

from mcp.server import MCPServer

server = MCPServer("shelf")
shelf: list[str] = []


@server.tool()
def put(title: str) -> str:
    """Puts a book on the shelf."""
    shelf.append(title)
    return f"{len(shelf)} books"


@server.tool()
def fail() -> str:
    """Always fails."""
    raise RuntimeError("the shelf is full")


@server.tool()
async def sleep() -> str:
    """Takes its time."""
    await asyncio.sleep(600)
    return "done"


@server.tool()
def die() -> str:
    """Ends the server."""
    os._exit(1)


if __name__ == "__main__":
    print("starting", file=sys.stderr)
    if sys.argv[1:]:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run()
