"""Kernels that others call by address: each is compiled once, whoever calls it. Sees signatures, no kernel's meaning.

Numba links what a kernel calls into it and optimises it again, at every level. Code that calls a `Far` holds a name
instead; the cache knows which names a kernel's code holds, and has them defined before it loads that code.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import llvmlite.binding as llvm
from numba.core import types
from numba.core.registry import cpu_target

from m2lite.simd import cache, emit
from m2lite.simd.jit import address_of
from m2lite.simd.vectors import operation

_C_TYPES: dict[Any, Any] = {types.int64: ctypes.c_int64, types.float32: ctypes.c_float, types.void: None}
_LLVM_TYPES = {types.int64: emit.I64, types.float32: emit.F32, types.void: emit.VOID}


def operation_of(signature: Any, names: list[str], build: Callable[..., Any]) -> Any:
    """`operation` for a build(builder, *values) whose arguments have these names."""

    def build_named(builder: Any, *values: Any) -> Any:
        return build(builder, *values)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    named = inspect.Signature([inspect.Parameter(name, kind) for name in ("builder", *names)])
    build_named.__signature__ = named  # type: ignore[attr-defined]
    return operation(signature)(build_named)


class Called:
    """What kernels call as `self.operation`."""

    operation: Any

    @property
    def _numba_type_(self) -> Any:
        """Numba asks for it when it meets the object among a kernel's globals."""
        return cpu_target.typing_context.resolve_value_type(self.operation)


class Far(Called):
    """A kernel of one signature, for Python and for other kernels: see `far`."""

    def __init__(self, function: Callable[..., Any], returns: Any, kinds: dict[str, Any], parallel: bool) -> None:
        self.function, self._parallel = function, parallel
        self.names = list(inspect.signature(function).parameters)
        self.kinds = [kinds.get(name, types.int64) for name in self.names]
        self.signature = returns(*self.kinds)
        self.symbol = f"{function.__module__}.{function.__qualname__}"
        self.operation = operation_of(self.signature, self.names, self.call)
        cache.SYMBOLS[self.symbol] = self.define

    def call(self, builder: Any, *values: Any) -> Any:
        """Emit a call; nothing but a name of this kernel gets into the caller's code."""
        self.define()
        value = emit.call_llvm(builder, self.symbol, _LLVM_TYPES[self.signature.return_type], list(values))
        return None if self.signature.return_type == types.void else value

    @cached_property
    def address(self) -> int:
        """Compiled, or from the cache, when it is first asked for."""
        address = address_of(self.function, self.signature, parallel=self._parallel)
        llvm.add_symbol(self.symbol, address)
        return address

    def define(self) -> None:
        """The name has its address for code that is loaded from now on."""
        _ = self.address

    @cached_property
    def _entry(self) -> tuple[Any, list[Any]]:
        result, *kinds = (_C_TYPES[kind] for kind in (self.signature.return_type, *self.kinds))
        plain = [float if kind == types.float32 else int for kind in self.kinds]
        return ctypes.CFUNCTYPE(result, *kinds)(self.address), plain  # which lets other threads go on

    def __call__(self, *args: Any) -> Any:
        entry, plain = self._entry
        return entry(*[kind(arg) for kind, arg in zip(plain, args, strict=True)])


def far(*, returns: Any = types.void, parallel: bool = False, **kinds: Any) -> Callable[[Callable[..., Any]], Far]:
    """Make a function a kernel that is called by address: its arguments are int64, but for those of `kinds`."""
    return lambda function: Far(function, returns, kinds, parallel)
