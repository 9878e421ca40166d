"""A storm of requests against a real `m2lite serve`: python -m tests.serve.storm [--requests 1000] [--seed 0].

All dialects over many connections at once. Some clients leave, in the middle of an answer or of their own body; some
are slow; some ask for what is refused. Afterwards nothing may be lost, no answer may differ from what Python gives for
the same seed, and the server must hold what it held before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

from m2lite import Model
from m2lite.dialogue.conversation import turn_stream
from m2lite.engine.answer import Completion
from m2lite.engine.locate import locate_model
from m2lite.errors import M2liteError
from tests.clients.started import Failed, Started, wait_for
from tests.serve.storm_plan import CONTEXT, Ask, Body, follow_up, plan

PARALLEL, QUEUE, CONNECTIONS = 8, 8, 24  # fewer places than clients: some are told to come again
MOST_GROWN = 4 << 20  # bytes, of the second half of a long storm
LONG = 500  # requests from which on memory is judged
_AGAIN_S = 0.05
_SMALL = 2048  # bytes that a slow reader lets the system take


@dataclass
class Answered:
    """What came of one request."""

    ask: Ask
    status: int = 0  # 0: its client left
    ids: list[list[int]] = field(default_factory=list)  # of each choice, where the dialect tells them
    prompt: list[int] = field(default_factory=list)
    thinking: str = ""
    content: str = ""
    n_tokens: int | None = None  # where the dialect tells it
    is_whole: bool = False
    error: Any = None
    request_id: str = ""

    def read(self, body: Body) -> None:
        """An answer that did not come as a stream."""
        self.is_whole = True
        match self.ask.dialect:
            case "chat":
                [choice] = body["choices"]
                self.ids, self.prompt = [choice["token_ids"]], body["prompt_token_ids"]
                self.thinking = choice["message"].get("reasoning_content", "")
                self.content, self.n_tokens = choice["message"]["content"], body["usage"]["completion_tokens"]
            case "completions":
                self.ids = [choice["token_ids"] for choice in body["choices"]]
            case "responses":
                self.read_response(body)
            case "messages":
                self.thinking = "".join(each.get("thinking", "") for each in body["content"])
                self.content = "".join(each.get("text", "") for each in body["content"])
                self.n_tokens = body["usage"]["output_tokens"]

    def read_response(self, body: Body) -> None:
        parts = [(item["type"], part["text"]) for item in body["output"] for part in item.get("content", [])]
        self.thinking = "".join(text for kind, text in parts if kind == "reasoning")
        self.content = "".join(text for kind, text in parts if kind == "message")
        self.n_tokens = body["usage"]["output_tokens"]

    def read_event(self, data: str) -> None:
        """One of a stream's."""
        if data == "[DONE]":
            self.is_whole = True
            return
        event = json.loads(data)
        self.error = self.error or event.get("error")
        if self.ask.dialect in ("chat", "completions"):
            self.ids = self.ids or [[]]
            for choice in event.get("choices", []):
                self.ids[0] += choice["token_ids"]
                self.thinking += choice.get("delta", {}).get("reasoning_content", "")
                self.content += choice.get("delta", {}).get("content", "")
            self.prompt += event.get("prompt_token_ids", [])
        elif event["type"] in ("response.completed", "response.incomplete"):
            self.read_response(event["response"])
            self.is_whole = True
        elif event["type"] == "content_block_delta":
            self.thinking += event["delta"].get("thinking", "")
            self.content += event["delta"].get("text", "")
        elif event["type"] == "message_delta":
            self.n_tokens = event["usage"]["output_tokens"]
        self.is_whole = self.is_whole or event.get("type") == "message_stop"

    @property
    def message(self) -> Body:
        thinking = {"reasoning_content": self.thinking} if self.thinking else {}
        return {"role": "assistant", "content": self.content, **thinking}


