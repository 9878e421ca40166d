"""Kernels that threads share: from the function of one part, the forms that are called. Sees no kernel's meaning.

A part is part(i, n, *args): share i of n. A chunk is part(i, n, thread, *args), where thread numbers what it may use
of scratch; there are CHUNKS of them for each thread, and whoever is done takes the next.
"""

from __future__ import annotations

from typing import Any

from numba import prange

from m2lite.kernels import jit
from m2lite.kernels.jit import kernel, specialise
from m2lite.kernels.simd import scratch, take_number, write_i64

CHUNKS = 8  # per thread: a slow core delays nobody for long

# Names that `specialise` fills in: the templates below see them as globals.
part: Any = None
end: Any = None
parallel: Any = None
one_share: Any = None  # what a part is told that does all of the work alone


def _parts(n_parts, *args):  # type: ignore[no-untyped-def]
    for i in prange(n_parts):
        part(i, n_parts, *args)


def _parts_to_end(n_parts, *args):  # type: ignore[no-untyped-def]
    for i in prange(n_parts):
        part(i, n_parts, *args)
    end(n_parts, *args)


def _chunks(n_parts, *args):  # type: ignore[no-untyped-def]
    counter, n_chunks = scratch(1), n_parts * CHUNKS
    write_i64(counter, 0)
    for thread in prange(n_parts):
        chunk = take_number(counter)
        while chunk < n_chunks:
            part(chunk, n_chunks, thread, *args)
            chunk = take_number(counter)


def _shared(n_parts, *args):  # type: ignore[no-untyped-def]
    if n_parts == 1:
        part(*one_share, *args)
    else:
        parallel(n_parts, *args)


class Split:
    """A kernel in two compiled forms: one call for all of it, or a parallel region with a part per thread.

    `in_chunks`: the threads take chunks instead. `end`: called behind a region, as end(n, *args).
    """

    def __init__(self, part: Any, *, in_chunks: bool = False, end: Any = None) -> None:
        # The name is what tells functions of one template apart in Numba's cache.
        name = f"{part.__module__}.{part.__name__}".replace(".", "_")
        region, one_share = (_chunks, (0, 1, 0)) if in_chunks else (_parts_to_end if end else _parts, (0, 1))
        self.part, self._one_share = part, one_share
        self.parallel = kernel(specialise(region, f"{name}_parallel", part=part, end=end), parallel=True)
        forms = {"part": part, "parallel": self.parallel, "one_share": one_share}
        self.compiled = kernel(specialise(_shared, f"{name}_shared", **forms))  # for other kernels to call

    def __call__(self, n_parts: int, *args: Any) -> None:
        assert 1 <= n_parts <= jit.n_threads(), n_parts  # callers keep scratch for as many
        if n_parts == 1:
            self.part(*self._one_share, *args)
        else:
            self.parallel(n_parts, *args)
