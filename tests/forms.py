"""Child processes that are compiled for another processor, so that every vector form runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from tests.children import PATIENCE_S

ROOT = Path(__file__).resolve().parent.parent

# form -> (processor, its features), which lead to it
FORMS = {
    "avxvnni": ("alderlake", "+avx2,+fma,+f16c,+avxvnni"),
    "avx2": ("haswell", "+avx2,+fma,+f16c"),
    "portable": ("nehalem", "+fma"),  # without it, every fma is a call
}


def run_script(script: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script below tests/ with this checkout on its path."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / script), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def run_form(form: str, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a form; skips where this processor cannot run it."""
    processor, features = FORMS[form]
    here = llvm.get_host_cpu_features()
    if not all(here.get(feature[1:]) for feature in features.split(",")):
        pytest.skip(f"this processor has not all of {features}, so the {form} form cannot run here")
    return run_script(script, *arguments, NUMBA_CPU_NAME=processor, NUMBA_CPU_FEATURES=features)
