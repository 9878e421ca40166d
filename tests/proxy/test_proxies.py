"""Two servers behind a proxy that is configured as docs/several-machines.md shows it: what a reader copies is tried."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from m2lite.system.paths import user_dir
from tests.children import PATIENCE_S, default_signals

pytestmark = pytest.mark.slow  # it starts processes

DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs" / "several-machines.md"
PAGE = 64
SYSTEM = "You are a patient friend who tells what he knows about plants, animals and the sea. " * 4
COUNT = "Count, please."
LONG = "It is long.\n</think>\n\n" + " ".join(map(str, range(600)))


def wait_for(is_so: Callable[[], bool]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < ends
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class Machine:
    """A server with a cache directory of its own. May be killed and started again at its port."""

    name: str
    folder: Path
    env: dict[str, str]
    port: int = field(default_factory=free_port)
    child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        script = self.folder / "script.json"
        script.write_text(json.dumps([{"match": [COUNT], "text": LONG}]))
        kernels = self.env.get("M2LITE_CACHE_DIR") or str(user_dir("cache"))
        env = self.env | {"XDG_CACHE_HOME": str(self.folder), "M2LITE_CACHE_DIR": kernels, "M2LITE_KV_DISK": "1g"}
        options = ["--alias", self.name, "--port", str(self.port), "--test-script", str(script)]
        with (self.folder / "log").open("ab") as log, default_signals():
            command = [sys.executable, "-m", "m2lite", "serve", *options]
            self.child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        child = self.child
        wait_for(lambda: child.poll() is not None or answers(f"http://127.0.0.1:{self.port}/health"))
        assert child.poll() is None, (self.folder / "log").read_text()

    def send(self, number: int) -> None:
        assert self.child is not None
        self.child.send_signal(number)

    def kill(self) -> None:
        if self.child is not None:
            self.child.kill()
            self.child.wait()

    @property
    def n_unread(self) -> int:
        """Bytes that were sent to its port and that it has not read."""
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(int(line[4].partition(":")[2], 16) for line in lines if line[1].endswith(f":{self.port:04X}"))


@pytest.fixture(scope="module")
def machines(command_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Machine]]:
    found = {name: Machine(name, tmp_path_factory.mktemp(name), command_env) for name in ("one", "two")}
    try:
        for machine in found.values():
            machine.start()
        yield found
    finally:
        for machine in found.values():
            machine.kill()


def documented(file: str) -> str:
    """The block behind the paragraph that names the file."""
    found = re.search(rf"`{re.escape(file)}`:\n\n((?:    .*\n|\n)+)", DOCUMENT.read_text())
    assert found is not None
    return re.sub(r"^    ", "", found[1], flags=re.MULTILINE)


def nginx(config: str, folder: Path) -> list[str]:
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;\n" if os.geteuid() == 0 else ""
    around = f"{user}daemon off;\npid {folder}/pid;\nerror_log {folder}/errors;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(f"{around}http {{\naccess_log off;\n{places}{config}\n}}\n")
    return ["nginx", "-c", str(folder / "nginx.conf"), "-e", str(folder / "errors")]


def haproxy(config: str, folder: Path) -> list[str]:
    (folder / "haproxy.cfg").write_text(config)
    return ["haproxy", "-db", "-f", str(folder / "haproxy.cfg")]


PROXIES = {"nginx": (nginx, "/etc/nginx/conf.d/m2lite.conf"), "haproxy": (haproxy, "/etc/haproxy/haproxy.cfg")}


@contextmanager
def proxying(name: str, machines: dict[str, Machine], folder: Path) -> Iterator[str]:
    """The proxy's address."""
    write, file = PROXIES[name]
    port, config = free_port(), documented(file)
    for number, machine in enumerate(machines.values(), 1):
        assert f"10.0.0.{number}:8080" in config
        config = config.replace(f"10.0.0.{number}:8080", f"127.0.0.1:{machine.port}")
    config = re.sub(r"\b(listen |bind )\S*8080", rf"\g<1>127.0.0.1:{port}", config).replace(
        "agents.example", "localhost"
    )
    path = os.environ["PATH"] + os.pathsep + "/usr/sbin"
    command = write(config, folder)
    with (folder / "said").open("wb") as said:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={"PATH": path})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: child.poll() is not None or answers(f"{url}/health"))
        assert child.poll() is None, (folder / "said").read_text()
        yield url
    finally:
        child.terminate()
        child.wait()


