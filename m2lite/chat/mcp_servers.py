"""Tools of MCP servers: programs that are started, say which tools they have, and run them. Asks nobody.

The package `mcp` speaks the protocol; its clients live on an event loop on a thread of its own. A server has the whole
environment, as any program that the user starts. What it writes to standard error reaches no terminal as it is.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import math
import os
import re
import shlex
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from m2lite.chat.bounded import none_left
from m2lite.chat.store import one_line
from m2lite.chat.tools import Limits, Run, Tool, Tools, shortened
from m2lite.engine.runner import Stop
from m2lite.errors import M2liteError, UsageError
from m2lite.shown import shown
from m2lite.system.streams import tell
from m2lite.text.messages import check_tools

if TYPE_CHECKING:
    from anyio import Event
    from anyio.abc import TaskStatus
    from anyio.from_thread import BlockingPortal

START_S = 120.0  # for a server to start and to list its tools: its runner may download it first
_POLL_S = 0.1  # between two looks at whether to stop
_MOST_TOOLS = 1_000
_MOST_SAID = 300  # characters of a server's last words that are told
_MOST_LISTED = 12  # tools that are named at the start
_NAME = re.compile(r"[\w./:-]{1,128}")  # stands in the model's call as it is
_CONNECTION_CLOSED = -32000  # JSON-RPC's code for it


@contextmanager
def mcp_servers(commands: Sequence[str], limits: Limits) -> Iterator[list[McpServer]]:
    """Servers that run, a command each. At the end they are ended, with every process that they began.

    UsageError where the package is missing or a command is none, M2liteError where a server does not start.
    """
    if not commands:
        yield []
        return
    try:
        import mcp  # noqa: F401
    except ImportError:
        raise UsageError("--mcp needs the package mcp.", "pip install 'm2lite[mcp]'.") from None
    import anyio
    from anyio.from_thread import start_blocking_portal

    limits.check_directory()
    logger = logging.getLogger("mcp")  # it quotes what servers send, and would do so on the terminal
    logger.propagate, logger.handlers = False, [logging.NullHandler()]
    with none_left() as env, start_blocking_portal(name="m2lite-mcp") as portal:
        ended = portal.call(anyio.Event)
        try:
            yield [McpServer(command, limits, env, portal, ended) for command in commands]
        finally:
            portal.call(ended.set)


class McpServer:
    """A server that runs: its name, and its tools as it describes them."""

    def __init__(
        self, command: str, limits: Limits, env: Mapping[str, str], portal: BlockingPortal, ended: Event
    ) -> None:  # fmt: skip
        """It runs until `ended` is set."""
        words = _words(command)
        self._limits, self._portal, self._errors = limits, portal, _LastWords()
        try:
            _, (self._client, self.tools) = portal.start_task(self._run, words, env, ended)
        except Exception as error:
            reason = _leaf(error)
            if isinstance(reason, FileNotFoundError | PermissionError):
                what = f"--mcp {shown(command)}: {shown(words[0])}: {reason.strerror}."
                raise UsageError(what, "Name a program and its arguments.") from None
            what = f"The MCP server {shown(command)!r} did not start: {_phrase(reason)}."
            raise M2liteError(f"{what}{self._errors.told()}", "Try the command by itself.") from None
        info = self._client.server_info
        self.name = str(info.name if info is not None else words[0].rpartition("/")[2])

    async def _run(
        self, words: Sequence[str], env: Mapping[str, str], ended: Event, *, task_status: TaskStatus[Any]
    ) -> None:
        """The client from its beginning to its end, which must lie in one task."""
        import anyio
        from mcp.client import Client
        from mcp.client.stdio import StdioServerParameters, stdio_client

        program = StdioServerParameters(
            command=words[0], args=list(words[1:]), env=dict(env), cwd=self._limits.directory
        )
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._errors.listen)
                with anyio.CancelScope(deadline=anyio.current_time() + START_S) as scope:
                    async with Client(stdio_client(program, errlog=self._errors.file)) as client:
                        tools = await _list_tools(client)
                        scope.deadline = math.inf
                        self._errors.file.close()  # the server's own copy is left
                        task_status.started((client, tools))
                        await ended.wait()
                tasks.cancel_scope.cancel()
        finally:
            self._errors.close()
        if scope.cancelled_caught:
            raise TimeoutError(f"not ready after {START_S:g} s")

    def call(self, name: str, arguments: Mapping[str, Any], stop: Stop) -> str:
        """What the tool of that name gives back; for what goes wrong, what went wrong."""
        future = self._portal.start_task_soon(self._client.call_tool, name, dict(arguments))
        ends = time.monotonic() + self._limits.seconds
        try:
            while not concurrent.futures.wait([future], _POLL_S).done:
                if stop():
                    return f"error: {name} was stopped by the user; it may still go on"
                if time.monotonic() >= ends:
                    return f"error: {name} was not done after {self._limits.seconds:g} s; it may still go on"
        finally:
            future.cancel()  # of one that is done nothing comes; else the server is told
        try:
            return shortened(_text(future.result()), self._limits.characters)
        except Exception as error:
            reason = _leaf(error)
            if getattr(reason, "code", None) == _CONNECTION_CLOSED:
                return f"error: the server {self.name} has ended.{self._errors.told()}"
            return shortened(f"error: {_phrase(reason)}", self._limits.characters)


class _LastWords:
    """What a server wrote to its standard error last, by way of a pipe."""

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        self.file = os.fdopen(writer, "w")  # for the server
        self._data = b""

    async def listen(self) -> None:
        import anyio

        while self._read():
            await anyio.wait_readable(self._reader)

    def _read(self) -> bool:
        """What is there; whether more may come."""
        os.set_blocking(self._reader, False)
        try:
            data = os.read(self._reader, 1 << 16)
        except BlockingIOError:
            return True
        self._data = (self._data + data)[-4 * _MOST_SAID :]
        return bool(data)

    def close(self) -> None:
        self._read()
        self.file.close()
        os.close(self._reader)

    def told(self) -> str:
        """A sentence, if there is anything to tell."""
        text = " ".join(self._data.decode(errors="replace").split())
        return f' It said: "{shown(text[-_MOST_SAID:])}".' if text else ""


async def _list_tools(client: Any) -> list[Any]:
    found, cursor = list[Any](), None
    while True:
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        if len(found) > _MOST_TOOLS:
            raise M2liteError(f"it has more than {_MOST_TOOLS:,} tools")
        cursor = page.next_cursor
        if cursor is None:
            return found


def _words(command: str) -> list[str]:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--mcp {shown(command)}: {error}.", "Write it as in a shell.") from None
    if not words or any("\0" in word for word in words):
        raise UsageError(f"--mcp {shown(command)!r} names no program.", "Name one, and its arguments.")
    return words


def _leaf(error: BaseException) -> BaseException:
    """The first that is no group of others."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _phrase(error: BaseException) -> str:
    """Why, within a sentence."""
    return one_line(str(error) or type(error).__name__, _MOST_SAID).rstrip(".")


