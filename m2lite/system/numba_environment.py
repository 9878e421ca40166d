"""Which of the user's NUMBA_* variables count here, and which are another program's. Import it before Numba."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from m2lite.shown import shown

LAYERS = ("omp", "tbb", "workqueue")
_MOST_THREADS = 1024


def check_environment(environ: MutableMapping[str, str]) -> list[str]:
    """Take out of `environ` what Numba must not see; what the user should know of it, a sentence each.

    The target and where compiled code is kept are the user's to say, and so are the threads as long as they make
    sense. All else changes what kernels are compiled to, which only our own options may: NUMBA_DISABLE_JIT makes them
    fail, and NUMBA_ENABLE_AVX=0 kills LLVM.
    """
    found = []
    for name in sorted(name for name in environ if name.startswith("NUMBA_")):
        value = environ[name]
        if name == "NUMBA_NUM_THREADS":
            is_sound = value.isascii() and value.isdigit() and len(value) < 6 and 0 < int(value) <= _MOST_THREADS
            wanted = f"a number from 1 to {_MOST_THREADS}"
        elif name == "NUMBA_THREADING_LAYER":
            is_sound, wanted = value in LAYERS, " or ".join(LAYERS)
        elif name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES") or "CACHE" in name:
            continue
        else:
            is_sound, wanted = False, ""
        if not is_sound:
            del environ[name]
            found.append(f"{shown(name)}={shown(value)[:60]} is not used" + (f": expected {wanted}" if wanted else ""))
    return found


WARNINGS = check_environment(os.environ)  # of this process
