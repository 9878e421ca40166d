"""What each client is asked, and whether it worked. The same for all of them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.clients.install import folder
from tests.clients.started import Answered, Failed, Started, rule, wait_for

MADE = "made.txt"
PAGE = 64  # positions: what is known is known in whole pages
_PATIENCE_S = 180  # for a client that has a question
_LONG_PATIENCE_S = 3600  # where the model is slow
_ANSWERS = {"grass": "green", "the sky": "blue", "snow": "white", "coal": "black"}
_QUESTION = "What is the color of {}?"
_ORDER = f"Write ok to {MADE}, please."
_LONG = "Count to three thousand, please."
_OPENING = 4  # tokens at most by which a prompt opens the thinking
_ENOUGH = 40  # tokens of an answer, in the middle of which its client is killed


@dataclass
class Place:
    """Where one client runs: a fresh home and an empty project."""

    home: Path
    project: Path
    url: str  # of the server, without /v1
    programs: Path  # folder of its executables

    def write(self, name: str, text: str) -> None:
        """A file in the home."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@dataclass(frozen=True)
class Client:
    """How one is configured and called."""

    name: str
    package: str
    configure: Callable[[Place], dict[str, str]]  # returns variables of the environment
    command: Callable[[Place, str, bool], list[str]]  # asks the text; True: in the session of before
    call: Callable[[Place], str]  # what the model says, so that the file is written
    has_results: bool = True  # whether the model is asked again when the file is there
    sends_thinking: bool = True  # that of answers which call no tool; without it they are computed as they come back
    changes: str = ""  # why the beginning of a conversation does not stay as it was


@dataclass
class Report:
    """What worked, a step each."""

    name: str
    package: str
    steps: dict[str, str] = field(default_factory=dict)  # "ok", or why not
    n_prompt: int = 0  # tokens of the first question
    seconds: float = 0.0  # until its answer was whole
    n_cached: int = 0  # tokens of the follow-up that were known, of
    n_known: int = 0  # those of the prompt and the answer before it
    n_cached_later: int = 0  # the same after a restart of the server
    n_known_later: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return all(how == "ok" for how in self.steps.values())


def script_of(client: Client, place: Place) -> list[dict[str, object]]:
    numbers = " ".join(str(i) for i in range(1, 3001))
    rules = [
        rule([f"color of {what}"], "A question of color.", f"Surely it is {color}.") for what, color in _ANSWERS.items()
    ]
    rules += [rule([_ORDER], "A file is wanted.", client.call(place)), rule([_LONG], "That is long.", numbers)]
    rules += [rule(["<response>"], "The tool has answered.", "It is written.")]
    return [*rules, rule([], "Nobody asks me anything.", "Nothing.")]


