"""Servers side by side: many clients at once, a common beginning, a long prompt beside a running answer.

    python benchmarks/serve_clients.py SLICE.gguf --llama path/to/llama-server [-c 1,4,8,16] [-p 128] [-n 64] [-r 5]
    python benchmarks/serve_clients.py SLICE.gguf --long 16384 [-r 3]

The first: both servers stay open, and in each round each is asked in turn by so many clients at once, each with a
prompt of P random ids of its own and N tokens of answer; tokens of answers a second, from the first request to the last
answer, and the median of the rounds' ratios. The second, of ours alone: the gaps between the tokens of a running
answer, alone and while another's long prompt is read; how much later a short request's first token comes; and how long
the second request with the same long beginning takes to its first token.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx

_VOCAB = (1000, 30000)  # ids of random prompts
_LOAD_S = 600


class Server:
    """A server in a process of its own."""

    def __init__(self, name: str, argv: Sequence[str], port: int) -> None:
        self.name, self.base = name, f"http://127.0.0.1:{port}"
        self.log = Path(f"/tmp/{name}-{port}.log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, stdout=log, stderr=log)

    def wait(self) -> None:
        until = time.monotonic() + _LOAD_S
        while time.monotonic() < until:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended:\n{self.log.read_text()[-2000:]}")
            try:
                if httpx.get(f"{self.base}/health").status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.2)
        sys.exit(f"{self.name} is not ready after {_LOAD_S} s.")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def prompt(n: int, seed: int) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(*_VOCAB) for _ in range(n)]


def body(ids: list[int], n: int, stream: bool = False) -> dict[str, Any]:
    return {"prompt": ids, "max_tokens": n, "temperature": 0, "stream": stream, "cache_prompt": True}


async def ask(client: httpx.AsyncClient, server: Server, ids: list[int], n: int) -> int:
    answer = await client.post(f"{server.base}/v1/completions", json=body(ids, n))
    answer.raise_for_status()
    return int(answer.json()["usage"]["completion_tokens"])


async def together(server: Server, n_clients: int, n_prompt: int, n: int, seed: int) -> float:
    """Tokens of answers a second."""
    async with httpx.AsyncClient(timeout=None) as client:
        prompts = [prompt(n_prompt, 1000 * seed + i) for i in range(n_clients)]
        began = time.perf_counter()
        counts = await asyncio.gather(*(ask(client, server, ids, n) for ids in prompts))
        seconds = time.perf_counter() - began
    assert sum(counts) == n * n_clients, counts
    return n * n_clients / seconds


async def tokens(server: Server, ids: list[int], n: int) -> AsyncIterator[float]:
    """The seconds from the request to each event with text."""
    async with httpx.AsyncClient(timeout=None) as client:  # which takes 0.05 s to make
        began = time.perf_counter()
        url = f"{server.base}/v1/completions"
        async with client.stream("POST", url, json=body(ids, n, stream=True)) as answer:
            answer.raise_for_status()
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                    yield time.perf_counter() - began


async def gaps(server: Server, ids: list[int], n: int) -> list[float]:
    times = [at async for at in tokens(server, ids, n)]
    return [b - a for a, b in itertools.pairwise(times)]


async def first_token(server: Server, ids: list[int]) -> float:
    return min([seconds async for seconds in tokens(server, ids, 2)])


async def beside_long(server: Server, n_long: int, seed: int) -> dict[str, float]:
    """Seconds, of one round."""
    alone = await gaps(server, prompt(64, seed), 96)
    short_alone = await first_token(server, prompt(64, seed + 1))
    long = prompt(n_long, seed + 2)
    reading = asyncio.create_task(first_token(server, long))
    running = asyncio.create_task(gaps(server, prompt(64, seed + 3), 96))
    await asyncio.sleep(1.0)
    short_beside = await first_token(server, prompt(64, seed + 4))
    beside, read_s = await running, await reading
    again = await first_token(server, [*long, *prompt(64, seed + 5)])
    return {
        "gap": statistics.median(alone),
        "gap beside": statistics.median(beside),
        "p99": statistics.quantiles(alone, n=100)[98],
        "p99 beside": statistics.quantiles(beside, n=100)[98],
        "short": short_alone,
        "short beside": short_beside,
        "long": read_s,
        "long again, 64 new": again,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", type=Path)
    parser.add_argument("--llama", help="llama-server's path")
    parser.add_argument("-c", "--clients", default="1,4,8,16")
    parser.add_argument("-p", "--prompt", type=int, default=128)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--long", type=int, help="tokens of a long prompt; of ours alone")
    args = parser.parse_args()
    counts = [int(c) for c in args.clients.split(",")]
    most, port = max(counts), free_port()
    ctx = (args.long or args.prompt) + 512
    ours = [sys.executable, "-m", "m2lite", "serve", str(args.slice), "--port", str(port), "--ctx", str(ctx)]
    servers = [Server("m2lite", [*ours, "--parallel", str(most), "--kv-disk", "0", "--tuning", "off"], port)]
    if args.llama:
        port = free_port()
        sizes = ["-c", str(ctx * most), "-np", str(most), "-t", "2", "-tb", "2", "-cb"]
        servers.append(Server("llama-server", [args.llama, "-m", str(args.slice), "--port", str(port), *sizes], port))
    try:
        for server in servers:
            server.wait()
        if args.long:
            for r in range(args.rounds):
                found = asyncio.run(beside_long(servers[0], args.long, 100 * r))
                print("  ".join(f"{name} {1000 * s:,.0f} ms" for name, s in found.items()), flush=True)
            return
        for server in servers:
            asyncio.run(together(server, 1, args.prompt, 8, 0))
        for n_clients in counts:
            speeds = [
                [asyncio.run(together(s, n_clients, args.prompt, args.n, 1 + r)) for s in servers]
                for r in range(args.rounds)
            ]
            medians = [statistics.median(column) for column in zip(*speeds, strict=True)]
            line = f"{n_clients:3} clients: " + ", ".join(
                f"{s.name} {m:.1f} tok/s" for s, m in zip(servers, medians, strict=True)
            )
            if args.llama:
                ratios = [a / b for a, b in speeds]
                line += f", ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(line, flush=True)
    finally:
        for server in servers:
            server.close()


if __name__ == "__main__":
    main()
