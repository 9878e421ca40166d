"""The first token after a restart, when a long beginning comes from a cold disk; and of a second request in memory.

    python benchmarks/restart.py SLICE.gguf [-p 16384] [-n 64] [-r 5]

The pages of a prompt of P random ids are on disk (a few are computed, the others are copies). In each round the files
are dropped from the page cache and read one after the other, which is the plain reading time, and dropped again; a
server is started and asked for the same P ids with N new ones behind them, and once more, with other N, when the P
are in memory. Beside each, the same N in an open session at that depth. Seconds to the first token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from m2lite import Model, Sampling
from m2lite.bench import fill, random_ids
from m2lite.engine.kv_disk import kv_dir
from m2lite.engine.session import Session
from m2lite.system.paths import user_dir
from runs import drop
from serve_clients import Server, first_token, free_port

_ROOM = 512  # positions beside the prompt
_PIECE = 1 << 20  # bytes of a read


def kernels() -> Path:
    """Where compiled kernels stay, wherever pages go."""
    return Path(os.environ.get("M2LITE_CACHE_DIR") or user_dir("cache"))


def start(slice: Path, ctx: int) -> Server:
    port = free_port()
    argv = [sys.executable, "-m", "m2lite", "serve", str(slice), "--port", str(port), "--ctx", str(ctx)]
    server = Server("m2lite-restart", [*argv, "--parallel", "1", "--draft", "off", "--tuning", "off"], port)
    server.wait()
    return server


def read_all(files: Sequence[Path]) -> float:
    """Seconds to read the files, one after the other."""
    into = memoryview(bytearray(_PIECE))
    began = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(into):
                pass
    return time.perf_counter() - began


def pages() -> list[Path]:
    """Of all prompts, in the order in which they were written."""
    return sorted(kv_dir().glob("*/*.page"), key=lambda path: path.stat().st_mtime_ns)


def own(session: Session, long: list[int], tail: list[int]) -> float:
    """Seconds to the first token behind `tail`, in an open session that holds `long`."""
    session.set_tokens(long)
    began = time.perf_counter()
    list(session.generate(tail, max_tokens=1, sampling=Sampling(0, seed=0), ignore_stop=True))
    return time.perf_counter() - began


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slice", type=Path)
    parser.add_argument("-p", "--prompt", type=int, default=16384)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="m2lite-restart-") as folder:
        os.environ["M2LITE_CACHE_DIR"] = str(kernels())
        os.environ["XDG_CACHE_HOME"] = folder
        measure(args)


def measure(args: argparse.Namespace) -> None:
    ctx = args.prompt + _ROOM
    with Model.open(args.slice, ctx=ctx, draft="off", tuning=False) as model, model.session() as session:
        long = fill(model, args.prompt)
        model.use_disk(1 << 40)
        model.loop.save(long)
        model.loop.prefix_cache.disk = None
        files = pages()
        n_bytes = sum(path.stat().st_size for path in files)
        print(f"{args.prompt:,} tokens: {len(files):,} files, {n_bytes / 1e6:,.0f} MB; {args.n} new tokens; seconds")
        print("round  plain read  after a restart  in an open session  second request  in an open session", flush=True)
        rows = list[list[float]]()
        for n in range(args.rounds):
            drop(files)
            row = [read_all(files)]
            drop(files)
            server = start(args.slice, ctx)
            for seed in (2 * n + 2, 2 * n + 3):
                tail = random_ids(model, args.n, seed)
                row += [asyncio.run(first_token(server, [*long, *tail])), own(session, long, tail)]
            server.close()
            rows.append(row)
            print(f"{n + 1:>5}" + "".join(f"{s:>16.3f}" for s in row), flush=True)
    read_s, first, own_s, second, again = (statistics.median(column) for column in zip(*rows, strict=True))
    more = statistics.median(row[1] - row[2] - row[0] for row in rows)
    print(f"after a restart: {first:.3f} s; an open session's {own_s:.3f} + plain reading {read_s:.3f} + {more:.3f} s")
    print(f"second request: {second:.3f} s, {second / again:.3f} x of the open session's {again:.3f} s")


if __name__ == "__main__":
    main()
