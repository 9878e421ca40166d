"""The one spelling of Numba's options, the name of its cache, and the threading layer. Knows no kernel and no model.

Import this module before Numba: it decides which threading layer Numba may use and how its threads wait.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar

from m2lite.system.numba_environment import LAYERS, WARNINGS

os.environ.setdefault("KMP_BLOCKTIME", "1")
# Spinning pays within a token (regions follow in microseconds) and must end soon after: other programs run too.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import llvmlite
import numba
from numba.core import config as numba_config
from numba.core import sigutils
from numba.core.ccallback import CFunc
from numba.np.ufunc import parallel

from m2lite.simd.cache import LOST, KernelCache, choose_directory
from m2lite.simd.claims import CLOCK
from m2lite.simd.crowd import Crowd
from m2lite.simd.tuning import VALUES

# Every file whose text compiled code may depend on: kernels, and where they take constants from.
_SOURCES = (
    "simd/*.py", "kernels/*.py", "formats/*.py", "formats/kernels/*.py",
    "quant/encode.py", "quant/encoders/*.py", "quant/decode.py",
)  # fmt: skip
_CODE_AS_EVER = re.compile("CACHE|THREADING_LAYER|NUM_THREADS")  # of Numba's variables: they change no compiled code

P = ParamSpec("P")
R = TypeVar("R", covariant=True)

LONG_S = 1.0  # of compiling, from which on it is said

OPTIONS: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": False,
    "boundscheck": False,
}


def source_files() -> list[Path]:
    """What _SOURCES matches, in a fixed order."""
    package = Path(__file__).parent.parent
    return [path for pattern in _SOURCES for path in sorted(package.glob(pattern))]


def source_hash() -> str:
    """Code follows from other files than a function's own and from flags: all of that names the cache's directory."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.name.encode() + path.read_bytes())
    environment = {k: v for k, v in os.environ.items() if k.startswith("NUMBA_") and not _CODE_AS_EVER.search(k)}
    versions = (numba.__version__, llvmlite.__version__, sys.version)
    digest.update(repr((sorted(environment.items()), sorted(OPTIONS.items()), *versions)).encode())
    return digest.hexdigest()[:16]


SOURCES = source_hash()
CACHE_DIR, _CACHE_WARNING = choose_directory(SOURCES)


def _has(layer: str) -> bool:
    """Whether Numba can use it here: libgomp and TBB are not in its wheel."""
    try:
        if layer == "omp" and sys.platform.startswith("linux"):
            ctypes.CDLL("libgomp.so.1")
        if layer == "tbb":
            parallel._check_tbb_version_compatible()
        importlib.import_module(f"numba.np.ufunc.{layer if layer == 'workqueue' else layer + 'pool'}")
    except (ImportError, OSError, ValueError):
        return False
    return True


def _choose_layer() -> str:
    """The user's, or the first that is here."""
    wanted = os.environ.get("NUMBA_THREADING_LAYER")
    found = next(layer for layer in (wanted, *LAYERS) if layer and _has(layer))
    if wanted and wanted != found:
        del os.environ["NUMBA_THREADING_LAYER"]
        WARNINGS.append(f"NUMBA_THREADING_LAYER={wanted} cannot be had here: {found} is used")
    return found


LAYER = _choose_layer()
numba_config.THREADING_LAYER = LAYER


def warnings() -> list[str]:
    """What the user should know of the environment: a sentence each, and nothing where all is well."""
    slow = "the workqueue threading layer is slow; install libgomp (Debian: apt install libgomp1) or `pip install tbb`"
    found = [*WARNINGS, *([slow] if LAYER == "workqueue" else []), _CACHE_WARNING, *LOST]
    return [warning for warning in found if warning]


def on_compile(callback: Callable[[], None]) -> None:
    """Call `callback` once, when kernels that the cache does not hold have been compiled for a second."""
    CLOCK.restart((LONG_S, callback))


class Kernel(Protocol[P, R]):
    """A compiled function, with what Numba gives beside the call."""

    py_func: Callable[..., Any]
    compile: Callable[..., Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def kernel(function: Callable[P, R], **options: bool) -> Kernel[P, R]:
    """Compile with the project's options, for Python and other kernels to call."""
    compiled: Any = numba.njit(**OPTIONS | options)(function)
    compiled._cache = KernelCache(function, CACHE_DIR)
    return compiled  # type: ignore[no-any-return]


def inner(function: Callable[P, R]) -> Kernel[P, R]:
    """The same for other kernels alone: without what Python would call, which takes time to compile."""
    return kernel(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def specialise(template: Callable[P, R], name: str, **names: Any) -> Callable[P, R]:
    """A copy of `template` under another name that sees `names` as globals.

    A closure would do the same, but the disk cache keys closures by a pickle of their cells, which holds ids that
    differ in every process: it would never hit.
    """
    function = types.FunctionType(template.__code__, {**template.__globals__, **names}, name)
    function.__qualname__ = name
    return function


def address_of(function: Callable[..., Any], signature: Any, *, parallel: bool = False) -> int:
    """Compile `function` for `signature` and return its machine address, as of a function of C."""
    options = {k: v for k, v in OPTIONS.items() if k != "nogil"} | {"parallel": parallel}
    compiled: Any = CFunc(function, sigutils.normalize_signature(signature), locals={}, options=options)
    compiled._cache = KernelCache(function, CACHE_DIR)
    compiled.compile()
    return int(compiled.address)


_crowd = Crowd(1)


def team() -> tuple[int, int]:
    """Threads that a region should use now, and the multiply-adds below which one thread does without a region."""
    if _crowd.look():
        numba.set_num_threads(_crowd.n_active)
    return _crowd.n_active, VALUES["alone_macs"]


def parts_of(team: tuple[int, int], work: int) -> int:
    """Parts that `work` is worth for a team, as `team()` says; plain, so that kernels can have it compiled."""
    return team[0] if work >= team[1] else 1


def n_parts(work: int) -> int:
    """Parts that `work` (multiply-adds or the like) is worth now; a kernel's result is the same for any number."""
    return parts_of(team(), work)


def n_threads() -> int:
    """Threads that a parallel region uses at most."""
    return _crowd.n_threads


def start(n_threads: int | None = None) -> str:
    """Set the number of threads that parallel kernels use and return the name of the threading layer."""
    global _crowd
    _crowd = Crowd(min(n_threads or numba_config.NUMBA_NUM_THREADS, numba_config.NUMBA_NUM_THREADS))
    numba.set_num_threads(_crowd.n_threads)
    return LAYER
