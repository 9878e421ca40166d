"""Tries the processor's matrix instructions in a process of its own: exit code 0 if they multiply, 2 if they do not.

A processor may announce them and raise SIGILL at the first. Imports nothing of m2lite: it is run as a file.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA = 158, 0x1023, 18

_IR = """
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.tdpbssd(i8, i8, i8)
define void @multiply(ptr %config, ptr %x, ptr %w, ptr %sums) {
  call void @llvm.x86.ldtilecfg(ptr %config)
  call void @llvm.x86.tileloadd64(i8 1, ptr %x, i64 64)
  call void @llvm.x86.tileloadd64(i8 2, ptr %w, i64 64)
  call void @llvm.x86.tilezero(i8 0)
  call void @llvm.x86.tdpbssd(i8 0, i8 1, i8 2)
  call void @llvm.x86.tilestored64(i8 0, ptr %sums, i64 64)
  call void @llvm.x86.tilerelease()
  ret void
}
"""


def ask_permission() -> bool:
    """Linux keeps room for matrix registers only for processes that ask; it holds for all threads."""
    return bool(ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA) == 0)


def multiplies() -> bool:
    """Whether 16 x 64 signed bytes times 64 x 16 are what they should be."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_default_triple().create_target_machine(features="+amx-tile,+amx-int8")
    code = llvm.create_mcjit_compiler(llvm.parse_assembly(_IR), machine)
    code.finalize_object()
    shapes = bytearray(64)
    shapes[0], shapes[16], shapes[18], shapes[20], shapes[48:51] = 1, 64, 64, 64, b"\x10" * 3
    x = [[i * 7 + k * 5 - 128 & 255 for k in range(64)] for i in range(16)]
    w = [[i * 3 + k * 11 - 100 & 255 for i in range(16)] for k in range(64)]
    four = [w[4 * k + j][i] for k in range(16) for i in range(16) for j in range(4)]
    sums = (ctypes.c_int32 * 256)()
    memory: list[Any] = [(ctypes.c_uint8 * len(v))(*v) for v in (shapes, [v for row in x for v in row], four)]
    ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 4)(code.get_function_address("multiply"))(
        *(ctypes.addressof(v) for v in (*memory, sums))
    )

    def signed(byte: int) -> int:
        return byte - 256 if byte > 127 else byte

    return list(sums) == [
        sum(signed(x[i][k]) * signed(w[k][j]) for k in range(64)) for i in range(16) for j in range(16)
    ]


if __name__ == "__main__":
    sys.exit(0 if ask_permission() and multiplies() else 2)