class Talk:
    """One conversation, by way of the proxy."""

    def __init__(self, client: httpx.Client, number: int) -> None:
        self._client, self.headers = client, {"x-session-id": f"session {number}"}
        self.messages: list[Any] = [{"role": "system", "content": SYSTEM}]
        self.messages.append({"role": "user", "content": f"Question {number}: what is a tree?"})
        self.server, self.prefix = "", ""  # who answered last
        self.home = ""  # who answered first
        self.n_known = 0  # tokens of the last prompt and answer

    def _answer(self) -> dict[str, Any]:
        body = {"messages": self.messages, "max_tokens": 6, "seed": 1}
        answer = self._client.post("/v1/chat/completions", json=body, headers=self.headers)
        assert answer.status_code == 200, answer.text
        found, prefix = answer.json(), answer.headers["x-m2lite-prefix"]
        assert self.prefix in ("", prefix)
        self.server, self.prefix = found["model"], prefix
        self.home = self.home or self.server
        return found  # type: ignore[no-any-return]

    def is_at(self, server: str) -> bool:
        """Whether this server answers now. Keeps the conversation as it is, for as often as is asked."""
        self._answer()
        return self.server == server

    def ask(self) -> int:
        """A turn; how many of its tokens were cached."""
        found = self._answer()
        message, usage = found["choices"][0]["message"], found["usage"]
        self.messages += [message, {"role": "user", "content": "And what else?"}]
        self.n_known = usage["total_tokens"]
        cached: int = usage["prompt_tokens_details"]["cached_tokens"]
        return cached

    def ask_again(self) -> tuple[bool, bool]:
        """Whether the next turn is answered by the same server, and from what it has computed."""
        server, n_known = self.server, self.n_known
        cached = self.ask()
        return self.server == server, cached >= n_known - PAGE

    def stream(self) -> Any:
        body = {"messages": [*self.messages[:2], {"role": "user", "content": COUNT}], "stream": True}
        return self._client.stream("POST", "/v1/chat/completions", json=body, headers=self.headers)


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.usefixtures("compiled")
def test_conversations_stay_and_move_when_a_server_dies(
    name: str, machines: dict[str, Machine], tmp_path: Path
) -> None:
    if shutil.which(name) is None and not Path("/usr/sbin", name).exists():
        pytest.skip(f"{name} is not installed")
    with proxying(name, machines, tmp_path) as url, httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        talks = list[Talk]()
        while not all(sum(talk.server == each for talk in talks) >= 3 for each in machines):
            assert len(talks) < 200
            talks.append(Talk(client, len(talks)))
            talks[-1].ask()
        assert [talk.ask_again() for talk in talks] == [(True, True)] * len(talks)
        for talk in talks:  # now by what the server said
            talk.headers = {"x-m2lite-prefix": talk.prefix}
        if name == "nginx":  # which knows no more than the hash of it
            for talk in talks:
                talk.ask()
            assert {talk.server for talk in talks} == set(machines)
        assert [talk.ask_again() for talk in talks] == [(True, True)] * len(talks)

        victim, other = machines["two"], machines["one"]
        moving = [talk for talk in talks if talk.server == "two"]
        staying = [talk for talk in talks if talk.server == "one"]
        victim.send(signal.SIGSTOP)
        asking = threading.Thread(target=moving[0].ask)
        asking.start()
        wait_for(lambda: victim.n_unread > len(SYSTEM))  # the proxy has passed it on
        victim.kill()
        asking.join(PATIENCE_S)
        assert moving[0].server == other.name  # although it had been sent, nothing was answered
        for talk in moving:
            talk.ask()
        assert {talk.server for talk in moving} == {other.name}
        assert [talk.ask_again() for talk in talks] == [(True, True)] * len(talks)
        assert {talk.server for talk in staying} == {other.name}

        victim.start()
        returning = next(talk for talk in talks if talk.home == victim.name)
        returning.headers = {"x-session-id": f"session {talks.index(returning)}"}
        wait_for(lambda: returning.is_at(victim.name))
        with returning.stream() as streaming, pytest.raises(httpx.TransportError):
            for line in streaming.iter_lines():  # which come before the answer is whole
                if "reasoning_content" in line:
                    victim.kill()
        returning.ask()
        assert returning.server == other.name
        victim.start()
