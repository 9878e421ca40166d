"""An MCP server for tests. Its first argument is its name, its second a directory in which it leaves marks."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError

NAME, PLACE = sys.argv[1], Path(sys.argv[2])
server = MCPServer(NAME)


@server.tool()
def add(a: int, b: int) -> str:
    """The sum of two numbers."""
    return str(a + b)


@server.tool()
def fail() -> str:
    """Goes wrong."""
    raise ToolError("nothing to be had")


@server.tool()
async def wait() -> str:
    """Goes on until it is cancelled."""
    (PLACE / "waits").touch()
    try:
        await asyncio.Event().wait()
    finally:
        (PLACE / "cancelled").touch()
    return ""


@server.tool()
def repeat(text: str, times: int) -> str:
    """The text again and again."""
    return text * times


@server.tool()
def picture() -> list[str | Image]:
    """A text and a picture."""
    return ["see", Image(data=b"GIF89a", format="gif")]


@server.tool()
def child(mark: str) -> str:
    """Starts a process that goes on."""
    subprocess.Popen(["sh", "-c", f"sleep 600; : {mark}"], start_new_session=True)
    return "begun"


@server.tool()
def leave() -> str:
    """Ends the server."""
    sys.stderr.write("\033[2Jno more\n")
    sys.stderr.flush()
    os._exit(3)


if __name__ == "__main__":
    (PLACE / f"{NAME}.pid").write_text(str(os.getpid()))
    sys.stderr.write(f"{NAME} runs\n")
    server.run()
