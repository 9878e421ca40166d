"""What a server costs beside its model: the share of HTTP while many answers stream, and of a core while nobody asks.

    python benchmarks/server_share.py SLICE.gguf [-c 16] [-n 64] [--idle 30]

Processor time of the server's threads, from /proc: the first one answers HTTP, the others compute.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

from serve_clients import Server, free_port, gaps, prompt

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def seconds_of_threads(pid: int) -> dict[int, float]:
    """Processor seconds that each thread has used."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        found[int(task.name)] = (int(fields[11]) + int(fields[12])) * _TICK_S
    return found


def bytes_of_disk(pid: int) -> int:
    """Bytes that it read from disks and wrote to them."""
    lines = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(lines["read_bytes"]) + int(lines["write_bytes"])


async def streams(server: Server, n_clients: int, n: int, seed: int) -> None:
    """So many streamed answers at once."""
    await asyncio.gather(*(gaps(server, prompt(64, seed + i), n) for i in range(n_clients)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", type=Path)
    parser.add_argument("-c", "--clients", type=int, default=16)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--idle", type=float, default=30.0, metavar="SECONDS")
    args = parser.parse_args()
    port = free_port()
    options = ["--port", str(port), "--ctx", "1k", "--parallel", str(args.clients), "--kv-disk", "0"]
    options += ["--tuning", "off"]
    server = Server("m2lite", [sys.executable, "-m", "m2lite", "serve", str(args.slice), *options], port)
    pid = server.process.pid
    try:
        server.wait()
        asyncio.run(streams(server, args.clients, 8, 0))
        before, began = seconds_of_threads(pid), time.perf_counter()
        asyncio.run(streams(server, args.clients, args.n, 1000))
        wall, after = time.perf_counter() - began, seconds_of_threads(pid)
        used = {thread: s - before.get(thread, 0.0) for thread, s in after.items()}
        http, total = used[pid], sum(used.values())
        print(
            f"{args.clients} streams of {args.n} tokens: {wall:.1f} s; HTTP {http:.2f} of {total:.2f} processor"
            f" seconds, {http / total:.1%}; {http / wall:.1%} of the time"
        )
        before, disk = seconds_of_threads(pid), bytes_of_disk(pid)
        time.sleep(args.idle)
        idle = sum(seconds_of_threads(pid).values()) - sum(before.values())
        print(
            f"idle for {args.idle:.0f} s: {idle / args.idle:.2%} of a core,"
            f" {bytes_of_disk(pid) - disk:,} bytes read and written"
        )
    finally:
        server.close()


if __name__ == "__main__":
    main()
