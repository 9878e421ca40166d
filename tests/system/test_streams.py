"""The standard streams: one place writes to them, and closed, full and vanished ones end as they should."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2lite.system import streams
from m2lite.system.streams import Out, OutputError, Styled
from tests.children import PATIENCE_S
from tests.test_imports import PACKAGE, python_files

Models = dict[str, Path]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# --- one place writes

# (file, what it touches): why it may.
ALLOWED = {
    ("system/inputs.py", "isatty"): "whether a device that was named as an input is a terminal",
    ("system/streams.py", "stdin"): "the one place",
    ("system/streams.py", "stdout"): "the one place",
    ("system/streams.py", "stderr"): "the one place",
    ("system/streams.py", "Console"): "the one place",
    ("system/streams.py", "isatty"): "the one place",
    ("kernels/ahead.py", "stdin"): "a child's pipe, which ends with its parent",
    ("text/jinja.py", "stdin"): "a child's pipe of requests",
    ("text/jinja.py", "stdout"): "a child's pipe of replies",
}
_CALLS = {"print", "Console", "echo", "secho", "get_console", "print_exc", "print_exception", "print_stack"}
_STREAMS = {"stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__"}


def touches(path: Path) -> Iterator[tuple[int, str]]:
    """(line, what) of every use of a standard stream, or of what writes to one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            if name in _CALLS and not (name == "print" and isinstance(function, ast.Attribute)):
                yield node.lineno, name
            if name == "isatty":
                yield node.lineno, name
        elif isinstance(node, ast.Attribute) and node.attr in _STREAMS:
            if isinstance(node.value, ast.Name) and node.value.id == "sys":
                yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "sys":
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name in _STREAMS)


def test_one_place_writes() -> None:
    used = set()
    for path in python_files():
        name = str(path.relative_to(PACKAGE))
        for line, what in touches(path):
            assert (name, what) in ALLOWED, f"{path}:{line}: {what}: use m2lite.system.streams"
            used.add((name, what))
    assert used == set(ALLOWED)


# --- what is written


def test_lines_and_texts() -> None:
    for stream in (io.StringIO(), Terminal()):
        Out(lambda s=stream: s).lines("a\nb", "\x1b[31mc\x9b", Styled("\x1b[1md\x1b[0m"))  # type: ignore[misc]
        assert stream.getvalue() == "a\\nb\n\\x1b[31mc\\x9b\n\x1b[1md\x1b[0m\n"
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        Out(lambda s=stream: s).write("a\x1b[2Jb\r\n\tc")  # type: ignore[misc]
    assert pipe.getvalue() == "a\x1b[2Jb\r\n\tc" and terminal.getvalue() == "a␛[2Jb␍\n\tc"


def test_a_line_that_is_written_anew() -> None:
    pipe, terminal = io.StringIO(), Terminal()
    for stream in (pipe, terminal):
        Out(lambda s=stream: s).rewrite("50 % of \x1b[31m")  # type: ignore[misc]
    assert pipe.getvalue() == "" and terminal.getvalue() == "\r\x1b[K50 % of \\x1b[31m"


def test_json() -> None:
    out = io.StringIO()
    value = {"a": "\x9b\x1b\u202eé\udcff", "b": [1.0, float("nan"), {"c": float("inf")}]}
    Out(lambda: out).json(value)
    assert out.getvalue().isprintable() is False and out.getvalue()[:-1].isprintable()
    assert json.loads(out.getvalue()) == value | {"b": [1.0, None, {"c": None}]}
    latin = io.TextIOWrapper(io.BytesIO(), "latin-1")
    Out(lambda: latin).json({"a": "语"})
    latin.seek(0)
    assert json.loads(latin.read()) == {"a": "语"}


def test_running_text_on_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")
        streams.tell("a\x1b[2J\nb", dim=True)
        text = "a␛[2J\nb"
        assert stream.getvalue() == (f"\x1b[2m{text}\x1b[0m\n" if stream.isatty() else f"{text}\n")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_names_in_progress(monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
    from m2lite.commands.frame import ProgressBar

    monkeypatch.setattr(sys, "stderr", stream := Terminal() if is_terminal else io.StringIO())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(ProgressBar, "EVERY_S", 0.0)
    with ProgressBar() as progress:
        progress("model.\x1b]0;owned\x07\nforged [red]", 1, 2)
    assert r"model.\x1b]0;owned\x07\nforged [red]" in stream.getvalue().replace("\n", "")
    assert "\x1b]" not in stream.getvalue() and "\x07" not in stream.getvalue()


# --- streams that fail


def test_a_failed_stdout_fails_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "_closed", set())
    full = os.open("/dev/full", os.O_WRONLY)
    raw = streams._Results(full, "<stdout>")
    monkeypatch.setattr(streams, "_results", raw)
    text = streams._text(raw, None, False)
    text.write("a")
    with pytest.raises(OutputError, match="No space left on device"):
        text.flush()
    text.write("b")
    text.close()  # nothing is raised behind our back
    assert "No space left" in str(streams.finish())
    os.close(full)
    reader, writer = os.pipe()
    os.close(reader)
    raw = streams._Results(writer, "<stdout>")
    monkeypatch.setattr(streams, "_results", raw)
    with pytest.raises(streams.ReaderGone):
        raw.write(b"a")
    assert streams.finish() is None
    os.close(writer)


