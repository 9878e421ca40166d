"""Imports go one way through the house: every arrow that `ast` finds, inside functions too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "m2lite"

# Lower floors first; a part may import parts of lower floors and itself.
FLOORS = [
    ["shown"],
    ["errors"],
    ["system", "machine"],
    ["simd"],
    ["formats"],
    ["storage", "signals", "settings"],
    ["kernels"],
    ["model", "text"],
    ["sampling", "describe"],
    ["drafting"],
    ["engine"],
    ["dialogue"],
    ["api"],
    ["workloads"],
    ["chat", "batch", "serve", "plan", "bench", "bench_drafts", "measure", "doctor", "quant"],
    ["tune", "zeros"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
FLOOR = {part: n for n, parts in enumerate(FLOORS) for part in parts}
# The converter uses the engine's foundations only.
QUANT_MAY = (
    "quant", "errors", "shown", "system", "simd", "formats", "storage", "text.tokenizer",
)  # fmt: skip


def python_files() -> list[Path]:
    found = [p for p in PACKAGE.glob("*.py") if p.name != "__init__.py"]
    for part in sorted(PACKAGE.iterdir()):
        if part.is_dir() and part.name != "models":
            found += part.glob("**/*.py")
    return [p for p in found if "__pycache__" not in p.parts]


def imports(path: Path, nodes: Iterable[ast.AST] | None = None) -> Iterator[tuple[int, str]]:
    """(line, module below m2lite) of every import of m2lite in the file, or among these nodes of it."""
    for node in ast.walk(tree_of(path)) if nodes is None else nodes:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("m2lite."):
                yield node.lineno, name.removeprefix("m2lite.")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def run_at_import(nodes: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: none of functions, none that only a type checker sees."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        is_for_types = isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for field in ("orelse",) if is_for_types else ("body", "orelse", "handlers", "finalbody"):
            yield from run_at_import(getattr(node, field, []))


def find_circle(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Modules of which each imports the next, and the last the first; [] if there are none."""
    done, path = set[str](), list[str]()

    def visit(name: str) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        for other in graph.get(name, ()):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    return next((found for name in graph if (found := visit(name))), [])


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


def test_no_circles() -> None:
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in python_files()}
    modules = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {
        module: [
            target
            for _, name in imports(path, run_at_import(tree_of(path).body))
            for target in (name, name.rpartition(".")[0])  # `from m2lite.a import b`: b is a module of it, or a name
            if target in modules and target != module
        ]
        for module, path in modules.items()
    }
    assert sum(map(len, graph.values())) > 500, "the imports were not found"
    assert find_circle(graph) == []


def test_a_circle_is_found() -> None:
    assert find_circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []
    assert find_circle({"a": ["b"], "b": ["c", "d"], "d": ["e"], "e": ["b"]}) == ["b", "d", "e"]
    lines = "def f():", " import a", "if TYPE_CHECKING:", " import b", "else:", " import c", "try:", " import d"
    code = "\n".join([*lines, "finally:", " pass"])
    found = [node.names[0].name for node in run_at_import(ast.parse(code).body) if isinstance(node, ast.Import)]
    assert found == ["c", "d"]


def test_a_class_name_stands_for_one_thing() -> None:
    homes = dict[str, list[str]]()
    for path in python_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert len(homes) > 200, "the classes were not found"
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_every_part_is_a_package() -> None:
    for part in PACKAGE.iterdir():
        if part.is_dir() and part.name not in ("models", "__pycache__"):
            assert (part / "__init__.py").is_file(), f"{part} would not be installed"


@pytest.mark.parametrize("name", ["cli.py", "quant", "models"])
def test_what_sits_at_the_top_is_linked(name: str) -> None:
    assert (PACKAGE / name).is_symlink() and (PACKAGE / name).resolve() == PACKAGE.parent / name


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
