"""Every command as a user runs it: what goes to stdout, what to stderr, and the exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest

import tinymodel
from tests.children import PATIENCE_S, default_signals, ignored_signals

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

Run = Callable[..., "subprocess.CompletedProcess[str]"]
COMMANDS = (
    "chat", "generate", "convert", "quantize", "imatrix", "verify", "inspect", "bench", "perplexity", "doctor",
)  # fmt: skip
Models = dict[str, Path]

START_LINE = re.compile(
    r"^reply\.gguf · .*Q4_0 \d+%.* · [\d.]+ KiB · [\d.,]+ [MGT]iB of memory free · \d+ threads \(\w+\) · ctx 4,096"
    r" · KV f16 2\.00 MiB"
    r" · drafts auto: prompt lookup · loaded in"
)


def one_line_error(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of stderr, which must be ours and not a traceback."""
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("m2lite: "), done.stderr
    return last


# --- help and version


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "MODEL"]])
def test_help_and_inspect_import_little(command_env: dict[str, str], bundled_model: Path, arguments: list[str]) -> None:
    """Imports are what a start costs: help takes a few of the standard library's and Typer's, and no Numba."""
    code = "import sys, m2lite.cli as c\ntry: c.main()\nfinally: print('MODULES', *sys.modules, file=sys.stderr)"
    named = [str(bundled_model) if argument == "MODEL" else argument for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", code, *named], env=command_env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    modules = set(done.stderr.rpartition("MODULES")[2].split())
    assert "m2lite" in modules and not modules & {"numba", "ray", "pydantic"}
    if arguments == ["--help"]:
        heavy = {"numpy", "gguf", "psutil", "asyncio", "multiprocessing", "llvmlite", "tokenizers", "prompt_toolkit"}
        assert not modules & heavy
        assert len(modules) < 500, len(modules)
        for command in COMMANDS:
            assert f" {command} " in done.stdout


@pytest.mark.parametrize("arguments", [["generate", "MODEL", "-p", "Hello", "-n", "1"], ["inspect", "MODEL"]])
def test_garbage_is_collected_after_the_start(
    command_env: dict[str, str], bundled_model: Path, arguments: list[str]
) -> None:
    code = "import atexit, gc, m2lite.cli as c\natexit.register(lambda: print('is', gc.isenabled()))\nc.main()"
    named = [str(bundled_model) if argument == "MODEL" else argument for argument in arguments]
    done = subprocess.run([sys.executable, "-c", code, *named], env=command_env, capture_output=True, check=False)
    assert done.stdout.endswith(b"is True\n"), done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(run_inline: Run, command: str) -> None:
    done = run_inline(command, "--help")
    assert done.returncode == 0 and "--debug" in done.stdout


def test_version(run_m2lite: Run) -> None:
    done = run_m2lite("--version")
    assert (done.returncode, done.stdout) == (0, "m2lite 0.1.0\n")


# --- generate


@pytest.mark.usefixtures("compiled")
def test_generate(run_m2lite: Run, model_files: Models) -> None:
    done = run_m2lite("generate", model_files["reply"], "-p", "Hello")
    assert (done.returncode, done.stdout) == (0, "Fine é\n")
    seed, start, *rest = done.stderr.splitlines()
    assert re.fullmatch(r"seed \d+", seed)
    assert START_LINE.match(start)
    assert rest == ["thinking: hm"]


@pytest.mark.usefixtures("compiled")
def test_generate_plain_from_stdin(run_m2lite: Run, model_files: Models) -> None:
    done = run_m2lite("generate", model_files["reply"], "-p", "-", "--plain", "--seed", "1", stdin="Hällo")
    assert (done.returncode, done.stdout) == (0, "Fine é\n")
    assert len(done.stderr.splitlines()) == 1


def test_generate_json(run_inline: Run, model_files: Models) -> None:
    done = run_inline("generate", model_files["reply"], "-p", "Hello", "--json", "--seed", "7", "-s", "Be brief.")
    assert done.returncode == 0
    found = json.loads(done.stdout)
    stats, usage = found.pop("stats"), found.pop("usage")
    assert found == {
        "text": "Fine é",
        "thinking": "hm",
        "tool_calls": [],
        "tokens": [*b"hm", tinymodel.THOUGHT, *"Fine é".encode()],
        "finish_reason": "stop",
        "seed": 7,
    }
    assert usage["completion_tokens"] == 10
    assert usage["total_tokens"] == usage["prompt_tokens"] + 10
    assert stats.pop("major_faults") >= 0
    draft = stats.pop("draft")
    assert draft["steps"] == 10 - draft["accepted"] and draft["proposed"] >= draft["accepted"]
    assert all(stats[name] > 0 for name in stats)
    assert set(stats) == {"prompt_tokens_per_s", "tokens_per_s", "time_to_first_token_s", "load_s"}


def test_a_seed_repeats(run_inline: Run, model_files: Models) -> None:
    def tokens(*options: str) -> list[int]:
        done = run_inline("generate", model_files["random"], "-p", "Hi", "--json", "-n", "20", *options)
        found = json.loads(done.stdout)
        assert isinstance(found["tokens"], list)
        return found["tokens"]

    first = tokens("--seed", "5")
    assert first == tokens("--seed", "5", "--threads", "1")
    assert first != tokens("--seed", "6")
    assert tokens("--temp", "0") == tokens("--temp", "0", "--seed", "9")


def test_drawn_seed_repeats(run_m2lite: Run, model_files: Models) -> None:
    done = run_m2lite("generate", model_files["random"], "-p", "Hi", "--json", "-n", "20")
    seed = done.stderr.splitlines()[0].removeprefix("seed ")
    again = run_m2lite("generate", model_files["random"], "-p", "Hi", "--json", "-n", "20", "--seed", seed)
    assert json.loads(again.stdout)["tokens"] == json.loads(done.stdout)["tokens"]


def test_raw_text(run_inline: Run, model_files: Models) -> None:
    done = run_inline("generate", model_files["reply"], "-p", "a\n", "--no-template", "--json")
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == 2


def test_length_is_said(run_inline: Run, model_files: Models) -> None:
    done = run_inline("generate", model_files["answer"], "-p", "Hi", "-n", "8")
    assert (done.returncode, done.stdout) == (0, "abcde\n")
    assert "stopped after 8 tokens" in done.stderr


def test_escapes_stay_as_they_are_in_a_pipe(run_inline: Run, tmp_path: Path) -> None:
    script = tinymodel.chain("\n", tinymodel.THOUGHT, "a\033b", tinymodel.END)
    path = tinymodel.write_model(tmp_path / "escape.gguf", script)
    assert run_inline("generate", path, "-p", "x").stdout == "a\033b\n"


def test_tool_call_that_cannot_be_read_is_said(run_inline: Run, tmp_path: Path) -> None:
    script = tinymodel.chain("\n", tinymodel.THOUGHT, "a", tinymodel.CALL, '<invoke ="', tinymodel.END)
    done = run_inline("generate", tinymodel.write_model(tmp_path / "call.gguf", script), "-p", "x", "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["text"], found["tool_calls"]) == (0, "a", [])
    assert "warning: " in done.stderr


@pytest.mark.usefixtures("compiled")
def test_bundled_model(run_m2lite: Run, bundled_model: Path) -> None:
    """Without a name, m2-tiny answers."""
    done = run_m2lite("generate", "-p", "Hello", "--temp", "0", "-n", "1", "--no-template")
    assert done.returncode == 0 and done.stdout.strip()
    assert done.stderr.startswith(bundled_model.name)


# --- what can be wrong


def test_missing_file(run_inline: Run, tmp_path: Path) -> None:
    done = run_inline("generate", tmp_path / "none.gguf", "-p", "x")
    assert done.returncode == 2
    assert "none.gguf does not exist." in one_line_error(done)


def test_directories(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    done = run_inline("inspect", tmp_path)
    assert done.returncode == 4 and "holds no GGUF file" in one_line_error(done)
    for name in ("a.gguf", "mtp-a.gguf"):
        (tmp_path / name).write_bytes(model_files["reply"].read_bytes())
    assert run_inline("inspect", tmp_path).returncode == 0
    (tmp_path / "b.gguf").write_bytes(b"")
    done = run_inline("inspect", tmp_path)
    assert done.returncode == 2 and "holds 2 models: a.gguf, b.gguf." in one_line_error(done)


@pytest.mark.parametrize("command", [("inspect",), ("generate", "-p", "x"), ("chat",)])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a GGUF file: it is empty"),
        (b"GGU", "not a GGUF file"),
        (b"<!DOCTYPE html><html>", "not a GGUF file"),
        (bytes(1000), "not a GGUF file"),
    ],
)
def test_foreign_file(run_inline: Run, tmp_path: Path, command: tuple[str, ...], content: bytes, message: str) -> None:
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content)
    done = run_inline(command[0], path, *command[1:])
    assert done.returncode == 4
    assert message in one_line_error(done)


