"""What strangers wrote into names, values, templates and answers is shown on a terminal, never obeyed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tinymodel
from tests.chat.terminal import Terminal
from tests.conftest import Run

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

EVIL = "\x1b]0;owned\x07\x1b[2J\r\n\x9b31mforged\u202e"
OURS = re.compile(r"\x1b\[[\d;]*m|\r\x1b\[K|\r\n")  # colours, a line anew, and how a terminal is sent a new line
CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202e]")


@pytest.fixture(scope="module")
def evil(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model files with escapes in a key, a value, a tensor's name, a template's error, and their own name."""
    folder = tmp_path_factory.mktemp("evil")
    made = {
        "key": tinymodel.write_model(folder / "key.gguf", tinymodel.REPLY, metadata={EVIL[:16]: 1, "value": EVIL}),
        "template": tinymodel.write_model(
            folder / "template.gguf", tinymodel.REPLY, template=f"{{{{ raise_exception({EVIL!r}) }}}}"
        ),
        "arch": tinymodel.write_model(folder / "arch.gguf", metadata={"general.file_type": EVIL}, arch=EVIL),
        "name": tinymodel.write_model(folder / "na\x1b[31mme.gguf", tinymodel.REPLY),
    }
    made["tensor"] = folder / "tensor.gguf"
    name = b"blk.1.attn_norm.weight"
    made["tensor"].write_bytes(made["key"].read_bytes().replace(name, (b"\x1b]0;owned\x07\r\n" * 2)[: len(name)]))
    return made


def assert_harmless(text: str) -> None:
    left = OURS.sub("", text)
    assert not CONTROLS.search(left), re.findall("." * 10 + CONTROLS.pattern + "." * 10, left)[:3]
    assert not re.search(r"^.?31mforged", text, re.MULTILINE)


@pytest.fixture
def on_terminal(command_env: dict[str, str]) -> Iterator[Callable[..., str]]:
    started: list[Terminal] = []

    def run(*arguments: str | Path, code: int = 0, **env: str) -> str:
        terminal = Terminal(list(map(str, arguments)), command_env | env, 24, 80)
        started.append(terminal)
        assert terminal.exit_code(60) == code, terminal.raw
        return terminal.raw

    yield run
    for terminal in started:
        terminal.process.close(force=True)


@pytest.mark.parametrize("which", ["key", "tensor", "name", "template"])
def test_inspect(run_inline: Run, on_terminal: Callable[..., str], evil: dict[str, Path], which: str) -> None:
    raw = on_terminal("inspect", evil[which])
    assert_harmless(raw)
    assert {"name": r"na\x1b[31mme", "template": "template"}.get(which, r"\x1b]0;owned\x07") in raw
    assert_harmless(run_inline("inspect", evil[which]).stdout)
    assert_harmless(run_inline("inspect", evil[which], "--json").stdout)


def test_generate(on_terminal: Callable[..., str], evil: dict[str, Path]) -> None:
    raw = on_terminal("generate", evil["template"], "-p", "x")
    assert_harmless(raw)
    assert r"\x1b]0;owned\x07" in raw and "Fine é" in raw
    assert_harmless(on_terminal("generate", evil["name"], "-p", "x"))
    for which in ("tensor", "arch"):
        assert_harmless(on_terminal("generate", evil[which], "-p", "x", code=4))


def test_chat(command_env: dict[str, str], evil: dict[str, Path], tmp_path: Path) -> None:
    """A file's name, a model's text, a saved chat's name and title: none is obeyed."""
    data = tmp_path / "data" / "m2lite" / "chats"
    data.mkdir(parents=True)
    line = '{"m2lite_chat": 1}\n{"add": {"role": "user", "content": "a\\u001b]0;owned\\u0007\\u009b31m"}}\n'
    (data / "title.jsonl").write_text(line)
    (data / "na\x1b]0;owned\x07me.jsonl").write_text(line)
    terminal = Terminal(
        ["chat", str(evil["template"])], command_env | {"XDG_DATA_HOME": str(tmp_path / "data")}, 24, 80
    )
    terminal.wait_for("loaded in")
    terminal.wait_for_prompt()
    for command, answer in (
        ("/sessions", "title"), ("/load title", "turns"), ("/stats", "turns"), ("x", "Fine é"),
        ("/read a\x1b[200~\x07b\x1b[201~", "error"),
    ):  # fmt: skip
        terminal.ask(command)
        terminal.wait_for(answer)
        terminal.wait_for_prompt()
    terminal.ask("/exit")
    assert terminal.exit_code() == 0
    assert "\x1b]0;owned" not in terminal.raw and "\x07" not in terminal.raw and "\x9b" not in terminal.raw
    assert r"\x1b]0;owned\x07" in terminal.raw


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["generate", f"--{EVIL}"], 2),
        (["generate", "--ctx", EVIL], 2),
        (["bench", "-r", EVIL], 2),
        (["batch", EVIL, "-o", "-"], 2),
        ([EVIL], 2),
        (["generate", EVIL, "-p", "x"], 2),
        (["generate", EVIL, "-p", "x", "--debug"], 2),
        (["generate", os.fsdecode(b"\xff\xfe.gguf"), "-p", "x"], 2),
        (["inspect", os.fsdecode(b"\xff\x1b[31m.gguf")], 2),
    ],
)  # fmt: skip
def test_what_the_user_gave(run_inline: Run, arguments: list[str], code: int) -> None:
    done = run_inline(*arguments)
    assert done.returncode == code and done.stdout == ""
    assert_harmless(done.stderr)
    assert "internal error" not in done.stderr


def test_settings(run_inline: Run, tmp_path: Path) -> None:
    config = tmp_path / "m2lite" / "config.toml"
    config.parent.mkdir()
    for text, code in (
        ('model = "\\u001b[31mx\\nforged"\n', 0),
        ('model = "a\\u0000b"\n', 2),
        ('ctx = "\\u001b[31mx"\n', 2),
        ('"\\u001b[31mx" = 1\n', 2),
        ("\x1b[31m", 2),
    ):
        config.write_text(text)
        done = run_inline("doctor", env={"XDG_CONFIG_HOME": str(tmp_path)})
        assert done.returncode == code, done.stderr
        assert_harmless(done.stdout + done.stderr)


def test_answers_on_a_terminal_and_in_a_pipe(on_terminal: Callable[..., str], run_inline: Run, tmp_path: Path) -> None:
    script = tinymodel.chain("\n", tinymodel.THOUGHT, b"a\x1b[2Jb\x07c\xc2\x9bd", tinymodel.END)
    path = tinymodel.write_model(tmp_path / "escape.gguf", script)
    raw = on_terminal("generate", path, "-p", "x")
    assert_harmless(raw)
    assert "a␛[2Jb␇c\ufffdd" in raw
    assert run_inline("generate", path, "-p", "x").stdout == "a\x1b[2Jb\x07c\x9bd\n"