class Storm:
    """Sends what is planned, so many at once, and keeps what came."""

    def __init__(self, server: Started) -> None:
        self._server, self.found = server, list[Answered]()
        self.n_told_to_wait = 0
        self.resident = list[int]()  # bytes of the server's own, after each request
        self._process = psutil.Process(server.pid)

    async def run(self, asks: Sequence[Ask], n_connections: int) -> None:
        left = iter(asks)

        async def work() -> None:
            small = [(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL)]
            slow = httpx.AsyncHTTPTransport(socket_options=small)
            async with (
                httpx.AsyncClient(base_url=self._server.url, timeout=300) as client,
                httpx.AsyncClient(base_url=self._server.url, timeout=300, transport=slow) as slow_client,
            ):
                for ask in left:
                    await self._one(ask, slow_client if ask.manner == "slow to read" else client)
                    self.resident.append(own_bytes(self._process))

        await asyncio.gather(*(work() for _ in range(n_connections)))

    async def _one(self, ask: Ask, client: httpx.AsyncClient) -> None:
        if ask.manner in ("leaves in its body", "leaves at once"):
            await self._leave(ask)
            return
        answered = await self._send(ask, client)
        self.found.append(answered)
        if ask.more and answered.is_whole:
            await self._one(follow_up(ask, answered.message), client)

    async def _send(self, ask: Ask, client: httpx.AsyncClient) -> Answered:
        """Until it is answered; where nobody else may wait, again after a while."""
        headers = {"content-type": "application/json"} | dict(ask.refusal.headers if ask.refusal else {})
        while True:
            answered = Answered(ask)
            content: Any = _slowly(ask.data) if ask.manner == "slow to send" else ask.data
            async with client.stream("POST", ask.path, content=content, headers=headers) as response:
                answered.status, answered.request_id = response.status_code, response.headers["x-request-id"]
                if response.status_code == 200 and ask.is_stream:
                    await _read_stream(response, answered)
                    return answered
                body = json.loads(await response.aread())
            if response.status_code == 200:
                answered.read(body)
                return answered
            if response.status_code != 429:
                answered.error = body.get("error")
                return answered
            assert int(response.headers["retry-after"]) >= 1
            self.n_told_to_wait += 1
            await asyncio.sleep(_AGAIN_S)

    async def _leave(self, ask: Ask) -> None:
        """Close the socket in the middle of the body, or behind it; with a word to the other side, or without."""
        data, is_cut = ask.data, ask.manner == "leaves in its body"
        head = f"POST {ask.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        _, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode())
        writer.write(data[: int(ask.at * len(data))] if is_cut else data + b"\r\n" * (ask.number % 3))
        with suppress(ConnectionError):
            await writer.drain()
            await asyncio.sleep(ask.at / 10)
            if ask.number % 2:
                writer.transport.abort()
            writer.close()
            await writer.wait_closed()
        self.found.append(Answered(ask))


