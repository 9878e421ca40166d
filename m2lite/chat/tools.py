"""Tools that the model may call: what it is told about them, and those that run here. Asks nobody.

A tool that runs has a directory, a time limit and an output limit. That bounds accidents, not malice: a shell command
may do whatever the user may. Hence the question before each call, which is the loop's.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2lite.chat.bounded import TooLong, aside, run_command
from m2lite.dialogue.chat_request import MOST_REQUEST_BYTES
from m2lite.engine.runner import Stop
from m2lite.errors import M2liteError, UsageError
from m2lite.shown import shown
from m2lite.storage.durable import atomic_write
from m2lite.system.inputs import read_input
from m2lite.system.json_text import JsonError, parse_json
from m2lite.system.outputs import Places
from m2lite.text.messages import check_tools

Tool = Mapping[str, Any]
Run = Callable[[Tool, Stop], str]  # carries a call out: what the tool gives back, or what went wrong


@dataclass(frozen=True)
class Limits:
    """Where tools run, and how much of time and text they may take."""

    directory: Path
    seconds: float = 60.0
    characters: int = 20_000
    places: Places = field(default_factory=Places)  # what the chat itself reads

    def check_directory(self) -> None:
        if not self.directory.is_dir():
            raise UsageError(f"{self.directory} is no directory.", "Name another one for the tools to run in.")


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
    _check_regular(place.stat(), path)  # before it is opened: a device may act on that
    fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        _check_regular(os.fstat(fd), path)
        data = file.read(4 * limits.characters + 1)
    return shortened(data.decode(errors="replace"), limits.characters, at_least=len(data) > 4 * limits.characters)


def _write_file(limits: Limits, stop: Stop, path: str, content: str) -> str:
    place = _within(limits, path)
    place.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        _check_regular(place.lstat(), path)
    limits.places.approve("write_file", place, kind="replaced", is_kept=False)
    if stop():
        raise ToolError("stopped by the user")
    atomic_write(place, content.encode(errors="replace"), mode=0o666)
    return f"{len(content.encode(errors='replace'))} bytes written to {path}"


def _check_regular(status: os.stat_result, path: str) -> None:
    """Anything else, such as a pipe, may keep its reader waiting for ever."""
    if stat.S_ISDIR(status.st_mode):
        raise ToolError(f"{path}: is a directory")
    if not stat.S_ISREG(status.st_mode):
        raise ToolError(f"{path}: is no regular file")


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
    """What the model is told, and what carries out the calls of each tool that the user need not play."""

    schemas: list[dict[str, Any]]
    here: dict[str, Run]  # by the tool's name


def load_tools(sources: Sequence[str], limits: Limits) -> Tools:
    """From names of tools that run here, and from files of OpenAI tool schemas (a list, or {"tools": list})."""
    schemas, here = list[dict[str, Any]](), dict[str, Run]()
    for source in sources:
        names = source.split(",")
        if all(name in _BUILT_IN for name in names):
            schemas += [_BUILT_IN[name][0] for name in names]
            here |= dict.fromkeys(names, lambda call, stop: run_tool(call, limits, stop))
        else:
            schemas += _load_file(source)
    found = [tool["function"]["name"] for tool in schemas]
    twice = next((name for i, name in enumerate(found) if name in found[:i]), None)
    if twice is not None:
        raise UsageError(f"There are two tools with the name {twice!r}.", "Leave one of them out.")
    if here:
        limits.check_directory()
    return Tools(schemas, here)


def _load_file(source: str) -> list[dict[str, Any]]:
    try:
        value = parse_json(read_input(source, MOST_REQUEST_BYTES))
    except OSError as error:
        raise UsageError(
            f"{source}: {error.strerror}.", f"Name a file of tool schemas, or of {', '.join(NAMES)}."
        ) from None
    except JsonError as error:
        raise UsageError(f"{source}: no JSON ({error}).", "Give a list of OpenAI tool schemas.") from None
    value = value.get("tools") if isinstance(value, dict) else value
    if not isinstance(value, list):
        raise UsageError(f"{source}: holds no list of tools.", "Give a list of OpenAI tool schemas.")
    try:
        return check_tools(value) or []
    except UsageError as error:
        raise error.located(source) from None


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
        return aside(lambda stop: run(limits, stop, **arguments), limits.seconds, stop)
    except OSError as error:
        return f"error: {arguments.get('path', name)}: {error.strerror}"
    except (ToolError, M2liteError) as error:
        return f"error: {error}"
    except TooLong as error:
        return f"error: {name} was {error}; it may still go on"


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
    try:
        place = (root / path).resolve()
    except RuntimeError:
        raise ToolError(f"{path}: its links form a circle") from None
    if not place.is_relative_to(root):
        raise ToolError(f"{path}: lies outside of {root}")
    return place


def _run(command: list[str], limits: Limits, stop: Stop) -> str:
    """Output and errors together, and how it ended."""
    if any("\0" in part for part in command):
        raise ToolError("the command holds a zero byte")
    most = 4 * limits.characters
    head, n_bytes, ending = run_command(command, limits.directory, limits.seconds, most, stop)
    text = shortened(head.decode(errors="replace"), limits.characters, at_least=n_bytes > most)
    return f"{text.rstrip()}\n[{ending}]".lstrip() if ending else text or "[no output]"


def shortened(text: str, most: int, at_least: bool = False) -> str:
    """The beginning, and that there is more."""
    if len(text) <= most and not at_least:
        return text
    return f"{text[:most]}\n[cut after {min(most, len(text)):,} characters]"
