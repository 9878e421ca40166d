"""Kernels that threads share: from the function of one part, one that does all of them. Sees no kernel's meaning.

A part is part(i, n, *args): share i of n. A chunk is part(i, n, thread, after, *args), where thread numbers what it may
use of scratch; there are several for each thread (tuning.py), and whoever is done takes the next: a slow core delays
nobody for long. It takes it one chunk ahead: `after` is the thread's next one, whose memory the chunk can ask for (n or
more: there is none).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import prange
from numba.core import types

from m2lite.simd import emit, jit, tuning
from m2lite.simd.far import Called, Far, far, operation_of
from m2lite.simd.jit import kernel, specialise
from m2lite.simd.kinds import int64, void
from m2lite.simd.memory import scratch, take_number, write_i64
from m2lite.simd.vectors import operation


@operation(void(*[int64] * 6))
def call_share(
    builder: ir.IRBuilder, function: ir.Value, i: ir.Value, n: ir.Value, thread: ir.Value, after: ir.Value,
    args: ir.Value,
) -> None:  # fmt: skip
    """Call what does a share of a kernel's work at address `function`."""
    emit.call_address(builder, function, [i, n, thread, after, args])


@far(parallel=True)
def region(share: int, n_threads: int, n_shares: int, args: int) -> None:
    """Call share(i, n_shares, thread, after, args) for each i: thread i does share i, then all take what is left."""
    counter = scratch(1)
    write_i64(counter, n_threads)
    for thread in prange(n_threads):
        i = thread + 0  # Numba: the loop's own number may not change
        while i < n_shares:
            after = take_number(counter)
            call_share(share, i, n_shares, thread, after, args)
            i = after


split: Callable[..., None]  # `specialise` fills it in


def _whole(n_parts: int, *args: Any) -> None:
    split(n_parts, *args)


class Split(Called):
    """A kernel of parts, as kernel(n_parts, *args): one call for all of it, or a parallel region.

    `in_chunks`: the threads take chunks instead. `end`: called behind a region, as end(n, *args).
    """

    def __init__(self, part: Far, *, in_chunks: bool = False, end: Far | None = None) -> None:
        self.part, self._end = part, end
        self.parts = [part] if end is None else [part, end]
        self._in_chunks, self._alone = in_chunks, [0, 1, 0, 1] if in_chunks else [0, 1]
        n_own = len(self._alone)
        self._kinds = part.kinds[n_own:]
        signature = types.void(types.int64, *self._kinds)
        self.operation = operation_of(signature, ["n_parts", *part.names[n_own:]], self._build)
        # The name is what tells functions of one template apart in the cache.
        name = "_".join([*(each.symbol for each in self.parts), *(["in_chunks"] if in_chunks else [])])
        self._whole = kernel(specialise(_whole, name.replace(".", "_"), split=self))

    def __call__(self, n_parts: int, *args: Any) -> None:
        assert 1 <= n_parts <= jit.n_threads(), n_parts  # callers keep scratch for as many
        if n_parts == 1:
            self.part(*self._alone, *args)
        else:
            self._whole(n_parts, *args)

    def _build(self, builder: Any, n_parts: Any, *args: Any) -> None:
        with builder.if_else(builder.icmp_signed("==", n_parts, emit.I64(1))) as (alone, together):
            with alone:
                self.part.call(builder, *(emit.I64(i) for i in self._alone), *args)
            with together:
                n_shares = builder.mul(n_parts, tuning.load(builder, "chunks")) if self._in_chunks else n_parts
                region.call(builder, self._share(builder.module), n_parts, n_shares, emit.packed(builder, args))
                if self._end is not None:
                    self._end.call(builder, n_parts, *args)

    def _share(self, module: Any) -> Any:
        """The address of share(i, n, thread, after, args), which calls the part with arguments that lie at `args`."""
        function, is_new = emit.own_function(module, f"{self.part.symbol}.share", 5)
        if is_new:
            builder, (*own, at) = ir.IRBuilder(function.append_basic_block()), function.args
            args = emit.unpacked(builder, at, [emit.F32 if kind == types.float32 else emit.I64 for kind in self._kinds])
            self.part.call(builder, *own[: len(self._alone)], *args)
            builder.ret_void()
        return function.ptrtoint(emit.I64)
