"""Whether this process uses the processor's matrix instructions (AMX). Sees the processor and the system; no kernel."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

from m2lite.errors import M2liteError
from m2lite.kernels import amx_trial
from m2lite.simd import emit, jit
from m2lite.storage.durable import atomic_write

_PATIENCE_S = 60
_FAULTS = (-signal.SIGILL, -signal.SIGSEGV, -signal.SIGBUS)
_is_allowed = True


def allow(is_allowed: bool) -> None:
    """What is compiled from now on may use them, or may not; the bits are the same."""
    global _is_allowed
    _is_allowed = is_allowed


def is_used() -> bool:
    return _is_allowed and why_not() is None


@cache
def why_not() -> str | None:
    """None if they can be used here."""
    if emit.FORM != "avx512vnni" or not {"amx-tile", "amx-int8"} <= emit.FEATURES or sys.platform != "linux":
        return "the processor has none, or nothing is compiled for it"
    if not _works():
        return "they failed when they were tried"
    return None if amx_trial.ask_permission() else "the system gives no permission"


def said(is_wanted: bool) -> str:
    """For people."""
    reason = why_not() if is_wanted else "switched off"
    return f"no matrix instructions (AMX): {reason}" if reason else "AMX for many rows"


def _works() -> bool:
    """What the trial said, which is kept for this processor and system. What cannot be told does not work."""
    try:
        path = jit.CACHE_DIR / f"amx-{_processor()}"
        with suppress(OSError):
            return path.read_text() == "works"
        answer = try_them(Path(amx_trial.__file__))
    except (OSError, subprocess.SubprocessError):
        return False
    if answer is not None:
        with suppress(OSError, M2liteError):
            atomic_write(path, b"works" if answer else b"fails")
    return answer is True


def try_them(script: Path) -> bool | None:
    """Whether a child process could use them; None if it ended for another reason."""
    command = [sys.executable, "-P", "-X", "utf8", str(script.resolve())]
    code = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=_PATIENCE_S,
        start_new_session=True,  # Ctrl-C is for us
    ).returncode  # fmt: skip
    return code == 0 if code in (0, 2, *_FAULTS) else None


def _processor() -> str:
    """A name for the first processor, its microcode and features, and the system that it runs."""
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    lines = [line for line in first if line.startswith(("vendor", "cpu family", "model", "step", "microcode", "flags"))]
    return hashlib.sha256("\n".join([*lines, os.uname().release]).encode()).hexdigest()[:16]
