"""`m2lite serve` as a user runs it: its lines, its answers, its end."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from m2lite.system.paths import user_dir
from tests.children import default_signals
from tests.conftest import Run

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes

CHAT = "/v1/chat/completions"
BODY: Any = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


class Process:
    """The command, once it listens."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child, self.lines = child, list[str]()
        while not self.lines or not self.lines[-1].startswith("http://"):
            self.read_line()
        self.url = self.lines[-1].strip().removesuffix("/v1")

    def read_line(self) -> str:
        assert self.child.stderr is not None
        line = self.child.stderr.readline()
        assert line, "".join(self.lines)
        self.lines.append(line)
        return line

    def end(self, number: int) -> tuple[int, str]:
        """Its exit code and what it said in the end."""
        self.child.send_signal(number)
        assert self.child.stderr is not None
        rest = self.child.stderr.read()
        return self.child.wait(), rest


@contextmanager
def serving(env: dict[str, str], *arguments: str | Path) -> Iterator[Process]:
    with default_signals():
        command = [sys.executable, "-m", "m2lite", "serve", *map(str, arguments), "--port", "0"]
        child = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        with child:
            try:
                yield Process(child)
            finally:
                child.kill()
    finally:
        assert child.returncode is not None


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
@pytest.mark.usefixtures("compiled")
def test_from_start_to_end(command_env: dict[str, str], model_files: dict[str, Path], number: int, code: int) -> None:
    with serving(command_env, model_files["reply"], "--alias", "m2", "--parallel", "2") as process:
        text = "".join(process.lines)
        assert re.search(
            r"^model m2 · 2 answers at once · KV 8,192 tokens \(.+ each\): 2 as long as", text, re.MULTILINE
        )
        found = httpx.post(process.url + CHAT, json=BODY).json()
        assert found["model"] == "m2" and len(found["choices"]) == 1
        line = process.read_line()
        assert re.fullmatch(
            r"req_\w+ POST /v1/chat/completions 200 · \d+ tokens \(0 cached\) · 3 said · length · [\d.]+ s\n", line
        )
        assert "Hello" not in line
        ended, rest = process.end(number)
        assert ended == code and "Traceback" not in rest and "internal" not in rest, rest


@pytest.mark.usefixtures("compiled")
def test_answers_that_run_are_ended(command_env: dict[str, str], model_files: dict[str, Path]) -> None:
    """After a few seconds, with a word; a second Ctrl-C ends at once."""
    with serving(command_env, model_files["endless"], "--ctx", "4096") as process:
        body = {**BODY, "max_tokens": 4000, "stream": True, "logprobs": True, "top_logprobs": 20}
        with httpx.stream("POST", process.url + CHAT, json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.child.send_signal(signal.SIGINT)
            with pytest.raises(httpx.ConnectError):
                while True:  # until it listens no more
                    httpx.get(process.url + "/health")
            process.child.send_signal(signal.SIGINT)
            assert process.child.wait() == 130


@pytest.mark.usefixtures("compiled")
def test_prompts_are_there_after_a_restart(
    command_env: dict[str, str], model_files: dict[str, Path], tmp_path: Path
) -> None:
    """Written when nobody waits or at the end, and computed beforehand where that is asked for."""
    kernels = command_env.get("M2LITE_CACHE_DIR") or str(user_dir("cache"))
    env = command_env | {"XDG_CACHE_HOME": str(tmp_path), "M2LITE_CACHE_DIR": kernels, "M2LITE_KV_DISK": str(1 << 30)}
    asked = {**BODY, "messages": [{"role": "user", "content": "abc" * 200}]}
    file = tmp_path / "warm.jsonl"
    file.write_text(json.dumps(asked) + "\n\n" + json.dumps({"messages": []}) + "\n")
    with serving(env, model_files["reply"], "--warm", file) as process:
        assert re.match(r"prompt 1 of 2: \d+ tokens \(0 cached\)\n", process.read_line())
        assert process.read_line().startswith("prompt 2 of 2: messages is no list")
        assert httpx.get(process.url + "/health").json() == {"status": "ok"}
        assert process.end(signal.SIGTERM)[0] == 143
    with serving(env, model_files["reply"]) as process:
        usage = httpx.post(process.url + CHAT, json=asked).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 64


@pytest.mark.usefixtures("compiled")
def test_a_key_from_a_file(command_env: dict[str, str], model_files: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n two \n\n")
    arguments = ("--api-key-file", file, "--host", "0.0.0.0", "--log-prompts")
    with serving(command_env, model_files["reply"], *arguments) as process:
        url = process.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.post(url + CHAT, json=BODY).status_code == 401
        assert httpx.post(url + CHAT, json=BODY, headers={"authorization": "Bearer two"}).status_code == 200
        lines = [process.read_line() for _ in range(4)]
        assert any('"content":"Hello"' in line.replace(" ", "") for line in lines)


def test_what_cannot_be_meant(run_m2lite: Run, model_files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "odd").write_bytes(b"\xff\n")
    (tmp_path / "warm").write_text("{\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for arguments, code, said in (
            (["--host", "0.0.0.0"], 2, "can be reached by other machines, and no key is asked for. Add --api-key-file"),
            (["--parallel", "0"], 2, "--parallel is 0"),
            (["--api-key-file", tmp_path / "none"], 2, "cannot be read"),
            (["--api-key-file", tmp_path / "empty"], 2, "holds 0 keys"),
            (["--api-key-file", tmp_path / "odd"], 2, "cannot be read"),
            (["--warm", tmp_path / "warm"], 2, "line 1: no JSON"),
            (["--port", str(taken.getsockname()[1])], 1, "cannot be listened at: Address already in use"),
            (["--port", "99999"], 1, "cannot be listened at"),
            (["--host", "no.such.host.invalid", "--api-key-file", tmp_path / "key"], 1, "cannot be listened at"),
        ):
            (tmp_path / "key").write_text("x")
            done = run_m2lite("serve", model_files["reply"], *arguments)
            assert (done.returncode, done.stdout) == (code, ""), done.stderr
            assert said in done.stderr and "Traceback" not in done.stderr, done.stderr
