"""Compiled code as a file keeps it, and loaded again. Sees what Numba makes of a function; knows no kernel and no file.

Numba's own way reads a kernel's LLVM code at every start, for a caller that might be compiled, and imports whatever the
kernel was made of. Here that code is read when there is such a caller, and only what the machine code uses is imported.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import llvmlite.binding as llvm
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompileResult, compile_result


class KeptLibrary(JITCodeLibrary):  # type: ignore[misc]
    """Machine code from a file, with the LLVM code that a caller's compilation takes over."""

    _shared_module: Any

    def __init__(self, codegen: Any, name: str, code: bytes, bitcode: bytes, defined: list[str]) -> None:
        """`defined`: the symbols that the code has."""
        super().__init__(codegen, name)
        self._bitcode = bitcode
        self.enable_object_caching()
        self._set_compiled_object(code)
        self._finalize_final_module()
        codegen._engine._defined_symbols.update(defined)

    def _get_module_for_linking(self) -> Any:
        if self._shared_module is None:
            self._shared_module = llvm.parse_bitcode(self._bitcode)
        return self._shared_module


def to_keep(result: CompileResult) -> Any:
    """What `loaded` wants, all of which can be pickled."""
    library, described, environment, signature, _, _, _, init, environments = result._reduce()
    name, _, (code, bitcode) = library
    module = result.library._final_module
    defined = [value.name for values in (module.functions, module.global_variables) for value in values
               if not value.is_declaration]  # fmt: skip
    mentioned = Counter(re.findall(r'@"?([-\w$.]+)', str(module)))
    used = [each for each in environments if mentioned[each.env_name] > 1]  # not only defined
    return (name, code, bitcode, defined), described, environment, signature, init, used


def loaded(target: Any, kept: Any) -> CompileResult:
    """The result of a compilation, as it was for Numba's `target`."""
    library, described, environment, signature, init, environments = kept
    for function in init:
        function()
    code = KeptLibrary(target.codegen(), *library)
    entry = target.get_executable(code, described, environment)
    for each in environments:
        code.codegen.set_env(each.env_name, each)
    return compile_result(
        target_context=target, typing_context=target.typing_context, library=code, environment=environment,
        entry_point=entry, fndesc=described, signature=signature, objectmode=False, lifted=(), reload_init=init,
        referenced_envs=environments,
    )  # fmt: skip
