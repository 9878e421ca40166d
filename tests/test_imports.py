"""Imports go one way through the house: every arrow that `ast` finds, inside functions too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "m2lite"

# Lower floors first; a part may import parts of lower floors and itself.
FLOORS = [
    ["shown"],
    ["errors"],
    ["system"],
    ["storage", "machine", "signals", "settings"],
    ["kernels"],
    ["model", "text"],
    ["decode", "describe"],
    ["drafting"],
    ["workloads"],
    ["chat", "batch", "plan", "bench", "bench_drafts", "measure", "doctor", "quant"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
FLOOR = {part: n for n, parts in enumerate(FLOORS) for part in parts}
# The converter uses the engine's foundations only.
QUANT_MAY = (
    "quant", "errors", "shown", "system", "storage",
    "kernels.jit", "kernels.split", "kernels.simd", "kernels.simd_bits", "kernels.emit",
    "text.tokenizer",
)  # fmt: skip


def python_files() -> list[Path]:
    found = [p for p in PACKAGE.glob("*.py") if p.name != "__init__.py"]
    for part in sorted(PACKAGE.iterdir()):
        if part.is_dir() and part.name != "models":
            found += part.glob("**/*.py")
    return [p for p in found if "__pycache__" not in p.parts]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module below m2lite) of every import of m2lite in the file."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("m2lite."):
                yield node.lineno, name.removeprefix("m2lite.")


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    part = part_of(path)
    assert part in FLOOR, f"{part} has no floor: say in {Path(__file__).name} where it belongs"
    for line, name in imports(path):
        target = name.split(".")[0]
        if target not in FLOOR or target == part:  # a name of m2lite/__init__.py, or a neighbour
            continue
        assert FLOOR[target] < FLOOR[part], f"{path}:{line}: {part} must not import {target}"
        if part == "quant":
            assert name.startswith(QUANT_MAY), f"{path}:{line}: quant may import {', '.join(QUANT_MAY)} only"


def test_every_part_is_a_package() -> None:
    for part in PACKAGE.iterdir():
        if part.is_dir() and part.name not in ("models", "__pycache__"):
            assert (part / "__init__.py").is_file(), f"{part} would not be installed"


@pytest.mark.parametrize("statement", ["import m2lite", "import m2lite.cli", "import m2lite.settings"])
def test_no_numba_at_start(statement: str) -> None:
    code = f"{statement}\nimport sys\nsys.exit(str({{'numba', 'numpy', 'tokenizers'}} & set(sys.modules) or ''))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.stderr.strip() == ""


def test_public_names_resolve() -> None:
    import m2lite

    for name in m2lite.__all__:
        assert getattr(m2lite, name) is not None
    with pytest.raises(AttributeError):
        _ = m2lite.Nothing  # type: ignore[attr-defined]
