"""No command writes to what it reads: every option that names a file is in a table here, and every pair is tried."""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from m2lite.cli import app
from m2lite.commands import batch
from tests.conftest import Run

# Every parameter that is a text, by what it names. A new one must be put here before these tests pass.
NO_FILE = {
    "threads", "ctx", "kv", "load", "amx", "ram", "tuning", "heat", "kv_disk", "draft", "draft_tokens", "temp", "top_k",
    "top_p", "min_p", "presence_penalty", "frequency_penalty", "seed", "max_tokens", "think", "think_budget",
    "template",
    "prompt", "system", "stop_text", "type_name", "tensor_type", "target_size", "split_max_size", "alignment", "name",
    "session", "approve", "prompts", "decodes", "depths", "disk", "on_bad_line", "shard", "order", "ray",
    "host", "alias", "allowed_host", "allowed_origin", "mcp",
}  # fmt: skip
FOLDERS = {"tool_dir"}  # of tools, which write there: tests/chat/test_tools.py
# What belongs to an input by its name: each of these files is tried.
MODEL = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "mtp-m.gguf")
CHECKPOINT = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
INPUTS: dict[tuple[str, str], tuple[str, ...]] = {
    **{
        (name, "model"): MODEL
        for name in ("chat", "generate", "imatrix", "plan", "bench", "tune", "perplexity", "doctor")
    },
    **{(name, "mtp"): ("modules.gguf",) for name in ("chat", "generate", "serve", "bench", "batch run")},
    ("serve", "model"): MODEL,
    ("serve", "api_key_file"): ("keys",),
    ("serve", "warm"): ("warm.jsonl",),
    ("serve", "test_script"): ("script.json",),
    **{(name, "json_schema"): ("schema.json",) for name in ("chat", "generate", "batch run")},
    **{(name, "imatrix"): ("imatrix.gguf",) for name in ("convert", "quantize", "verify")},
    ("generate", "file"): ("text.txt",),
    ("generate", "request"): ("request.json",),
    ("chat", "tools"): ("tools.json",),
    ("convert", "hf_dir"): CHECKPOINT,
    ("quantize", "source"): MODEL,
    ("imatrix", "text"): ("text.txt",),
    ("verify", "file"): MODEL,
    ("verify", "against"): MODEL,
    ("inspect", "file"): MODEL,
    ("perplexity", "text"): ("text.txt",),
    ("perplexity", "against"): MODEL,
    ("batch run", "source"): ("in.jsonl",),
    ("batch run", "model"): MODEL,
    ("batch status", "output"): ("results.jsonl",),
    ("batch merge", "outputs"): ("results.jsonl",),
    ("batch merge", "source"): ("in.jsonl",),
}
# What is written beside each output, by its name.
OUTPUTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("convert", "out"): ("{}", "{}.part", "{}.journal", "mtp-{}", "mtp-{}.part"),
    ("quantize", "out"): ("{}", "{}.part", "{}.journal", "mtp-{}", "mtp-{}.part"),
    ("imatrix", "out"): ("{}",),
    ("inspect", "png"): ("{}",),
    ("batch run", "output"): ("{}", "{}.manifest.json"),
    ("batch run", "plot"): ("{}",),
    ("batch merge", "target"): ("{}",),
}
NEEDED = {  # without a value nothing is tried
    "convert": ("hf_dir", "out"), "quantize": ("source", "out"), "imatrix": ("model", "text", "out"),
    "inspect": ("file",), "batch run": ("source", "output", "model"), "batch merge": ("outputs", "target"),
}  # fmt: skip
EVERY = {"convert": ["--overwrite"], "quantize": ["--overwrite"], "imatrix": ["--overwrite"], "batch run": ["--force"]}


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{before}{name} ")
        else:
            yield before + name, command


COMMANDS = dict(commands(typer.main.get_command(app)))


def texts(app: typer.Typer, before: str = "") -> Iterator[tuple[str, str]]:
    """(command, parameter) of everything that is a text or a path."""
    for info in app.registered_commands:
        assert info.name is not None and info.callback is not None
        for parameter in inspect.signature(info.callback).parameters.values():
            kind = get_args(parameter.annotation)[0]
            if {str, Path} & {kind, *get_args(kind), *(k for each in get_args(kind) for k in get_args(each))}:
                yield before + info.name, parameter.name


def test_every_option_that_may_name_a_file_is_known() -> None:
    found = {*texts(app), *texts(batch.app, "batch ")}
    unknown = found - {(name, parameter) for name, parameter in found if parameter in NO_FILE | FOLDERS}
    assert unknown == set(INPUTS) | set(OUTPUTS), "say here what it names, and let `Places` know of it"
    assert ("batch run", "source") in found and ("generate", "file") in found and ("plan", "model") in found


def test_commands_that_only_read_have_no_option_to_write() -> None:
    assert {name for name, _ in OUTPUTS} <= set(NEEDED)


