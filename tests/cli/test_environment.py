"""Odd surroundings: no /proc, no home, no directory to be in, other locales and terminals, names that are not UTF-8."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2lite.errors import UsageError
from m2lite.system.paths import named_path, user_dir
from tests.children import PATIENCE_S
from tests.conftest import Run

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

Models = dict[str, Path]


def without_proc() -> list[str] | None:
    """How a command is started that sees an empty /proc; None where that cannot be had."""
    for own in (["unshare", "-m"], ["unshare", "-Urm"]):
        command = [*own, "/bin/sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
        if shutil.which("unshare") and not subprocess.call([*command, "true"]):
            return command
    return None


@pytest.mark.usefixtures("compiled")
def test_without_proc(command_env: dict[str, str], model_files: Models, tmp_path: Path) -> None:
    command = without_proc()
    if command is None:
        pytest.skip("no namespaces here")
    lines = tmp_path / "in.jsonl"
    lines.write_text('{"prompt": "a"}\n')
    model = str(model_files["reply"])
    for arguments, code, told in (
        (["generate", model, "-p", "x"], 0, "of memory free"),
        (["batch", str(lines), "-o", str(tmp_path / "out.jsonl"), "--model", model], 0, "1 of 1 lines are done"),
        (["generate", model, "-p", "x", "--load", "direct"], 5, "/proc is not mounted"),
        (["doctor"], 0, ""),
    ):
        done = subprocess.run([*command, sys.executable, "-m", "m2lite", *arguments], env=command_env,
                              capture_output=True, text=True, check=False, timeout=PATIENCE_S)  # fmt: skip
        assert done.returncode == code, done.stderr
        assert told in done.stderr and "internal error" not in done.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"HOME": "nowhere", "XDG_CONFIG_HOME": "", "XDG_STATE_HOME": "", "XDG_DATA_HOME": ""},
        {"TERM": "", "COLUMNS": "0"},
        {"TERM": "\x1b[31m", "COLUMNS": "x"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
)
@pytest.mark.usefixtures("compiled")
def test_odd_surroundings(run_m2lite: Run, model_files: Models, env: dict[str, str]) -> None:
    cache = os.environ.get("M2LITE_CACHE_DIR") or str(user_dir("cache"))
    done = run_m2lite("generate", model_files["reply"], "-p", "x", "--json", env=env | {"M2LITE_CACHE_DIR": cache})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["text"] == "Fine é"
    assert run_m2lite("--help", env=env).returncode == 0
    assert not Path("nowhere").exists() and not Path("~").exists()


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an entry in the system's list: newer platformdirs raises, older keeps the ~."""
    import platformdirs

    def raises(*_: object, **__: object) -> str:
        raise RuntimeError("no home")

    for answer in (raises, lambda *_, **__: "~/.local/share/m2lite"):
        monkeypatch.setattr(platformdirs, "user_data_dir", answer)
        path = user_dir("data")
        assert path.is_absolute() and not path.exists()
        with pytest.raises(NotADirectoryError):
            path.mkdir(parents=True)


def test_a_directory_that_is_gone(command_env: dict[str, str], model_files: Models, tmp_path: Path) -> None:
    for arguments, code in (["generate", str(model_files["reply"]), "-p", "x"], 0), (["inspect", "none"], 2):
        command = [sys.executable, "-m", "m2lite", *arguments]
        (tmp_path / "gone").mkdir()
        done = subprocess.run(
            ["/bin/sh", "-c", 'rmdir ../gone && exec "$@"', "sh", *command],
            env=command_env, cwd=tmp_path / "gone", capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert "internal error" not in done.stderr and "Traceback" not in done.stderr


def test_a_name_that_is_not_utf8(run_inline: Run, model_files: Models, tmp_path: Path) -> None:
    model = tmp_path / os.fsdecode(b"mod\xe9l.gguf")
    shutil.copy(model_files["reply"], model)
    done = run_inline("generate", model, "-p", "x")
    assert (done.returncode, done.stdout) == (0, "Fine é\n"), done.stderr
    assert "mod\\udce9l.gguf" in done.stderr
    done = run_inline("inspect", model, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["path"] == str(model)
    request = tmp_path / os.fsdecode(b"r\xe9.json")
    request.write_text("{")
    done = run_inline("generate", model, "--request", request)
    assert done.returncode == 2 and "r\\udce9.json: no JSON" in done.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("~nosuchuser/x", "there is no such home directory"),
        ("a\0b", "it holds a zero byte"),
        ("a\ud800b", "it holds half of a character"),
    ],
)
def test_what_is_no_path(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        named_path(text)


def test_paths() -> None:
    assert named_path("~") == Path.home() and named_path("a/../b") == Path("a/../b")
    assert named_path(os.fsdecode(b"\xff")) == Path(os.fsdecode(b"\xff"))
