"""Keeps the process alive where a mapped file was cut or its disk fails. Knows addresses, not what they hold.

To touch a mapped page that the file does not have any more is a signal, SIGBUS, which ends a process without a word. A
handler puts zeros in place of the rest of the mapping and counts; whoever computes asks afterwards whether what it saw
was the file (GGUFFile.check_unchanged), and throws away what it made of zeros. It is machine code, made by LLVM: Python
would only run its handlers after the instruction that cannot go on. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import sys
import threading
from typing import Any

import numpy as np

_MOST = 1024  # mappings at once; those beyond are not guarded
# start and end of a mapping, how often it was touched in vain, and 1 where nobody will ask for that any more
_table = np.zeros((_MOST, 4), np.int64)
_START, _END, _COUNT, _UNASKED = range(4)
_WORDS = b"m2lite: a file that was open was cut, or its disk fails: start again with the file as it is now.\n"
_EXIT_BAD_FILE = 4
_lock = threading.Lock()
_kept: list[Any] = []  # the code, once it is installed


class Guard:
    """One mapping, from now until `release`."""

    def __init__(self, address: int, n_bytes: int) -> None:
        self._row: int | None = None
        with _lock:
            if not _kept:
                _kept.append(_install() if sys.platform == "linux" else None)
            free = np.flatnonzero(_table[:, _END] == 0)
            if len(free):
                self._row = int(free[0])
                _table[self._row] = (address, address + n_bytes, 0, 0)

    @property
    def n_faults(self) -> int:
        """How often something was read that was not there: zeros came instead."""
        return 0 if self._row is None else int(_table[self._row, _COUNT])

    def leave(self) -> None:
        """Nobody asks any more, though views are alive: from now on a fault ends the process, with a word."""
        if self._row is not None:
            _table[self._row, _UNASKED] = 1

    def release(self) -> None:
        """The mapping is gone; a second time does nothing."""
        if self._row is not None:
            row, self._row = self._row, None
            _table[row] = 0


class _Action(ctypes.Structure):
    """struct sigaction, of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p), ("mask", ctypes.c_ulong * (1024 // 8 // ctypes.sizeof(ctypes.c_ulong))),
        ("flags", ctypes.c_int), ("restorer", ctypes.c_void_p),
    )  # fmt: skip


_SA_SIGINFO, _SA_RESTART = 4, 0x10000000
_OFFSET_OF_ADDRESS = 16  # in siginfo_t
_ZEROS = 0x4032  # MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE

_CODE = """
define void @on_bus(i32 %signal, ptr %info, ptr %context) {{
entry:
  %where = getelementptr i8, ptr %info, i64 {offset}
  %fault = load i64, ptr %where
  %page = and i64 %fault, {page_mask}
  br label %next
next:
  %i = phi i64 [ 0, %entry ], [ %following, %other ]
  %at_end = icmp eq i64 %i, {most}
  br i1 %at_end, label %foreign, label %look
look:
  %row = getelementptr [4 x i64], ptr inttoptr (i64 {table} to ptr), i64 %i
  %start = load volatile i64, ptr %row
  %end_at = getelementptr i64, ptr %row, i64 1
  %end = load volatile i64, ptr %end_at
  %is_behind = icmp uge i64 %fault, %start
  %is_before = icmp ult i64 %fault, %end
  %is_ours = and i1 %is_behind, %is_before
  br i1 %is_ours, label %ours, label %other
other:
  %following = add i64 %i, 1
  br label %next
ours:
  %count_at = getelementptr i64, ptr %row, i64 2
  %before = atomicrmw add ptr %count_at, i64 1 seq_cst
  %unasked_at = getelementptr i64, ptr %row, i64 3
  %unasked = load volatile i64, ptr %unasked_at
  %is_asked = icmp eq i64 %unasked, 0
  br i1 %is_asked, label %fill, label %leave
fill:
  %size = sub i64 %end, %page
  %to = inttoptr i64 %page to ptr
  %got = call ptr inttoptr (i64 {mmap} to ptr)(ptr %to, i64 %size, i32 1, i32 {zeros}, i32 -1, i64 0)
  %failed = icmp ne ptr %got, %to
  br i1 %failed, label %leave, label %done
done:
  ret void
leave:
  %n = call i64 inttoptr (i64 {write} to ptr)(i32 2, ptr inttoptr (i64 {words} to ptr), i64 {n_words})
  call void inttoptr (i64 {leave} to ptr)(i32 {code})
  ret void
foreign:
  %r = call i32 inttoptr (i64 {sigaction} to ptr)(i32 %signal, ptr inttoptr (i64 {old} to ptr), ptr null)
  ret void
}}
"""


def _install() -> object:
    """The handler for the whole process; whatever handler there was gets what is not ours. Returns what must live."""
    with contextlib.suppress(Exception):  # where no code may be made at run time, files are not guarded
        import llvmlite.binding as llvm

        libc, old, words = ctypes.CDLL(None, use_errno=True), _Action(), ctypes.create_string_buffer(_WORDS)
        address = {name: ctypes.cast(getattr(libc, name), ctypes.c_void_p).value for name in ("write", "sigaction")}
        map_call = getattr(libc, "mmap64", None) or libc.mmap
        source = _CODE.format(
            offset=_OFFSET_OF_ADDRESS, page_mask=-mmap.PAGESIZE, most=_MOST, table=_table.ctypes.data, zeros=_ZEROS,
            mmap=ctypes.cast(map_call, ctypes.c_void_p).value, words=ctypes.addressof(words), n_words=len(_WORDS),
            leave=ctypes.cast(libc._exit, ctypes.c_void_p).value, code=_EXIT_BAD_FILE, old=ctypes.addressof(old),
            **address,
        )  # fmt: skip
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(source), machine)
        engine.finalize_object()
        new = _Action(handler=engine.get_function_address("on_bus"), flags=_SA_SIGINFO | _SA_RESTART)
        if libc.sigaction(int(signal.SIGBUS), None, ctypes.byref(old)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        libc.sigaction(int(signal.SIGBUS), ctypes.byref(new), None)
        return engine, old, words
    return None
