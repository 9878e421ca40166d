"""Clients from npm and PyPI in their pinned versions, in a cache directory. Knows names of packages, no clients."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path


def cache() -> Path:
    """Where clients are installed: never inside of the repository."""
    root = os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()
    return Path(root) / "m2lite-clients"


def folder(package: str) -> Path:
    """Of its executables."""
    place = cache() / package.replace("/", "+")
    return place / ("bin" if "==" in package else "node_modules/.bin")


def install(package: str) -> None:
    """NAME@VERSION is from npm, NAME==VERSION from PyPI. What is there already stays as it is."""
    done = cache() / package.replace("/", "+") / "installed"
    if done.exists():
        return
    print(f"installing {package} ...", flush=True)
    place = done.parent
    place.mkdir(parents=True, exist_ok=True)
    if "==" in package:
        venv.create(place, with_pip=True)
        _run(str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", package)
    else:
        _run("npm", "install", "--prefix", str(place), "--no-audit", "--no-fund", "--loglevel=error", package)
    done.touch()


def _run(*command: str) -> None:
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if found.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{found.stderr[-2000:]}")
