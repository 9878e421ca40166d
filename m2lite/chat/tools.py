"""Tools that the model may call: what it is told about them, and those that run here. Asks nobody.

A tool that runs has a directory, a time limit and an output limit. That bounds accidents, not malice: a shell command
may do whatever the user may. Hence the question before each call, which is the loop's.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2lite.decode.engine import Stop
from m2lite.errors import M2liteError, UsageError
from m2lite.shown import shown
from m2lite.storage.durable import atomic_write
from m2lite.system.paths import named_path
from m2lite.text.messages import check_tools

_POLL_S = 0.1  # between two looks at whether to stop
Tool = Mapping[str, Any]


@dataclass(frozen=True)
class Limits:
    """Where tools run, and how much of time and text they may take."""

    directory: Path
    seconds: float = 60.0
    characters: int = 20_000


class ToolError(Exception):
    """What the model is told instead of a result."""


def _schema(name: str, description: str, **parameters: str) -> dict[str, Any]:
    """A function whose parameters are strings, all of them required."""
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _shell(limits: Limits, stop: Stop, command: str) -> str:
    return _run(["/bin/sh", "-c", command], limits, stop)


def _python(limits: Limits, stop: Stop, code: str) -> str:
    return _run([sys.executable, "-c", code], limits, stop)


def _read_file(limits: Limits, stop: Stop, path: str) -> str:
    place = _within(limits, path)
    try:
        with place.open("rb") as file:
            data = file.read(4 * limits.characters + 1)
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}") from None
    return _shortened(data.decode(errors="replace"), limits.characters, at_least=len(data) > 4 * limits.characters)


def _write_file(limits: Limits, stop: Stop, path: str, content: str) -> str:
    place = _within(limits, path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.is_dir():
            raise ToolError(f"{path}: is a directory")
        atomic_write(place, content.encode(errors="replace"), mode=0o666)
    except OSError as error:
        raise ToolError(f"{path}: {error.strerror}") from None
    except M2liteError as error:
        raise ToolError(str(error)) from None
    return f"{len(content.encode(errors='replace'))} bytes written to {path}"


_BUILT_IN: dict[str, tuple[dict[str, Any], Callable[..., str]]] = {
    "shell": (_schema("shell", "Run a shell command and return what it prints.", command="The command"), _shell),
    "python": (_schema("python", "Run Python code and return what it prints.", code="The code"), _python),
    "read_file": (_schema("read_file", "Return the text of a file.", path="Where it is"), _read_file),
    "write_file": (
        _schema("write_file", "Write a file, in place of one that is there.", path="Where", content="All of its text"),
        _write_file,
    ),
}
NAMES = tuple(_BUILT_IN)


@dataclass(frozen=True)
class Tools:
    """What the model is told, and which of it runs here, within limits."""

    schemas: list[dict[str, Any]]
    here: frozenset[str]
    limits: Limits

    def runs(self, call: Tool) -> bool:
        """Whether the call is of a tool that runs here, and that the user offers."""
        return call["function"]["name"] in self.here


def load_tools(sources: Sequence[str], limits: Limits) -> Tools:
    """From names of tools that run here, and from files of OpenAI tool schemas (a list, or {"tools": list})."""
    schemas, here = list[dict[str, Any]](), set[str]()
    for source in sources:
        names = source.split(",")
        if all(name in _BUILT_IN for name in names):
            schemas += [_BUILT_IN[name][0] for name in names]
            here.update(names)
        else:
            schemas += _load_file(source)
    found = [tool["function"]["name"] for tool in schemas]
    twice = next((name for i, name in enumerate(found) if name in found[:i]), None)
    if twice is not None:
        raise UsageError(f"There are two tools with the name {twice!r}.", "Leave one of them out.")
    if here and not limits.directory.is_dir():
        raise UsageError(f"{limits.directory} is no directory.", "Name another one for the tools to run in.")
    return Tools(schemas, frozenset(here), limits)


def _load_file(source: str) -> list[dict[str, Any]]:
    path = named_path(source)
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(
            f"{source}: {error.strerror}.", f"Name a file of tool schemas, or of {', '.join(NAMES)}."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{source}: no JSON ({error}).", "Give a list of OpenAI tool schemas.") from None
    value = value.get("tools") if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise UsageError(f"{source}: holds no list of tools.", "Give a list of OpenAI tool schemas.")
    try:
        return check_tools(value) or []
    except UsageError as error:
        raise error.told_of(source) from None


def run_tool(call: Tool, limits: Limits, stop: Stop) -> str:
    """What the tool gives back; for what goes wrong, what went wrong, since the model may do better then."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    schema, run = _BUILT_IN[name]
    wanted = schema["function"]["parameters"]["required"]
    missing = [key for key in wanted if not isinstance(arguments.get(key), str)]
    extra = [key for key in arguments if key not in wanted]
    if missing or extra:
        return f"error: {name} takes the strings {', '.join(wanted)}; got {', '.join(arguments) or 'nothing'}"
    try:
        return run(limits, stop, **arguments)
    except ToolError as error:
        return f"error: {error}"


def describe_call(call: Tool) -> str:
    """The call as a person reads it before it runs: all of it."""
    function = call["function"]
    lines = [shown(function["name"])]
    for key, value in function["arguments"].items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        if "\n" in text:
            text = "\n" + "\n".join(f"    {line}" for line in text.splitlines())
        lines.append(f"  {shown(key)}: {text}")
    return "\n".join(lines)


def _within(limits: Limits, path: str) -> Path:
    """The place that is meant, which lies in the directory."""
    if "\0" in path:
        raise ToolError("the path holds a zero byte")
    root = limits.directory.resolve()
    place = (root / path).resolve()
    if not place.is_relative_to(root):
        raise ToolError(f"{path}: lies outside of {root}")
    return place


def _run(command: list[str], limits: Limits, stop: Stop) -> str:
    """Output and errors together; the process and its children are gone afterwards."""
    if any("\0" in part for part in command):
        raise ToolError("the command holds a zero byte")
    try:
        process = subprocess.Popen(
            command, cwd=limits.directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise ToolError(f"{error.strerror}") from None
    head, why = bytearray(), ""
    most, n_bytes = 4 * limits.characters, 0
    ends = time.monotonic() + limits.seconds
    assert process.stdout is not None
    with process, selectors.DefaultSelector() as selector:
        try:
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                if stop() or time.monotonic() >= ends:
                    why = "stopped by the user" if stop() else f"stopped after {limits.seconds:g} s"
                    break
                if selector.select(_POLL_S):
                    data = os.read(process.stdout.fileno(), 1 << 16)
                    if not data:
                        break
                    n_bytes += len(data)
                    head += data[: max(0, most - len(head))]
                elif process.poll() is not None:  # a child that goes on in the background holds the pipe
                    break
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = _shortened(head.decode(errors="replace"), limits.characters, at_least=n_bytes > most)
    ending = why or (f"exit code {process.returncode}" if process.returncode else "")
    return f"{text.rstrip()}\n[{ending}]".lstrip() if ending else text or "[no output]"


def _shortened(text: str, most: int, at_least: bool = False) -> str:
    """The beginning, and that there is more."""
    if len(text) <= most and not at_least:
        return text
    return f"{text[:most]}\n[cut after {min(most, len(text)):,} characters]"
