"""Every change of the disk goes through `durable.fsops`, which tests make fail; found by `ast`, the rest in a table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_imports import PACKAGE, python_files

# Attributes of os, shutil and paths, and functions, that change names or contents.
_ALWAYS = {
    "write_text", "write_bytes", "unlink", "rename", "renames", "rmdir", "touch", "symlink_to", "hardlink_to", "mkdir",
    "makedirs", "removedirs", "symlink", "mkfifo", "mknod", "ftruncate", "pwrite", "pwritev", "sendfile", "savez",
    "savez_compressed", "tofile", "rmtree", "copy2", "copyfile", "copytree", "move", "mkstemp", "mkdtemp",
    "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory", "SpooledTemporaryFile", "FileHistory", "savefig",
}  # fmt: skip
_OF_MODULE = {
    "os": {"replace", "remove", "link", "truncate", "write", "chmod"},
    "shutil": {"copy"},
    "np": {"save", "memmap"},
    "numpy": {"save", "memmap"},
}
_NAMES = _ALWAYS.union({"open", "fdopen"}, *_OF_MODULE.values())
_OURS = {"chat.saved", "self._log"}  # a SavedChat and a LineLog, whose methods do it right
_WRITING_FLAGS = {"O_CREAT", "O_WRONLY", "O_RDWR", "O_APPEND", "O_TRUNC"}

# (file, call): why it may stand there. Whatever is promised to survive a crash is not in this table.
ALLOWED = {
    ("storage/durable.py", "*"): "the place where it is done",
    ("system/paths.py", "mkdir"): "a directory of a cache",
    ("simd/cache.py", "*"): "compiled kernels: a file that is not whole is compiled again",
    ("simd/claims.py", "open"): "a file that stays empty: bytes of it are locked",
    ("chat/store.py", "mkdir"): "the directory of saved chats",
    ("chat/lines.py", "mkdir"): "the directory of the history of lines",
    ("chat/lines.py", "open"): "the history of lines, which prompt_toolkit appends to",
    ("chat/lines.py", "FileHistory"): "the same",
    ("chat/mcp_servers.py", "fdopen"): "a pipe",
    ("chat/tools.py", "mkdir"): "what the model was allowed to do",
    ("chat/editor.py", "TemporaryDirectory"): "the text that the user's editor is given",
    ("chat/editor.py", "write_text"): "the same",
    ("system/inputs.py", "TemporaryFile"): "a copy of what can be read only once, gone with the process",
    ("batch/progress.py", "savefig"): "a picture that a run can draw again",
    ("zeros.py", "open"): "a model to measure with, gone with the command",
    ("commands/measures.py", "TemporaryDirectory"): "where it lies",
    ("system/streams.py", "open"): "/dev/null in place of a stream that is closed",
}  # fmt: skip


def changes(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of every call that may change the disk past `fsops`."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "fsops" for alias in node.names):
            yield node.lineno, "fsops"  # a name of its own: tests could not replace it
        if not isinstance(node, ast.Call):
            continue
        function, arguments = node.func, [*node.args, *(keyword.value for keyword in node.keywords)]
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name not in _NAMES:
            continue
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        if owner.endswith("fsops") or owner in _OURS:
            continue
        texts = {argument.value for argument in arguments if isinstance(argument, ast.Constant)}
        flags = {n.attr for argument in arguments for n in ast.walk(argument) if isinstance(n, ast.Attribute)}
        is_writing = any(isinstance(text, str) and len(text) <= 3 and set(text) & set("wax+") for text in texts)
        is_open = name in ("open", "fdopen") and bool(is_writing or flags & _WRITING_FLAGS)
        if is_open or name in _ALWAYS or name in _OF_MODULE.get(owner, ()):
            yield node.lineno, name


def test_every_change_goes_through_the_seam() -> None:
    used = set()
    for path in python_files():
        place = str(path.relative_to(PACKAGE))
        for line, name in changes(path):
            entry = next((key for key in ((place, name), (place, "*")) if key in ALLOWED), None)
            assert entry is not None, f"{path}:{line}: {name} changes the disk; use m2lite.storage.durable"
            used.add(entry)
    assert used == set(ALLOWED), "no longer needed"


@pytest.mark.parametrize(
    "line",
    ["open('x', 'w')", "p.open('ab')", "os.open(p, os.O_RDWR | os.O_CREAT)", "p.write_text('')", "np.save(p, a)",
     "os.replace(a, b)", "shutil.move(a, b)", "p.unlink()", "p.open(mode='r+')",
     "from m2lite.storage.durable import fsops"],
)  # fmt: skip
def test_what_counts_as_a_change(tmp_path: Path, line: str) -> None:
    path = tmp_path / "x.py"
    path.write_text(line + "\n")
    assert len(list(changes(path))) == 1
    path.write_text("p.open('rb')\nopen(p)\nos.open(p, os.O_RDONLY)\ntext.replace('a', 'b')\ndurable.fsops.unlink(p)\n")
    assert not list(changes(path))