class Trial:
    """One client against one server."""

    def __init__(self, client: Client, root: Path, n_layers: int | None = None) -> None:
        """`n_layers`: of a model that takes long to read the first question, which is all that is asked then."""
        self._client, self.report = client, Report(client.name, client.package)
        self._root, self._is_slow = root, n_layers is not None
        (root / "home").mkdir(parents=True)
        (root / "project").mkdir()
        self._place = Place(root / "home", root / "project", "", folder(client.package))
        self._server = Started.with_script(root, script_of(client, self._place), n_layers or 2)
        self._place.url = self._server.url
        self._last: Answered | None = None  # what the conversation's newest request was

    def run(self) -> Report:
        steps = {
            "question": self._ask, "tool call": self._write, "follow-up": self._follow_up, "killed": self._kill,
            "resumed": self._resume, "restarted": self._restart,
        }  # fmt: skip
        try:
            self._server.start()
            self._env = environment(self._place.home, self._place.programs) | self._client.configure(self._place)
            for name, step in steps.items():
                if self._is_slow and name != "question":
                    break
                try:
                    step()
                    self.report.steps[name] = "ok"
                except (Failed, subprocess.TimeoutExpired) as error:
                    self.report.steps[name] = str(error)
            self.report.refused = self._server.refused(0)
        finally:
            self._server.stop()
        return self.report

    def _ask(self) -> None:
        self._last = self._say(_QUESTION.format("grass"), "green", is_more=False)
        self.report.n_prompt, self.report.seconds = self._last.n_prompt, self._last.seconds

    def _write(self) -> None:
        self._last = self._say(_ORDER, "written" if self._client.has_results else "")
        made = self._place.project / MADE
        if not made.exists():
            raise Failed(f"there is no {MADE}")
        if made.read_text().strip() != "ok":
            raise Failed(f"{MADE} says {made.read_text()[:40]!r}")

    def _follow_up(self) -> None:
        before = self._last
        self._last = found = self._say(_QUESTION.format("the sky"), "blue")
        self.report.n_cached = found.n_cached
        if before is not None:
            self.report.n_known = before.n_prompt + before.n_said
            self._check_hit(found, before)

    def _kill(self) -> None:
        server, before = self._server, self._server.metric("time_between_tokens_seconds_count")
        cancelled = server.metric('requests_total{end="cancelled"}')
        with (self._root / "killed.txt").open("wb") as output:
            child = subprocess.Popen(
                self._command(_LONG, True), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self._env,
                cwd=self._place.project, start_new_session=True,
            )  # fmt: skip
        try:
            wait_for(
                lambda: server.metric("time_between_tokens_seconds_count") >= before + _ENOUGH,
                "an answer", _PATIENCE_S,
            )  # fmt: skip
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        wait_for(lambda: server.metric("requests_processing") == 0, "the end of a killed client's answer")
        if server.metric('requests_total{end="cancelled"}') <= cancelled:
            raise Failed("the answer was whole before the client was killed")

    def _resume(self) -> None:
        self._last = self._say(_QUESTION.format("snow"), "white")

    def _restart(self) -> None:
        self._server.stop()
        self._server.start()
        before = self._last
        found = self._say(_QUESTION.format("coal"), "black")
        self.report.n_cached_later = found.n_cached
        if before is not None:
            self.report.n_known_later = before.n_prompt + before.n_said
            self._check_hit(found, before)

    def _check_hit(self, found: Answered, before: Answered) -> None:
        n_known = before.n_prompt + (before.n_said if self._client.sends_thinking else -_OPENING)
        if found.n_cached < n_known - PAGE and not self._client.changes:
            raise Failed(f"of {n_known:,} known tokens {found.n_cached:,} were cached")

    def _command(self, text: str, is_more: bool) -> list[str]:
        command = self._client.command(self._place, text, is_more)
        return [shutil.which(command[0], path=self._env["PATH"]) or command[0], *command[1:]]

    def _say(self, text: str, expected: str, is_more: bool = True) -> Answered:
        """Ask it; returns the conversation's request, which is longer than those beside it."""
        mark = self._server.mark()
        found = subprocess.run(
            self._command(text, is_more), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            env=self._env, cwd=self._place.project,
            timeout=_LONG_PATIENCE_S if self._is_slow else _PATIENCE_S,
        )  # fmt: skip
        with (self._root / "output.txt").open("a") as kept:
            kept.write(f"\n=== {text}: {found.returncode}\n{found.stdout}\n--- stderr\n{found.stderr}\n")
        if found.returncode:
            raise Failed(f"it ended with {found.returncode}: {last_line(found.stderr or found.stdout)}")
        if expected not in found.stdout:
            raise Failed(f"{expected!r} is missing in {last_line(found.stdout)!r}")
        wait_for(lambda: self._server.metric("requests_processing") == 0, "the end of requests beside the question")
        answered = self._server.answered(mark)
        if not answered:
            raise Failed("nothing was asked of the server")
        return max(answered, key=lambda each: each.n_prompt)


def environment(home: Path, programs: Path) -> dict[str, str]:
    """Nothing of whoever runs this but the path."""
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {"HOME": str(home), "PATH": path, "LANG": "C.UTF-8", "TERM": "dumb", "NO_COLOR": "1"}


def last_line(text: str) -> str:
    lines = [line for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