def arguments(name: str, values: dict[str, str]) -> list[str]:
    """The command line that gives these values."""
    words, positional = name.split(), list[str]()
    for parameter in COMMANDS[name].params:
        if parameter.name in values:
            is_option = parameter.param_type_name == "option"
            (words if is_option else positional).extend([parameter.opts[-1]] * is_option + [values[parameter.name]])
    return [*words, *EVERY.get(name, []), *positional]


@pytest.fixture
def inputs(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """Makes every input of a command, none of which is what it should be: to read one ends with another error."""

    def make(name: str) -> dict[str, str]:
        values = {}
        for (command, parameter), files in INPUTS.items():
            if command == name:
                folder = tmp_path / parameter
                folder.mkdir()
                for file in files:
                    (folder / file).write_text(f"precious {parameter} {file}")
                values[parameter] = str(folder if files == CHECKPOINT else folder / files[0])
        return values

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


PAIRS = [
    pytest.param(*output, *read, id=f"{output[0]}-{output[1]}-{read[1]}".replace(" ", "-"))
    for output in OUTPUTS
    for read in INPUTS
    if read[0] == output[0]
]


@pytest.mark.parametrize(("name", "output", "_", "read"), PAIRS)
def test_no_output_is_an_input(
    run_inline: Run, inputs: Callable[[str], dict[str, str]], tmp_path: Path, name: str, output: str, _: str, read: str
) -> None:
    values = inputs(name)
    beside = values | {p: str(tmp_path / "free.gguf") for n, p in OUTPUTS if n == name and p in NEEDED[name]}
    for file in INPUTS[name, read]:
        victim = tmp_path / read / file

        def refused(target: Path, victim: Path = victim) -> None:
            before = contents(tmp_path)
            done = run_inline(*arguments(name, beside | {output: str(target)}))
            assert done.returncode == 2 and "is a file that this command reads" in done.stderr, (target, done.stderr)
            assert contents(tmp_path) == before and victim.read_text().startswith("precious")

        refused(victim)
        for link in (os.symlink, os.link):
            for spelled in OUTPUTS[name, output]:
                at = tmp_path / spelled.format("out.gguf")
                link(victim, at)
                refused(tmp_path / "out.gguf")
                at.unlink()


@pytest.mark.parametrize(("name", "output"), OUTPUTS)
def test_an_output_is_a_file_or_refused_before_anything_is_read(
    run_inline: Run,
    inputs: Callable[[str], dict[str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    output: str,
) -> None:
    values = inputs(name)
    values |= {p: str(tmp_path / "free.gguf") for n, p in OUTPUTS if n == name and p in NEEDED[name]}
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.gguf")
    Path("folder.gguf").mkdir()
    Path("dangling.gguf").symlink_to("nowhere")
    Path("plain").write_text("x")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.gguf")
        before = contents(tmp_path)
        for target, words in [
            ("/dev/null", "is a device, not a file"),
            ("fifo.gguf", "is a FIFO, not a file"),
            ("socket.gguf", "is a socket, not a file"),
            ("folder.gguf", "is a directory, not a file"),
            ("dangling.gguf", "is a link to a file that is not there"),
            ("missing/out.gguf", "there is no directory missing"),
            ("plain/out.gguf", "not a directory"),
            ("n" * 300, "File name too long"),
        ]:
            done = run_inline(*arguments(name, values | {output: target}))
            assert done.returncode == 2 and words.lower() in done.stderr.lower(), (target, done.stderr)
            is_stream = (name, output) == ("batch run", "output")
            assert ("use -o - for stdout" in done.stderr) == (is_stream and "not a file" in words)
            assert contents(tmp_path) == before
    if (name, output) != ("batch run", "output"):
        done = run_inline(*arguments(name, values | {output: "-"}))
        assert done.returncode == 2 and "cannot be written to stdout" in done.stderr


def test_a_picture_replaces_only_a_picture(run_inline: Run, model_files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "thesis.png").write_text("not a picture")
    done = run_inline("inspect", model_files["reply"], "--png", tmp_path / "thesis.png")
    assert done.returncode == 2 and "exists already, and is no file of this kind" in done.stderr
    (tmp_path / "old.png").write_bytes(b"\x89PNG\r\n\x1a\n...")
    done = run_inline(
        "inspect", model_files["reply"], "--png", tmp_path / "old.png", env={"XDG_CACHE_HOME": str(tmp_path / "cache")}
    )
    assert done.returncode == 2 and "No use of" in done.stderr  # it got that far


def test_two_outputs_are_two_files(run_inline: Run, inputs: Callable[[str], dict[str, str]], tmp_path: Path) -> None:
    values = inputs("batch run") | {"output": str(tmp_path / "a.png"), "plot": str(tmp_path / "a.png")}
    done = run_inline(*arguments("batch run", values))
    assert done.returncode == 2 and "is written by this command already" in done.stderr


def test_overwrite_says_what_becomes_of_links(run_inline: Run) -> None:
    for name in ("convert", "quantize", "imatrix"):
        assert "what it points to stays" in " ".join(run_inline(name, "--help").stdout.replace("│", " ").split())