def _text(result: Any) -> str:
    """What a tool's result says to a model that reads text."""
    parts = list[str]()
    for block in result.content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "resource" and hasattr(block.resource, "text"):
            parts.append(block.resource.text)
        elif block.type == "resource_link":
            parts.append(f"[{block.name}: {block.uri}]")
        else:
            kind = getattr(getattr(block, "resource", block), "mime_type", None) or block.type
            parts.append(f"[{kind}, which this model cannot read]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    text = "\n".join(parts)
    return f"error: {text}" if result.is_error else text or "[no output]"


def with_servers(tools: Tools, servers: Sequence[McpServer]) -> Tools:
    """`tools`, and those of the servers. A name that there is twice gets its server's in front.

    What each server brings is told, and what of it cannot be offered to a model.
    """
    schemas, here = list(tools.schemas), dict(tools.here)
    counts = Counter([tool["function"]["name"] for tool in schemas])
    counts.update(tool.name for server in servers for tool in server.tools)
    slugs = [re.sub(r"\W+", "_", server.name).strip("_") for server in servers]
    for number, server in enumerate(servers):
        slug = slugs[number] if slugs.count(slugs[number]) == 1 else f"{slugs[number]}{number + 1}"
        names = list[str]()
        for tool in server.tools:
            name = tool.name if counts[tool.name] == 1 else f"{slug}_{tool.name}"
            try:
                schemas += _schema(name, tool, {each["function"]["name"] for each in schemas})
            except UsageError as error:
                tell(f"warning: the tool {shown(tool.name)} of {shown(server.name)} is left out: {error}")
                continue
            here[name] = _runner(server, tool.name)
            names.append(name)
        more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
        tell(f"{shown(server.name)}: tools {', '.join(names[:_MOST_LISTED]) or '(none)'}{more}")
    return Tools(schemas, here)


def _schema(name: str, tool: Any, taken: set[str]) -> list[dict[str, Any]]:
    if not _NAME.fullmatch(name) or name in taken:
        raise UsageError(f"{shown(name)!r} cannot be its name." if name not in taken else f"{name} is there already.")
    function = {"name": name, "description": tool.description or "", "parameters": dict(tool.input_schema)}
    return check_tools([{"type": "function", "function": function}]) or []


def _runner(server: McpServer, name: str) -> Run:
    def run(call: Tool, stop: Stop) -> str:
        return server.call(name, call["function"]["arguments"], stop)

    return run
