"""A started `m2lite serve` with given answers, and what its log and metrics say. Knows no clients."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.tinymodel import Shape, write_model

ROOT = Path(__file__).resolve().parent.parent.parent
CONTEXT = 131_072
MODEL = "m2"  # as docs/agents.md calls it
_LINE = re.compile(
    r"^req_\w+ POST (?P<path>\S+) (?P<status>\d+) · (?P<prompt>[\d,]+) tokens \((?P<cached>[\d,]+) cached\)"
    r" · (?P<said>[\d,]+) said.*? · (?P<end>\w+) · (?P<seconds>[\d.]+) s$",
    re.MULTILINE,
)
_FAILED = re.compile(r"^req_\w+ \w+ \S+ [45]\d\d\b.*$|^.*internal error.*$", re.MULTILINE)


class Failed(Exception):
    """A check that a client did not pass: why."""


class Answered(NamedTuple):
    """A request, as the server's log has it."""

    path: str
    n_prompt: int
    n_cached: int
    n_said: int
    end: str
    seconds: float


def write_test_model(folder: Path, n_layers: int, n_ctx: int = CONTEXT) -> Path:
    """Small, with a context that clients' prompts fit into, and with m2-tiny's tokenizer, so that text is text."""
    tiny = ROOT / "models" / "m2-tiny" / "m2-tiny.gguf"
    shape = Shape(n_layers=n_layers, n_heads=2, n_kv_heads=1, n_ctx=n_ctx, n_vocab=4096)
    return write_model(folder / "test.gguf", shape=shape, tokenizer=tiny)


class Started:
    """A server in a process. May be stopped and started again: its port and its pages on disk stay."""

    def __init__(self, folder: Path, model: Path, *options: str) -> None:
        """`folder` holds its log, and its pages on disk."""
        self._folder, self._log = folder, folder / "server.log"
        self._log.touch()
        self._model, self._options = model, options
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def with_script(
        cls, folder: Path, script: list[dict[str, Any]], n_layers: int = 2, n_ctx: int = CONTEXT
    ) -> Started:
        """One whose answers are given, of a small model that is written to the folder."""
        (folder / "script.json").write_text(json.dumps(script))
        options = ("--ctx", str(n_ctx), "--alias", MODEL, "--test-script", str(folder / "script.json"))
        return cls(folder, write_test_model(folder, n_layers, n_ctx), *options)

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        kernels = os.environ.get("M2LITE_CACHE_DIR") or f"{Path.home()}/.cache/m2lite"
        env = os.environ | {"XDG_CACHE_HOME": str(self._folder / "cache"), "M2LITE_CACHE_DIR": kernels}
        command = [sys.executable, "-m", "m2lite", "serve", str(self._model), "--port", str(self.port)]
        before = self.mark()
        with self._log.open("ab") as log:
            self._child = subprocess.Popen(
                [*command, *self._options], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=ROOT,
            )  # fmt: skip
        child = self._child
        wait_for(lambda: child.poll() is not None or "http://" in self.log(before), "the server's start", 300)
        if child.poll() is not None:
            raise Failed(f"the server ended: {self.log(before)[-500:]}")

    def stop(self) -> int | None:
        """Its exit code."""
        if self._child is None:
            return None
        self._child.send_signal(signal.SIGTERM)
        return self._child.wait(600)  # it writes its pages

    def mark(self) -> int:
        """A place in the log."""
        return self._log.stat().st_size

    def log(self, since: int) -> str:
        return self._log.read_bytes()[since:].decode()

    def answered(self, since: int) -> list[Answered]:
        """All requests since then that were answered."""
        found = list[Answered]()
        for line in _LINE.finditer(self.log(since)):
            numbers = [int(line[name].replace(",", "")) for name in ("prompt", "cached", "said")]
            found.append(Answered(line["path"], *numbers, line["end"], float(line["seconds"])))
        return found

    def refused(self, since: int) -> list[str]:
        """Lines of requests that ended with an error."""
        return _FAILED.findall(self.log(since))

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            text = answer.read().decode()
        found = re.search(rf"^m2lite_{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


def wait_for(is_so: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise Failed(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


def call(name: str, arguments: dict[str, Any]) -> str:
    """How the model calls a tool."""
    lines = [
        f'<parameter name="{key}">{value if isinstance(value, str) else json.dumps(value)}</parameter>'
        for key, value in arguments.items()
    ]
    return "\n".join(["<minimax:tool_call>", f'<invoke name="{name}">', *lines, "</invoke>", "</minimax:tool_call>"])


def rule(match: Sequence[str], thinking: str, text: str) -> dict[str, Any]:
    return {"match": list(match), "text": f"{thinking}\n</think>\n\n{text}[e~["}
