"""Renders one Jinja template: here if it is known, in a limited child process if not. Knows no message and no token.

The engine's fuel stops loops, but no setting of it bounds memory: `s ~ s` thirty times makes a string of a
gigabyte in thirty steps, and printing a list nested that deep takes for ever. So a template that came with a model
file runs in a child process (this very file as a script, hence no import of m2lite) under the system's limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

import minijinja

# What a tag can stand in without being one, and the tags themselves.
_PARTS: Final = re.compile(
    r"\{#.*?#\}"
    r"|\{%[-+]?\s*raw\s*[-+]?%\}.*?\{%[-+]?\s*endraw\s*[-+]?%\}"
    r"|\{%(?P<left>[-+]?)\s*(?P<end>end)?generation\s*(?P<right>[-+]?)%\}"
    r"|\{[{%](?:'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|[^'\"])*?[}%]\}",
    re.DOTALL,
)
CONTEXT_LIMIT_BYTES: Final = 16 << 20
_FUEL: Final = 2_000_000
_MEMORY_BYTES: Final = 128 << 20  # for the child as a whole, plus what the messages need:
_MEMORY_PER_BYTE: Final = 32
_SECONDS: Final = 10.0  # plus, for each MiB of messages:
_SECONDS_PER_MIB: Final = 10.0
_HEADER = struct.Struct("<Q")
_ERROR_LENGTH: Final = 500


class RenderError(Exception):
    """The template failed, or (`raised`) says itself that the messages are wrong."""

    def __init__(self, what: str, raised: bool = False) -> None:
        super().__init__(what)
        self.raised = raised


class _Raised(Exception):
    """A template called raise_exception."""


class _Number:
    """A number that the engine would change: 2.0 into 2, 10**40 into 1e+40. It prints as it was."""

    def __init__(self, value: float | int) -> None:
        self.value = value

    def __str__(self) -> str:
        return repr(self.value)


def _parse_float(text: str) -> float | _Number:
    value = float(text)
    return _Number(value) if value.is_integer() else value


def _parse_int(text: str) -> int | _Number:
    value = int(text)
    return _Number(value) if abs(value) >= 1 << 63 else value


def _plain(value: object) -> object:
    if isinstance(value, _Number):
        return value.value
    raise _Raised(f"tojson: a {type(value).__name__} is no JSON value")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, default=_plain, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise _Raised(str(message))


def without_generation(source: str) -> str:
    """The template with the tags {% generation %}, by which trainers find an answer, as blocks that do nothing."""

    def replace(match: re.Match[str]) -> str:
        name = "endwith" if match["end"] else "with"
        return match[0] if match["left"] is None else f"{{%{match['left']} {name} {match['right']}%}}"

    return _PARTS.sub(replace, source) if "generation" in source else source


def now_s() -> int:
    """The time for templates, in seconds since 1970: SOURCE_DATE_EPOCH, by which prompts can be repeated, or now."""
    fixed = os.environ.get("SOURCE_DATE_EPOCH", "")
    return int(fixed) if re.fullmatch(r"\d{1,11}", fixed) else int(time.time())


class InProcess:
    """Renders here: for templates that are known to be harmless.

    `strftime_now` gives one time, `now` (seconds since 1970), for as long as the template lives: a prompt that holds
    the date goes on as it began, and all lines of a batch have the same.
    """

    def __init__(self, source: str, now: int | None = None) -> None:
        moment = datetime.fromtimestamp(now_s() if now is None else now).astimezone()
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            pycompat=True,
            debug=False,
            auto_escape_callback=lambda name: False,
            filters={"tojson": _tojson},
            globals={"raise_exception": _raise_exception, "strftime_now": moment.strftime},
        )
        self._environment.remove_global("debug")  # prints addresses
        try:
            self._environment.add_template("chat", without_generation(source))
        except Exception as error:
            raise RenderError(_one_line(error)) from None

    def render(self, context: str) -> str:
        """The text for the values in `context`, a JSON object: the template sees copies of plain values."""
        self._environment.fuel = _FUEL + len(context)
        try:
            values = json.loads(context, parse_float=_parse_float, parse_int=_parse_int)
            text = self._environment.render_template("chat", **values)
        except _Raised as error:
            raise RenderError(str(error)[:_ERROR_LENGTH], raised=True) from None
        except Exception as error:
            raise RenderError(_one_line(error)) from None
        limit = (1 << 20) + 8 * len(context)
        if len(text) > limit:
            raise RenderError(f"its text has {len(text)} characters, limit {limit}")
        return text


class InChild:
    """Renders in a child process with bounded memory and time, started when first needed."""

    def __init__(self, source: str) -> None:
        self._source, self._now = source, now_s()
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stop: Callable[[], object] = lambda: None

    def render(self, context: str) -> str:
        with self._lock:
            try:
                reply = self._exchange(context.encode())
            except BaseException:
                self.close()
                raise
        if "error" in reply:
            raise RenderError(reply["error"], raised=reply["raised"])
        return str(reply["text"])

    def close(self) -> None:
        self._stop()
        self._child = None

    def _exchange(self, context: bytes) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS + _SECONDS_PER_MIB * len(context) / (1 << 20)
        try:
            child = self._child or self._start()
            assert child.stdin and child.stdout
            _send(child.stdin, context)
            (n_bytes,) = _HEADER.unpack(_read(child.stdout, _HEADER.size, deadline))
            reply: dict[str, Any] = json.loads(_read(child.stdout, n_bytes, deadline))
        except TimeoutError:
            raise RenderError("it did not finish in time") from None
        except (OSError, EOFError):
            raise RenderError("its process ended, as one does that asks for too much memory") from None
        return reply

    def _start(self) -> subprocess.Popen[bytes]:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", str(Path(__file__).resolve()), str(self._now)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us
            )
        except OSError as error:
            raise RenderError(f"the process to run it in could not be started ({error.strerror})") from None
        self._child = child
        self._stop = weakref.finalize(self, _stop, child)
        assert child.stdin
        _send(child.stdin, self._source.encode())
        return child


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.communicate()  # closes both pipes: what was still to be written is of no use


def _send(stream: BinaryIO | Any, payload: bytes) -> None:
    stream.write(_HEADER.pack(len(payload)) + payload)
    stream.flush()


def _read(stream: Any, n_bytes: int, deadline: float) -> bytes:
    """Exactly n_bytes from the child, before the deadline. Nothing else reads this pipe, so no buffer hides bytes."""
    fd, data = stream.fileno(), bytearray()
    while len(data) < n_bytes:
        poller = select.poll()  # select() cannot take descriptors above 1023
        poller.register(fd, select.POLLIN)
        if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        chunk = os.read(fd, min(n_bytes - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _one_line(error: Exception) -> str:
    """The first line; the engine's further lines quote the template."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"\s+", " ", lines[0])[:_ERROR_LENGTH]


def _limit(which: int, soft: int) -> None:
    hard = resource.getrlimit(which)[1]
    with contextlib.suppress(ValueError, OSError):  # a lower limit is already set, or the system has none
        resource.setrlimit(which, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _serve() -> None:
    """The child: the template, then one JSON context after another; the answer to each is a JSON object."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)

    def receive() -> str | None:
        header = requests.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        (n_bytes,) = _HEADER.unpack(header)
        _limit(resource.RLIMIT_AS, _MEMORY_BYTES + _MEMORY_PER_BYTE * n_bytes)
        return requests.read(n_bytes).decode()

    source, engine = receive(), None
    while (context := receive()) is not None:
        reply: dict[str, object]
        try:
            engine = engine or InProcess(source or "", int(sys.argv[1]))
            reply = {"text": engine.render(context)}
        except RenderError as error:
            what = "it asked for too much memory" if "MemoryError" in str(error) else str(error)
            reply = {"error": what, "raised": error.raised}
        except MemoryError:
            reply = {"error": "it asked for too much memory", "raised": False}
        _send(replies, json.dumps(reply).encode())


if __name__ == "__main__":
    _serve()