def test_truncated_file(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(model_files["reply"].read_bytes()[:-1000])
    done = run_inline("generate", path, "-p", "x")
    assert done.returncode == 4
    assert "short.gguf" in one_line_error(done) and "incomplete" in done.stderr


def test_other_architecture(run_inline: Run, tmp_path: Path) -> None:
    path = tinymodel.write_model(tmp_path / "llama.gguf", arch="llama")
    done = run_inline("generate", path, "-p", "x")
    assert done.returncode == 4
    assert "general.architecture is 'llama', expected 'minimax-m2'" in one_line_error(done)


def test_lying_file(run_inline: Run, tmp_path: Path) -> None:
    path = tinymodel.write_model(tmp_path / "lie.gguf", metadata={"minimax-m2.attention.sliding_window": 512})
    done = run_inline("generate", path, "-p", "x")
    assert done.returncode == 4 and "sliding_window" in one_line_error(done)


def test_missing_template(run_inline: Run, tmp_path: Path) -> None:
    path = tinymodel.write_model(tmp_path / "bare.gguf", tinymodel.REPLY, template=None)
    done = run_inline("generate", path, "-p", "x")
    assert (done.returncode, done.stdout) == (0, "Fine é\n")
    assert "warning: The model file has no chat template; the built-in" in done.stderr
    assert "warning" not in run_inline("generate", path, "-p", "x", "--template", "builtin").stderr


def test_kv_of_8_bits(run_inline: Run, model_files: Models) -> None:
    done = run_inline("generate", model_files["reply"], "-p", "Hello", "--kv", "q8_0", "--seed", "1")
    assert (done.returncode, done.stdout) == (0, "Fine é\n")
    assert "ctx 4,096 · KV q8_0 1.06 MiB" in done.stderr


def test_prompt_longer_than_the_context(run_m2lite: Run, model_files: Models) -> None:
    done = run_m2lite("generate", model_files["reply"], "-p", "-", "--ctx", "512", stdin="x" * 1_000_000)
    assert done.returncode == 2
    assert re.search(r"needs 1,000,05\d tokens; 512 are free of 512\. .*the model allows 4,096", one_line_error(done))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", "2"], "--top-p is '2': expected a number from 0 to 1."),
        (["--ctx", "lots"], "--ctx is 'lots': expected a whole number such as 4096 or 32k."),
        (["--ctx", "1m"], "A context of 1,048,576 was asked for; the model allows 1 to 4,096."),
        (["--seed", "-1"], "--seed is '-1': expected a whole number from 0 to 2**64 - 1."),
        (["--kv", "q4_0"], "--kv is 'q4_0': expected f16 or q8_0."),
        (["--threads", "0"], "--threads is '0': expected at least 1."),
        (["-s", "x", "--no-template"], "--system was given with --no-template."),
    ],
)
def test_bad_values(run_inline: Run, model_files: Models, options: list[str], message: str) -> None:
    done = run_inline("generate", model_files["reply"], "-p", "x", *options)
    assert done.returncode == 2
    assert message in one_line_error(done)


