"""What docs/ and SECURITY.md say of files and tests is so."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELIABILITY = (ROOT / "docs" / "reliability.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
ROW = re.compile(r"^\| (\d*) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
NOT_YET = set[int]()


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / "tests" / path).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_case_has_tests_that_exist() -> None:
    rows = ROW.findall(RELIABILITY)
    assert [int(number) for number, *_ in rows if number] == list(range(1, 47))
    for number, case, _, held in rows:
        names = re.findall(r"`([\w/]+\.py)::(test_\w+)`", held)
        assert names or int(number or 0) in NOT_YET, case
        assert len(names) == held.count("`") // 2, held
        for path, name in names:
            assert name in names_in(path), f"{case}: tests/{path} has no {name}"


def test_what_is_not_held_is_said() -> None:
    for number, _, what, _ in ROW.findall(RELIABILITY):
        assert ("Not yet held" in what) == (number.isdigit() and int(number) in NOT_YET)


def test_names_in_the_architecture_exist() -> None:
    """`path` below m2lite, and behind :: what is defined there."""
    found = re.findall(r"`([a-z_][\w/]*(?:\.py|/))(?:::([\w.]+))?`", ARCHITECTURE)
    assert len(found) > 40, "the names were not found"
    for path, name in found:
        file = ROOT / path if path.startswith("tests/") else ROOT / "m2lite" / path
        assert file.exists(), path
        body: list[ast.stmt] = ast.parse(file.read_text()).body if name else []
        for part in name.split(".") if name else ():
            [node] = [each for each in body if part in defined_by(each)]
            body = getattr(node, "body", [])


def defined_by(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [node.name] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else []


def test_files_that_are_named_exist() -> None:
    for text in (RELIABILITY, ARCHITECTURE, (ROOT / "SECURITY.md").read_text()):
        for name in re.findall(r"`((?:docs|tests|benchmarks)/[\w./]+)`", text):
            assert (ROOT / name).exists(), name
