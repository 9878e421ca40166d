"""What differs between machines and changes no bit: a table of parameters, and the memory in which kernels read them.

Compiled code holds the name of that memory, not its values: it is the same code for all of them, but for `first_cache`,
whose instruction is another one. Knows no kernel and no file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir

WORKS = ("decode", "prompt")  # that are timed


class Parameter(NamedTuple):
    """A row of the table; `works` are those that show its effect."""

    name: str
    default: int
    values: tuple[int, ...]  # that are tried, and no others are believed
    about: str
    works: tuple[str, ...] = WORKS
    beside: Mapping[str, tuple[int, ...]] = MappingProxyType({})  # other parameters' values, tried with these


_TABLE = (
    Parameter("tiles_ahead", 2, (0, 1, 2, 3, 4, 6, 8), "tiles of 16 rows of weights that are asked for ahead"),
    Parameter(
        "first_cache", 0, (0, 1), "whether they are asked for into the first cache, else into the second",
        beside={"tiles_ahead": (1,)},
    ),
    Parameter("chunks", 16, (1, 2, 4, 8, 16, 32), "shares of a product for each thread"),
    Parameter("rows_at_once", 128, (64, 128, 256, 512), "rows that meet a part of a matrix: whole groups", ("prompt",)),
    Parameter(
        "alone_macs", 300_000, (30_000, 100_000, 300_000, 1_000_000, 3_000_000),
        "multiply-adds below which one thread works alone (15 us): a parallel region costs some too", ("decode",),
    ),
    Parameter("threads_percent", 100, (25, 50, 75, 100), "threads per core, where no number is asked for"),
)  # fmt: skip
PARAMETERS = {row.name: row for row in _TABLE}
DEFAULTS = {row.name: row.default for row in _TABLE}

_I64 = ir.IntType(64)
_SYMBOL = "m2lite.tuning"
_INDEX = {row.name: i for i, row in enumerate(_TABLE)}
_memory = (ctypes.c_int64 * len(_TABLE))(*DEFAULTS.values())
llvm.add_symbol(_SYMBOL, ctypes.addressof(_memory))


class ValuesInForce(MutableMapping[str, int]):
    """The values in force in this process, by name; one that is deleted is the default again."""

    def __getitem__(self, name: str) -> int:
        return _memory[_INDEX[name]]

    def __setitem__(self, name: str, value: int) -> None:
        _memory[_INDEX[name]] = value

    def __delitem__(self, name: str) -> None:
        self[name] = DEFAULTS[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_INDEX)

    def __len__(self) -> int:
        return len(_INDEX)


VALUES = ValuesInForce()


def use(values: Mapping[str, int]) -> None:
    """These are in force from now on, and the defaults of all others."""
    VALUES.update(DEFAULTS | dict(values))


def n_threads(n_cores: int) -> int:
    """Threads that a process uses which asks for none."""
    return share_of(n_cores, VALUES["threads_percent"])


def share_of(n_cores: int, percent: int) -> int:
    return max(1, n_cores * percent // 100)


def load(builder: ir.IRBuilder, name: str) -> ir.Value:
    """Emit a read of the value in force."""
    module = builder.module
    if _SYMBOL not in module.globals:
        ir.GlobalVariable(module, ir.ArrayType(_I64, len(_TABLE)), _SYMBOL)
    place = [ir.Constant(_I64, 0), ir.Constant(_I64, _INDEX[name])]
    return builder.load(builder.gep(module.globals[_SYMBOL], place))
