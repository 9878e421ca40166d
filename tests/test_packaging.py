"""What is installed: everything under m2lite, the bundled model, and no top-level quant or cli."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "benchmarks")

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=os.environ | (env or {}), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(source: Path, out: Path) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    run(*pip, "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out.parent)
    return next(out.glob("*.whl"))


def test_wheel_and_sdist(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=LEFT_OUT)
    code = f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=source)
    safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from Python 3.11.4 on
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path / "sdist", **safely)  # type: ignore[arg-type]
    wheels = [
        build_wheel(source, tmp_path / "from-source"),
        build_wheel(next((tmp_path / "sdist").iterdir()), tmp_path / "from-sdist"),
    ]
    names = [set(zipfile.ZipFile(wheel).namelist()) for wheel in wheels]
    assert names[0] == names[1]
    assert {name.split("/")[0] for name in names[0]} == {"m2lite", "m2lite-0.1.0.dist-info"}
    python = {str(p.relative_to(ROOT)) for p in (ROOT / "m2lite").glob("*.py")}
    python |= {f"m2lite/quant/{p.name}" for p in (ROOT / "quant").glob("*.py")}
    assert python <= names[0]
    assert not [name for name in names[0] if name.startswith("m2lite/models/") and not name.endswith(".gguf")]
    page = {f"m2lite/serve/page/{p.name}" for p in (ROOT / "m2lite" / "serve" / "page").iterdir()}
    assert len(page) > 5 and {"m2lite/models/m2-tiny/m2-tiny.gguf", *page} <= names[0]

    site = tmp_path / "site"
    zipfile.ZipFile(wheels[0]).extractall(site)
    found = run(sys.executable, "-m", "m2lite", "inspect", "m2lite/models/m2-tiny", cwd=site, env={"PYTHONPATH": ""})
    assert found.startswith("m2lite/models/m2-tiny/m2-tiny.gguf: ")
    said = run(
        sys.executable, "-m", "m2lite", "generate", "-p", "Hello", "-n", "4", "--no-template",
        cwd=site, env={"PYTHONPATH": ""},
    )  # fmt: skip
    assert said.strip()


def test_cli_runs_as_a_script() -> None:
    assert run(sys.executable, "cli.py", "--version", cwd=ROOT, env={"PYTHONPATH": str(ROOT)}).startswith("m2lite ")