async def _slowly(data: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(data), 1 + len(data) // 8):
        yield data[at : at + 1 + len(data) // 8]
        await asyncio.sleep(0.01)


async def _read_stream(response: httpx.Response, answered: Answered) -> None:
    n = 0
    async for line in response.aiter_lines():
        if not line.startswith("data: "):
            continue
        answered.read_event(line[6:])
        n += 1
        if answered.ask.manner == "leaves in the answer" and n > answered.ask.n_events:
            return
        if answered.ask.manner == "slow to read":
            await asyncio.sleep(0.01)


# What must be so afterwards


def wrong_answers(model: Model, found: Sequence[Answered]) -> list[str]:
    """Each request that was not answered as it should be: why."""
    told = list[str]()
    for each in found:
        ask = each.ask
        if each.status == 0 or ask.manner == "leaves in the answer":
            continue
        if ask.refusal is not None:
            if each.status != ask.refusal.status or not each.error or not each.error.get("message"):
                told.append(f"{_name(ask)}: status {each.status} instead of {ask.refusal.status}, {each.error}")
        elif each.status != 200 or each.error or not each.is_whole:
            told.append(f"{_name(ask)}: status {each.status}, whole: {each.is_whole}, {each.error}")
        elif difference := _difference(each, expected(model, each)):
            told.append(f"{_name(ask)}: {difference}")
    return told


def _name(ask: Ask) -> str:
    return f"request {ask.number} ({ask.dialect}, {ask.manner}{', streamed' if ask.is_stream else ''})"


def expected(model: Model, answered: Answered) -> list[Completion]:
    """What Python gives for the same words and seed."""
    ask, keywords = answered.ask, dict(answered.ask.keywords)
    if ask.dialect == "completions":
        prompt = keywords.pop("prompt")
        found = model.generate(prompt, **keywords)
        return found if isinstance(found, list) else [found]
    messages = keywords.pop("messages")
    if (
        ask.dialect == "chat" and ask.body["messages"] != messages
    ):  # it goes on: its answers' ids are known to the server
        stream = turn_stream(ask.body["messages"])
        return [model.generate(answered.prompt, rng_stream=stream, **keywords)]
    pieces = model.chat(messages, stream=True, **keywords)
    with suppress(M2liteError):  # JSON that was cut off is an answer here
        for _ in pieces:
            pass
    return [pieces.message.completion]


def _difference(answered: Answered, known: Sequence[Completion]) -> str:
    if answered.ids:
        theirs, ours = answered.ids, [list(each.tokens) for each in known]
        return "" if theirs == ours else f"ids {theirs} instead of {ours}"
    reply = known[0].reply
    told = (answered.thinking.strip(), answered.content.strip(), answered.n_tokens)
    ours = (reply.thinking.strip(), reply.content.strip(), len(known[0].tokens))
    return "" if told == ours else f"{told} instead of {ours}"


def broken_chats(found: Sequence[Answered]) -> list[str]:
    """A question behind an answer is asked of the ids that the answer had."""
    whole = {each.ask.number: each for each in found if each.ask.more and each.is_whole}
    told = list[str]()
    for each in found:
        before = whole.get(each.ask.number)
        if before is not None and each is not before and each.status == 200:
            known = [*before.prompt, *before.ids[0]]
            if each.prompt[: len(known)] != known:
                told.append(f"{_name(each.ask)}: its prompt does not begin with what was said")
    return told


@dataclass(frozen=True)
class Held:
    """What the server's process holds while nobody asks."""

    n_threads: int
    n_files: int

    @classmethod
    def of(cls, pid: int) -> Held:
        process = psutil.Process(pid)
        return cls(process.num_threads(), process.num_fds())

    def is_within(self, other: Held) -> bool:
        # Threads that share a kernel start when they are first needed, which other programs can put off.
        n_late = (os.cpu_count() or 1) - 1
        return self.n_threads <= other.n_threads + n_late and self.n_files <= other.n_files


def left_overs(server: Started, before: Held) -> list[str]:
    """What the server still holds or does."""
    told = list[str]()
    if httpx.get(f"{server.url}/health").json() != {"status": "ok"}:
        told.append("it is not healthy")
    n_all, n_free, n_cached = (server.metric(f"kv_positions{end}") for end in ("", "_free", "_cached"))
    if n_free + n_cached != n_all:
        told.append(f"of {n_all:,.0f} positions {n_free:,.0f} are free and {n_cached:,.0f} cached")
    if server.metric('requests_total{end="failed"}'):
        told.append("answers failed")
    try:
        wait_for(lambda: Held.of(server.pid).is_within(before), "its files and threads to go")
    except Failed:
        told.append(f"it holds {Held.of(server.pid)} instead of {before}")
    return told


def lost_lines(log: str, found: Sequence[Answered]) -> list[str]:
    """Requests whose line is not in the log once; and what may never be there."""
    lines = Counter(re.findall(r"^(req_\w+) ", log, re.MULTILINE))
    told = [
        f"{each.request_id} is {lines[each.request_id]} times in the log"
        for each in found
        if each.request_id and lines[each.request_id] != 1
    ]
    return told + re.findall(r"^.*(?:internal error|Traceback).*$", log, re.MULTILINE)


def own_bytes(process: psutil.Process) -> int:
    """Resident memory without the pages of files: more of the model's come in as long as new experts are chosen."""
    found = process.memory_info()
    return int(found.rss - found.shared)


def grown(resident: Sequence[int]) -> int:
    """Bytes by which the last tenth lies above the tenth before the middle; medians, since bodies come and go."""
    half, tenth = len(resident) // 2, max(1, len(resident) // 10)
    return int(median(resident[-tenth:]) - median(resident[half - tenth : half]))


def storm(folder: Path, n_requests: int, seed: int) -> tuple[Storm, list[str]]:
    """Start a server, let it pass, end it; what came, and what is wrong."""
    model = locate_model(None)
    server = Started(folder, model, "--ctx", str(CONTEXT), "--parallel", str(PARALLEL), "--queue", str(QUEUE))
    server.start()
    try:
        passed = Storm(server)
        asks = plan(n_requests, seed)
        # One of each kind first: what they load stays.
        kinds = {(ask.dialect, ask.is_stream, ask.manner): ask for ask in plan(300, seed + 1)}
        asyncio.run(Storm(server).run(list(kinds.values()), 1))
        wait_until_idle(server)
        before = Held.of(server.pid)
        asyncio.run(passed.run(asks, CONNECTIONS))
        wait_until_idle(server)
        wrong = left_overs(server, before)
    finally:
        code = server.stop()
    if code != 143:
        wrong.append(f"it ended with {code}")
    if n_requests >= LONG and grown(passed.resident) > MOST_GROWN:
        wrong.append(f"its memory grew by {grown(passed.resident):,} bytes in the second half")
    wrong += lost_lines(server.log(0), passed.found) + broken_chats(passed.found)
    with Model.open(model, ctx=CONTEXT) as opened:
        wrong += wrong_answers(opened, passed.found)
    return passed, wrong


def wait_until_idle(server: Started) -> None:
    for name in ("requests_processing", "requests_deferred"):
        wait_for(lambda name=name: not server.metric(name), "the end of what is asked")  # type: ignore[misc]
    process = psutil.Process(server.pid)
    wait_for(lambda: {each.status for each in process.net_connections("tcp")} == {"LISTEN"}, "the end of connections")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.serve.storm", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="m2lite-storm-") as folder:
        passed, wrong = storm(Path(folder), options.requests, options.seed)
    seconds = time.monotonic() - began
    counts = Counter(each.ask.manner for each in passed.found)
    print(f"{len(passed.found):,} requests in {seconds:.0f} s: {', '.join(f'{n} {how}' for how, n in counts.items())}")
    print(
        f"{sum(each.is_whole for each in passed.found):,} whole answers; {passed.n_told_to_wait:,} times told to wait"
    )
    tenths = [passed.resident[n * len(passed.resident) // 10] / 1e6 for n in range(10)]
    print("MB of its own after each tenth: " + " ".join(f"{mb:.1f}" for mb in tenths))
    print(f"grown in the second half: {grown(passed.resident) / 1e6:.2f} MB")
    print("\n".join(wrong) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
