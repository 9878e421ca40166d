"""What a model needs is compiled before its first call, by several processes at once. Knows formats and no model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core.types import UniTuple, float32, float64, int64, uint64

from m2lite.kernels import amx, draw, fast, layer, ngram
from m2lite.kernels.dot import activation_kind, tile_address, unpack_address
from m2lite.simd import cache, jit
from m2lite.simd.claims import CLOCK, claims_in
from m2lite.simd.far import Far
from m2lite.simd.split import Split, region
from m2lite.simd.tuning import VALUES

Progress = Callable[[int, int], None]  # how many of how many are ready
_WORTH_S = 0.2  # of compiling, behind which another process is started


class Needs(NamedTuple):
    """What decides which kernels a model calls."""

    formats: list[str]  # of its matrices
    embedding: str
    kv: str
    has_modules: bool
    is_streamed: bool
    may_use_amx: bool
    first_cache: int = 0  # as tuning.py has it


def units(needs: Needs) -> dict[str, Callable[[], Any]]:
    """What compiles a kernel, or loads it, by name; each may call those before it, and the longest come first."""
    found: dict[str, Callable[[], Any]] = {"attend_page": partial(fast.attend_address, needs.kv)}
    for name in needs.formats:
        found[f"tile {name}"] = partial(tile_address, name, activation_kind(name))
    found["unpack"] = partial(unpack_address, needs.embedding)
    for name in fast.__all__:
        kernel = getattr(fast, name)
        for part in kernel.parts if isinstance(kernel, Split) else [kernel]:
            if isinstance(part, Far):
                found[part.symbol] = part.define
    found[region.symbol] = region.define
    for function, signature in _others():
        found[function.__name__] = partial(function.compile, signature)
    unused = set() if needs.is_streamed else {"experts", "add_experts"}
    for name, signature in _steps().items():
        if name not in unused and (needs.has_modules or name != "join"):
            found[f"step {name}"] = partial(getattr(fast.steps, name).compile, signature)
    return found


def _others() -> list[tuple[Any, tuple[Any, ...]]]:
    logits = float32[::1]
    options = (int64, float64, float64, float64, uint64, uint64, uint64)
    return [
        (draw.draw_top_k, (logits, *options)), (draw.choose_largest, (logits,)), (ngram.push_one, (int64,) * 2),
        (ngram.push_all, (int64,) * 4), (ngram.guess, (int64,) * 3),
    ]  # fmt: skip


def _steps() -> dict[str, tuple[Any, ...]]:
    """The types with which Python calls the steps."""
    records = (layer.LAYER, layer.SCRATCH, layer.PLACES, layer.MATRIX, layer.MODULE)
    weights, scratch, places, matrix, module = (numba.typeof(np.zeros(1, record)) for record in records)
    team = UniTuple(int64, 2)
    return {
        "project": (team, weights, scratch, places, *[int64] * 2), "attend_rows": (team, scratch, places, *[int64] * 4),
        "choose": (team, weights, scratch, int64), "experts": (team, weights, scratch, *[int64] * 6),
        "add_experts": (team, scratch, *[int64] * 3), "run_experts": (team, weights, scratch, *[int64] * 6),
        "layer": (team, weights, scratch, places, *[int64] * 3), "product": (team, matrix, scratch, *[int64] * 4),
        "join": (team, module, scratch, *[int64] * 3),
    }  # fmt: skip


def prepare(needs: Needs, n_processes: int, check: Callable[[], None], progress: Progress | None = None) -> None:
    """Compile all that is needed, or load it. Others that prepare the same at the same time do a share of it.

    `progress` is called once it has taken a second, and from then on; `check` may raise between kernels.
    """
    helpers = list[subprocess.Popen[bytes]]()

    def start_others() -> None:
        with suppress(OSError):  # then there are fewer
            for _ in range(n_processes - 1):
                helpers.append(_start(needs))

    def say() -> None:
        if progress is not None and CLOCK.seconds >= jit.LONG_S:
            progress(n_all - len(left), n_all)

    def look_up() -> None:
        check()
        say()

    left = units(needs)
    n_all = len(left)
    CLOCK.restart((_WORTH_S, start_others), (jit.LONG_S, say))
    try:
        _do_share(left, look_up)
        for name in list(left):  # others are at it
            left[name]()
            del left[name]
            look_up()
    finally:
        CLOCK.restart()  # what is compiled later is nobody's to share
        for helper in helpers:
            assert helper.stdin is not None
            helper.stdin.close()  # which ends it
            helper.wait()


def _do_share(left: dict[str, Callable[[], Any]], look_up: Callable[[], None]) -> None:
    """Compile, or load, what nobody else is compiling now, and leave the rest."""
    claims = claims_in(jit.CACHE_DIR)
    for name in list(left):
        if claims.take(f"unit {name}"):
            try:
                left[name]()
            finally:
                claims.release(f"unit {name}")
            del left[name]
            look_up()


def _start(needs: Needs) -> subprocess.Popen[bytes]:
    """A process that does a share and ends, with us or before us. It is not the terminal's, and so not Ctrl-C's."""
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from m2lite.kernels.ahead import work; work()"
    package = str(Path(__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, json.dumps([package, *sys.path]), json.dumps(needs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def work() -> None:
    """What such a process does."""

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        with cache.SAVING:  # nothing is left half written
            os._exit(0)

    threading.Thread(target=end_with_parent, daemon=True).start()
    needs = Needs(*json.loads(sys.argv[2]))
    amx.allow(needs.may_use_amx)
    VALUES["first_cache"] = needs.first_cache
    _do_share(units(needs), lambda: None)