def test_a_lost_stderr_loses_messages_only() -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    text = streams._text(streams._Messages(full, "<stderr>"), None, True)
    text.write("a\udcff语\n")
    text.close()
    os.close(full)


def test_a_stream_that_does_not_wait() -> None:
    """Whoever shares the pipe made it non-blocking: all arrives."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    read = subprocess.Popen([sys.executable, "-c", "import sys; print(len(sys.stdin.buffer.read()))"],
                            stdin=reader, stdout=subprocess.PIPE)  # fmt: skip
    os.close(reader)
    with streams._text(streams._Results(writer, "<stdout>"), None, False) as text:
        text.write("x" * 1_000_000)
    os.close(writer)
    assert read.communicate(timeout=PATIENCE_S)[0] == b"1000000\n"


def in_shell(redirections: str, env: dict[str, str], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["/bin/sh", "-c", f'"$@" {redirections}', "sh", sys.executable, "-m", "m2lite", *map(str, arguments)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE_S, stdin=subprocess.DEVNULL
    )


FULL = "m2lite: The result cannot be written to stdout: No space left on device.\n"
CLOSED = "m2lite: stdout is closed, and the result belongs there. Leave `>&-` out, or write it to a file.\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "redirections", "code", "out", "err"),
    [
        (["generate"], "2>&-", 0, "Fine é\n", ""),
        (["generate"], "2>/dev/full", 0, "Fine é\n", ""),
        (["generate"], ">&-", 1, "", CLOSED),
        (["generate"], ">/dev/full", 1, "", FULL),
        (["generate", "--json"], ">/dev/full", 1, "", FULL),
        (["generate"], "<&- >&- 2>&-", 1, "", ""),
        (["generate"], "| true", 0, "", ""),
        (["chat"], "<&-", 0, "", "stdin is closed: it is taken as empty\n"),
        (["inspect"], ">/dev/full", 1, "", FULL),
        (["inspect"], "| true", 0, "", ""),
        (["--help"], ">/dev/full", 1, "", FULL),
        (["--help"], ">&-", 1, "", "m2lite: The result cannot be written to stdout: it is closed.\n"),
        (["--help"], "| true", 0, "", ""),
        (["--version"], ">/dev/full", 1, "", FULL),
        (["--nothing"], "2>/dev/full", 2, "", ""),
    ],
)  # fmt: skip
def test_closed_full_and_vanished(
    command_env: dict[str, str], model_files: Models, arguments: list[str], redirections: str, code: int, out: str,
    err: str,
) -> None:  # fmt: skip
    """A piped command's exit code is the reader's."""
    command: list[str | Path] = [*arguments]
    if arguments[0] in ("generate", "chat", "inspect"):
        command.insert(1, model_files["reply"])
    if arguments[0] == "generate":
        command += ["-p", "x", "--seed", "1"]
    done = in_shell(redirections, command_env, *command)
    assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert err in done.stderr and done.stderr.count("m2lite: ") == err.count("m2lite: ")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_the_chats_reader_goes(command_env: dict[str, str], model_files: Models) -> None:
    command = 'printf "a\\nb\\n" | { "$@"; echo code $? >&2; } | head -c 1'
    done = subprocess.run(
        ["/bin/sh", "-c", command, "sh", sys.executable, "-m", "m2lite", "chat", str(model_files["answer"])],
        env=command_env, capture_output=True, text=True, check=False, timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout == "a" and "code 0" in done.stderr
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr and "error" not in done.stderr


@pytest.mark.slow
def test_no_file_gets_the_number_of_a_closed_stream(command_env: dict[str, str], model_files: Models) -> None:
    """A file that is opened for writing gets the lowest free number: status lines would be written into it."""
    code = (
        "from m2lite.system import streams; streams.claim(); import os, sys\n"
        "opened = os.open('file', os.O_CREAT | os.O_RDWR); assert opened > 2, opened\n"
        "streams.note('a line'); assert os.fstat(opened).st_size == 0\n"
        "assert sys.stdin.read() == '' and os.get_inheritable(0) and os.get_inheritable(2)"
    )
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" <&- 2>&-', "sh", sys.executable, "-c", code],
        env=command_env, cwd=Path(command_env["XDG_CONFIG_HOME"]).parent, check=False,
    )  # fmt: skip
    assert done.returncode == 0