@pytest.mark.parametrize("arguments", [["generate", "--frobnicate"], ["frobnicate"], ["inspect"]])
def test_bad_usage(run_m2lite: Run, arguments: list[str]) -> None:
    done = run_m2lite(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr and "Usage:" in done.stderr


def test_text_that_is_not_unicode(run_m2lite: Run, model_files: Models) -> None:
    done = run_m2lite("generate", model_files["reply"], "-p", "-", stdin=b"abc\xff")
    assert done.returncode == 2 and "byte 3 is 0xff" in one_line_error(done)
    for flag in ("--prompt", "--system", "--stop"):
        done = run_m2lite("generate", model_files["reply"], "-p", "x", flag, os.fsdecode(b"abc\xff"))
        assert done.returncode == 2 and f"{flag} is not UTF-8: byte 3 is 0xff" in done.stderr
        assert done.stderr.count("\n") == 1, "before the model is opened"
    assert run_m2lite("generate", model_files["reply"], "-p", "-", stdin=b"\xef\xbb\xbfa\0b").returncode == 0


def test_traceback_only_with_debug(run_m2lite: Run, tmp_path: Path) -> None:
    done = run_m2lite("generate", tmp_path / "none.gguf", "-p", "x", "--debug")
    assert done.returncode == 2 and "Traceback" in done.stderr and "does not exist" in done.stderr.splitlines()[-1]


# --- settings


def test_environment_and_config(run_inline: Run, model_files: Models, tmp_path: Path) -> None:
    config = tmp_path / "m2lite" / "config.toml"
    config.parent.mkdir()
    config.write_text('ctx = "1k"\ntemp = 0.5\n')
    env = {"XDG_CONFIG_HOME": str(tmp_path), "M2LITE_TEMP": "0", "M2LITE_MODEL": str(model_files["reply"])}
    done = run_inline("generate", "-p", "x", env=env)
    assert done.returncode == 0 and "ctx 1,024" in done.stderr and "seed" not in done.stderr
    done = run_inline("doctor", env=env)
    assert f"ctx             1024 (key ctx in {config})" in done.stdout
    assert "temp            0.0 (environment variable M2LITE_TEMP)" in done.stdout
    done = run_inline("generate", "-p", "x", env=env | {"M2LITE_TOP_K": "many"})
    assert done.returncode == 2 and "environment variable M2LITE_TOP_K is 'many'" in one_line_error(done)
    config.write_text("speed = 9\n")
    done = run_inline("generate", "-p", "x", env=env)
    assert done.returncode == 2 and "unknown key 'speed'" in one_line_error(done)


# --- the other commands


def test_inspect(run_inline: Run, model_files: Models) -> None:
    done = run_inline("inspect", model_files["reply"], "--json")
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["config"]["n_experts"] == 8
    assert found["n_tensors"] == len(found["tensors"]) == 29
    assert found["tensors"][0] == {"name": "token_embd.weight", "type": "F32", "shape": [272, 64], "n_bytes": 69632}
    assert found["tokenizer"]["stop_ids"] == [tinymodel.END]
    assert found["template"]["origin"] == "file"
    text = run_inline("inspect", model_files["reply"]).stdout
    assert "tokenizer.ggml.tokens = 'array of 272 items'" in text
    assert "blk.0.ffn_down_exps.weight  Q4_0  8x64x32" in text


def test_every_end_token_ends_a_reply(run_inline: Run, tmp_path: Path) -> None:
    """Also an ordinary one, as generation_config.json may name it; and M2's own where the file names another."""
    ends = {"tokenizer.ggml.eot_token_id": ord("d"), "tokenizer.ggml.eom_token_id": tinymodel.UNKNOWN}
    path = tinymodel.write_model(tmp_path / "m.gguf", tinymodel.ENDLESS_ANSWER, metadata=ends)
    done = run_inline("generate", path, "-p", "Hello", "--seed", "1", "-n", "50", "--json")
    answer = json.loads(done.stdout)
    assert (answer["text"], answer["finish_reason"]) == ("abc", "stop")
    assert "warning: a reply ends at token 100 'd', an ordinary token" in done.stderr
    path = tinymodel.write_model(tmp_path / "n.gguf", tinymodel.REPLY, end=tinymodel.TURN)
    done = run_inline("generate", path, "-p", "Hello", "--seed", "1", "-n", "50")
    assert (done.returncode, done.stdout) == (0, "Fine é\n")
    path = tinymodel.write_model(tmp_path / "o.gguf", tinymodel.REPLY, end=10**6)
    done = run_inline("generate", path, "-p", "Hello", "--seed", "1", "-n", "50")
    assert (done.returncode, done.stdout) == (0, "Fine é\n")
    assert "warning: key 'tokenizer.ggml.eos_token_id' is 1000000, expected a token id" in done.stderr


def test_bench(run_inline: Run, model_files: Models) -> None:
    done = run_inline("bench", model_files["random"], "-p", "32", "-n", "8", "-r", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    prefill, decode = found["tests"]
    assert (prefill["kind"], prefill["n"], decode["kind"], decode["n"]) == ("prefill", 32, "decode", 8)
    assert prefill["tokens_per_s"]["median"] > decode["tokens_per_s"]["min"] > 0
    assert len(prefill["samples"]) == len(decode["samples"]) == 2
    assert found["read_bytes_per_s"] > 1e8 and found["read_mapped_bytes_per_s"] > 1e8
    # all dense tensors, and 2 of 8 experts in each of 2 layers, 18 bytes per 32 weights
    assert found["weight_bytes_per_token"] > 2 * 2 * 3 * 64 * 32 // 32 * 18
    # the token that decoding starts from, and half of the 8, behind them: 2 layers, K and V, 64 wide, in float16
    assert decode["bytes_per_token"] == found["weight_bytes_per_token"] + 5 * 2 * 2 * 64 * 2
    done = run_inline("bench", model_files["random"], "-p", "32", "-n", "8", "-r", "1")
    assert "tok/s" in done.stdout and "of the mapped file" in done.stdout


def test_bench_at_depths(run_inline: Run, model_files: Models) -> None:
    model = model_files["random"]
    done = run_inline("bench", model, "-p", "32,100", "-n", "0", "-d", "0,1k", "-r", "1", "--json")
    assert done.returncode == 0, done.stderr
    tests = json.loads(done.stdout)["tests"]
    assert [(t["kind"], t["n"], t["depth"]) for t in tests] == [
        ("prefill", 32, 0), ("prefill", 100, 0), ("prefill", 32, 1024), ("prefill", 100, 1024),
    ]  # fmt: skip
    done = run_inline("bench", model, "-p", "0", "-n", "4", "-d", "300", "-r", "1")
    assert done.returncode == 0 and "at depth 300" in done.stdout and "copies of their pages" in done.stdout
    for options, message in (
        (["-p", "4000", "-n", "0", "-d", "200"], "needs 4,200 tokens"),
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-d", "0,x"], "-d '0,x': expected a whole number"),
    ):
        done = run_inline("bench", model, *options)
        assert done.returncode == 2 and message in done.stderr


def test_a_depth_is_pages_of_its_own(opened: Callable[[str], Any]) -> None:
    from m2lite.bench import fill
    from m2lite.engine.thread import compute_thread

    model = opened("random")
    with model.session() as session:
        session.set_tokens(fill(model, 1000))
        assert session.n_cached == len(session.tokens) == 1000
        timeline, _ = compute_thread().run(lambda: model.loop.prefix_cache.fork(session.tokens, 1000))
        assert timeline.length == 1000
        assert len(set(timeline.pages)) == len(timeline.pages) == 16
        compute_thread().run(timeline.release)
        tokens = list(session.generate([65], max_tokens=3, ignore_stop=True))
        assert len(tokens) == 3 and len(session.tokens) == 1004
        assert session.stats.n_reused == 1000


def test_doctor(run_inline: Run) -> None:
    done = run_inline("doctor", "--ram", "4g")
    assert done.returncode == 0 and "ram             4.00 GiB (--ram)" in done.stdout
    for name in ("processor", "features", "integer products", "threading layer", "kernel cache", "memory"):
        assert re.search(rf"^{name} +\S", done.stdout, re.MULTILINE)


def test_convert_refuses(run_m2lite: Run, tmp_path: Path) -> None:
    done = run_m2lite("convert", tmp_path, "-o", tmp_path / "out.gguf", "--type", "q9_9")
    assert done.returncode == 2 and "q9_9" in one_line_error(done)
    done = run_m2lite("convert", tmp_path, "-o", tmp_path / "out.gguf")
    assert done.returncode in (2, 4) and one_line_error(done)
    assert not (tmp_path / "out.gguf").exists()


# --- signals and pipes


@contextmanager
def started(
    command_env: dict[str, str], *arguments: str | Path, ignored: bool = False
) -> Iterator[tuple[Any, IO[bytes], IO[bytes]]]:
    """The process and its two outputs."""
    command = [sys.executable, "-m", "m2lite", *map(str, arguments)]
    with ignored_signals(signal.SIGINT, signal.SIGHUP) if ignored else default_signals():
        opened = subprocess.Popen(command, env=command_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with opened as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield process, process.stdout, process.stderr
        finally:
            process.kill()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_signal_while_answering(command_env: dict[str, str], model_files: Models, number: int, code: int) -> None:
    arguments = ("generate", model_files["answer"], "-p", "x", "-n", "1000000")
    with started(command_env, *arguments) as (process, out, err):
        first = out.read(3)
        process.send_signal(number)
        rest = out.read()
        errors = err.read().decode()
        assert process.wait(PATIENCE_S) == code, errors
    assert first == b"abc" and rest.endswith(b"\n") and set(rest) <= set(b"abcdefg\n")
    assert "Traceback" not in errors


def test_signal_gives_json_of_what_there_is(command_env: dict[str, str], tmp_path: Path) -> None:
    """Nothing tells how far it is; so it is given longer until it has said something, and never ends by itself."""
    shape = tinymodel.Shape(n_ctx=1 << 20)
    model = tinymodel.write_model(tmp_path / "long.gguf", tinymodel.ENDLESS_ANSWER, shape=shape)
    for delay in (0.1, 0.5, 2.5, 10, 50):
        with started(command_env, "generate", model, "-p", "x", "--json", "--ctx", "1m") as (process, out, err):
            while b"loaded in" not in err.readline():
                pass
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            found = json.loads(out.read())
            assert process.wait(PATIENCE_S) == 130
        assert found["finish_reason"] == "interrupted"
        assert set(found["text"]) <= set("abcdefg")
        if found["text"].startswith("abcdefgabc"):
            return
    pytest.fail(f"nothing was said in {delay} s")


@pytest.mark.parametrize("delay", [0.15, 0.3, 0.45])
def test_signal_while_loading(command_env: dict[str, str], model_files: Models, delay: float) -> None:
    with started(command_env, "generate", model_files["answer"], "-p", "x") as (process, _, err):
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        errors = err.read()
        assert process.wait(PATIENCE_S) in (130, -signal.SIGINT)  # the latter before our first line has run
        if process.returncode == 130:
            assert b"Traceback" not in errors


def test_signals_that_were_ignored_stay_so(command_env: dict[str, str], model_files: Models) -> None:
    """Under nohup, and behind a script's &: the work is done to its end, unless SIGTERM comes."""
    arguments = ("generate", model_files["answer"], "-p", "x", "-n", "1000000")
    for number, code in ((signal.SIGHUP, 0), (signal.SIGINT, 0), (signal.SIGTERM, 143)):
        with started(command_env, *arguments, ignored=True) as (process, out, err):
            first = out.read(3)
            process.send_signal(number)
            n = len(first + out.read())
            assert process.wait(60) == code, err.read()
            assert code or n > 3000  # the whole context


def test_reader_that_goes_away(command_env: dict[str, str], model_files: Models) -> None:
    with started(command_env, "generate", model_files["answer"], "-p", "x") as (process, out, err):
        out.read(3)
        out.close()
        errors = err.read().decode()
        assert process.wait(PATIENCE_S) == 0
    assert "Traceback" not in errors and "Broken" not in errors


def test_the_slow_threading_layer_is_said(run_m2lite: Run, model_files: dict[str, Path]) -> None:
    arguments = ("generate", model_files["reply"], "-p", "x", "-n", "3", "--temp", "0")
    done = run_m2lite(*arguments, env={"NUMBA_THREADING_LAYER": "workqueue"})
    assert done.returncode == 0, done.stderr
    assert "threads (workqueue)" in done.stderr
    assert "install libgomp" in done.stderr
    assert done.stdout == run_m2lite(*arguments).stdout


def test_a_threading_layer_that_is_not_there_is_said(run_m2lite: Run, model_files: dict[str, Path]) -> None:
    env = {"NUMBA_THREADING_LAYER": "tbb", "NUMBA_NUM_THREADS": "0", "NUMBA_DISABLE_JIT": "1", "NUMBA_ENABLE_AVX": "0"}
    done = run_m2lite("generate", model_files["reply"], "-p", "x", env=env)
    assert (done.returncode, done.stdout) == (0, "Fine é\n"), done.stderr
    assert "warning: NUMBA_NUM_THREADS=0 is not used: expected a number from 1 to 1024" in done.stderr
    assert "warning: NUMBA_DISABLE_JIT=1 is not used" in done.stderr
    if "threads (tbb)" not in done.stderr:
        assert "warning: NUMBA_THREADING_LAYER=tbb cannot be had here: " in done.stderr


def test_the_seed_that_is_said_is_the_requests(run_inline: Run, model_files: Models, tmp_path: Path) -> None:
    request = tmp_path / "request.json"
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    for extra, options, said in (
        ({"seed": 77}, (), "seed 77"), ({"seed": 77}, ("--seed", "5"), "seed 77"), ({}, ("--seed", "5"), ""),
        ({"temperature": 0}, (), ""), ({"temperature": 1, "seed": 8}, ("--temp", "0"), "seed 8"),
    ):  # fmt: skip
        request.write_text(json.dumps(body | extra))
        done = run_inline("generate", model_files["random"], "--request", request, *options)
        assert done.returncode == 0, done.stderr
        assert [line for line in done.stderr.splitlines() if line.startswith("seed ")] == [said] * bool(said)


def test_shell_completion(run_m2lite: Run) -> None:
    env = {"_M2LITE_COMPLETE": "complete_bash", "COMP_WORDS": "m2lite gen", "COMP_CWORD": "1"}
    assert run_m2lite(env=env).stdout.split() == ["generate"]
