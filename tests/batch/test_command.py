"""`m2lite batch` as a whole: results, restarts, kills, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tinymodel
from m2lite import Model, Sampling
from m2lite.batch.lines import line_stream
from m2lite.dialogue.conversation import Conversation
from m2lite.storage.line_log import LineLog
from tests.children import PATIENCE_S, default_signals
from tests.conftest import Run

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

Models = dict[str, Path]
WORDS = [
    "cat", "dog", "king", "sea", "ship", "bird", "fox", "moon", "bread", "rain", "tree", "hill", "lamp", "door", "song",
    "wind", "star", "coat", "book", "road",
]  # fmt: skip


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def questions(n: int) -> list[dict[str, Any]]:
    return [
        {"custom_id": f"q-{word}", "prompt": f"Tell me a story about a {word}.", "max_tokens": 40} for word in WORDS[:n]
    ]


def results(path: Path) -> dict[str, Any]:
    """By name; a name that comes twice is no output of ours."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def text_of(line: dict[str, Any]) -> str:
    message = line["response"]["body"]["choices"][0]["message"]
    return f"{message.get('reasoning_content')}|{message['content']}"


@pytest.fixture(scope="module")
def twenty(run_m2lite: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Twenty questions, and what an undisturbed run answers."""
    folder = tmp_path_factory.mktemp("twenty")
    source = write(folder / "in.jsonl", questions(20))
    done = run_m2lite("batch", source, "-o", folder / "out.jsonl", "--seed", "5")
    assert done.returncode == 0, done.stderr
    assert "20 of 20 lines are done, 0 failed" in done.stderr
    return source, {name: text_of(line) for name, line in results(folder / "out.jsonl").items()}


def test_answers_are_those_of_each_alone(twenty: tuple[Path, dict[str, str]], bundled_model: Path) -> None:
    _, texts = twenty
    assert len(texts) == 20 and len(set(texts.values())) > 10
    with Model.open(bundled_model) as model:
        for question in questions(20)[::3]:
            with model.session() as session:
                conversation = Conversation(session)
                list(
                    conversation.reply_to(
                        [{"role": "user", "content": question["prompt"]}],
                        line_stream(question["custom_id"]),
                        sampling=Sampling(seed=5),
                        max_tokens=40,
                    )
                )
            reply = conversation.answer.reply
            assert texts[question["custom_id"]] == f"{reply.thinking or None}|{reply.content}"


@pytest.mark.parametrize("options", [["--inflight", "1"], ["--inflight", "3", "--threads", "1"], ["--ctx", "128"]])
def test_neither_mates_nor_threads_matter(
    run_m2lite: Run, tmp_path: Path, twenty: tuple[Path, dict[str, str]], options: list[str]
) -> None:
    source, texts = twenty
    lines = source.read_text().splitlines(keepends=True)
    other = tmp_path / "in.jsonl"
    other.write_text("".join(lines[::-1]))
    done = run_m2lite("batch", other, "-o", tmp_path / "out.jsonl", "--seed", "5", *options)
    assert done.returncode == 0, done.stderr
    assert {name: text_of(line) for name, line in results(tmp_path / "out.jsonl").items()} == texts


@pytest.mark.slow
def test_killed_after_each_line(
    command_env: dict[str, str], run_m2lite: Run, tmp_path: Path, twenty: tuple[Path, dict[str, str]]
) -> None:
    """kill -9 when a line more is there, twenty times; now and then a line is torn besides."""
    source, texts = twenty
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "m2lite", "batch", str(source), "-o", str(out), "--seed", "5", "--inflight", "2"]
    for k in range(1, 21):
        process = subprocess.Popen(command, env=command_env, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < k):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert out.read_bytes().count(b"\n") >= k
        if k % 3 == 0:
            with out.open("ab") as file:
                file.write(b'{"id": "batch_req_0", "custom_id": "q-')
        if out.read_bytes().count(b"\n") >= 20:
            break
    done = run_m2lite(*command[3:])
    assert done.returncode == 0, done.stderr
    assert {name: text_of(line) for name, line in results(out).items()} == texts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_and_gone_on_with(
    command_env: dict[str, str], run_m2lite: Run, tmp_path: Path, model_files: Models, number: int, code: int
) -> None:
    """What has ended is safe, and the command that goes on is printed."""
    lines = [{"custom_id": f"{n}", "prompt": "Hi", "max_tokens": 5} for n in range(3)]
    lines += [{"custom_id": "long", "prompt": "Hi", "max_tokens": 1_000_000}]
    source, out = write(tmp_path / "in put.jsonl", lines), tmp_path / "out.jsonl"
    arguments = ["batch", str(source), "-o", str(out), "--model", str(model_files["answer"])]
    with default_signals():
        process = subprocess.Popen(
            [sys.executable, "-m", "m2lite", *arguments], env=command_env, stderr=subprocess.PIPE, text=True
        )
    deadline = time.monotonic() + PATIENCE_S
    while not out.exists() or out.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code
    assert "stopped; 3 results are safe" in told and f"batch '{source}' -o {out}" in told
    assert "Traceback" not in told
    before = out.read_bytes()
    done = run_m2lite("batch", source, "-o", out, "--model", model_files["answer"], "--limit", "1", "--ctx", "256",
                      "--force")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.read_bytes().startswith(before) and set(results(out)) == {"0", "1", "2", "long"}


def test_what_is_done_is_not_done_again(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}])
    arguments = ("batch", source, "-o", tmp_path / "out.jsonl", "--model", model_files["reply"])
    assert run_inline(*arguments, "--limit", "1").returncode == 0
    assert len(results(tmp_path / "out.jsonl")) == 1
    status = json.loads(run_inline("batch", "status", tmp_path / "out.jsonl", "--json").stdout)
    assert (status["done"], status["failed"], status["left"], status["total"]) == (1, 0, 2, 3)
    done = run_inline(*arguments)
    assert "1 of 3 lines have a result already" in done.stderr and len(results(tmp_path / "out.jsonl")) == 3
    before = (tmp_path / "out.jsonl").read_bytes()
    done = run_inline(*arguments)
    assert done.returncode == 0 and "nothing was left to do" in done.stderr
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert "3 done, 0 failed, 0 left of 3" in run_inline("batch", "status", tmp_path / "out.jsonl").stdout


def test_changed_input_model_or_settings(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}]), tmp_path / "out.jsonl"
    arguments = ("batch", source, "-o", out, "--model", model_files["reply"])
    assert run_inline(*arguments).returncode == 0
    before = out.read_bytes()
    for options, said in [
        (("--temp", "0.5"), "temperature: 1.0 there, 0.5 now"),
        (("--kv", "q8_0"), "kv: 'f16' there, 'q8_0' now"),
        (("--model", model_files["answer"]), "model: 'reply.gguf' there, 'answer.gguf' now"),
        (("--shard", "1/2"), "shard: '1/1' there, '1/2' now"),
        (("--stop", "x"), "stop: [] there, ['x'] now"),
    ]:
        done = run_inline(*arguments, *options)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    write(source, [{"prompt": "a"}, {"prompt": "b"}])
    done = run_inline(*arguments)
    assert done.returncode == 2 and "input_sha256" in done.stderr and "lines: 1 there, 2 now" in done.stderr
    assert out.read_bytes() == before
    assert run_inline(*arguments, "--force").returncode == 0
    assert len(results(out)) == 2


def test_a_template_that_reads_the_clock(run_inline: Run, tmp_path: Path) -> None:
    """Another day is another prompt: a batch goes on with it only if it is told to."""
    text = "{{ strftime_now('%d %B %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    model = tinymodel.write_model(tmp_path / "dated.gguf", tinymodel.REPLY, template=text)
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}]), tmp_path / "out.jsonl"
    for second, limit, code in ((0, "1", 0), (60, "1", 0), (86_400, "2", 2)):
        arguments = ("batch", source, "-o", out, "--model", model, "--limit", limit)
        done = run_inline(*arguments, env={"SOURCE_DATE_EPOCH": str(second), "TZ": "UTC"})
        assert done.returncode == code and ("template_date" in done.stderr) == (code == 2), done.stderr
    assert len(results(out)) == 2


def test_bad_lines(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": 3}\n{"custom_id": "x", "prompt": "b", "n": 2}\n{\n{"prompt": "c"}\n')
    arguments = ("batch", source, "-o", out, "--model", model_files["reply"])
    done = run_inline(*arguments)
    assert done.returncode == 2 and not out.exists()
    assert all(f"in.jsonl: line {n}: " in done.stderr for n in (2, 3, 4)) and "3 of 5 lines" in done.stderr
    done = run_inline(*arguments, "--on-bad-line", "record")
    assert done.returncode == 3 and "2 of 5 lines are done, 3 failed" in done.stderr
    found = results(out)
    assert {name for name, line in found.items() if line["error"]} == {"line-2", "x", "line-4"}
    assert "n is 2" in found["x"]["error"]["message"] and found["x"]["response"] is None
    assert found["line-5"]["response"]["body"]["choices"][0]["message"]["content"] == "Fine é"
    source.write_text(source.read_text().replace('"n": 2', '"n": 1'))
    done = run_inline(*arguments, "--on-bad-line", "record", "--retry-failed", "--force")
    assert done.returncode == 3 and results(out)["x"]["error"] is None and len(results(out)) == 5


def test_errors_of_single_lines(run_inline: Run, tmp_path: Path, bundled_model: Path) -> None:
    endless = {"type": "array", "items": {"type": "integer"}, "minItems": 900}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": endless}}
    source = write(
        tmp_path / "in.jsonl",
        [
            {"custom_id": "long", "prompt": "word " * 5000},
            {"custom_id": "cut", "prompt": "Count.", "response_format": schema, "max_tokens": 30},
            {"custom_id": "good", "prompt": "Hello"},
        ],
    )
    done = run_inline("batch", source, "-o", tmp_path / "out.jsonl", "--model", bundled_model)
    found = results(tmp_path / "out.jsonl")
    assert done.returncode == 3
    assert "1,024 are free of 1,024" in found["long"]["error"]["message"]
    assert "cut off after 30 tokens" in found["cut"]["error"]["message"]
    assert found["good"]["error"] is None


def test_stdin_and_stdout(run_m2lite: Run, model_files: Models) -> None:
    done = run_m2lite(
        "batch", "-", "-o", "-", "--model", model_files["reply"], stdin='{"prompt": "a"}\n{"prompt": "b"}\n'
    )
    assert done.returncode == 0
    assert [json.loads(line)["custom_id"] for line in done.stdout.splitlines()] == ["line-1", "line-2"]


@pytest.mark.parametrize("output", ["out.jsonl", "-"])
def test_results_as_the_input_has_them(run_inline: Run, tmp_path: Path, bundled_model: Path, output: str) -> None:
    """Short answers are done before long ones that came first."""
    lines = [{**line, "max_tokens": 30 if n % 3 else 90} for n, line in enumerate(questions(12))]
    source = write(tmp_path / "in.jsonl", lines)
    names = [line["custom_id"] for line in lines]
    found = {}
    for order in ("done", "input"):
        target = output if output == "-" else tmp_path / f"{order}-{output}"
        done = run_inline("batch", source, "-o", target, "--model", bundled_model, "--inflight", "6", "--order", order)
        assert done.returncode == 0, done.stderr
        text = done.stdout if output == "-" else target.read_text()
        found[order] = [json.loads(line) for line in text.splitlines()]
    for line in found["done"] + found["input"]:
        line["response"]["body"].pop("created")
    by_name = {order: [line["custom_id"] for line in rows] for order, rows in found.items()}
    assert by_name["input"] == names and by_name["done"] != names
    assert sorted(map(json.dumps, found["input"])) == sorted(map(json.dumps, found["done"]))
    if output != "-":  # a batch that is done can still be brought into order, and only then
        target = tmp_path / f"done-{output}"
        done = run_inline("batch", source, "-o", target, "--model", bundled_model, "--order", "input")
        assert done.returncode == 0 and "12 of 12 lines have a result already" in done.stderr
        assert list(results(target)) == names


def test_outputs_that_are_refused(run_inline: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    (tmp_path / "link").symlink_to(source)
    for output in (source, tmp_path / "link", tmp_path, tmp_path / "nowhere" / "out"):
        done = run_inline("batch", source, "-o", output, "--model", "nowhere.gguf")
        assert done.returncode == 2 and "nowhere.gguf" not in done.stderr, done.stderr
    assert source.read_text() == '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    "options",
    [["--shard", "0/2"], ["--shard", "3/2"], ["--shard", "x"], ["--on-bad-line", "skip"], ["--plot", "x.gif"],
     ["--inflight", "0"], ["--limit", "0"], ["--order", "random"]],
)  # fmt: skip
def test_bad_options(run_inline: Run, tmp_path: Path, options: list[str]) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}])
    assert run_inline("batch", source, "-o", tmp_path / "out.jsonl", *options).returncode == 2
    assert not (tmp_path / "out.jsonl").exists()


def test_empty_input(run_inline: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n\n")
    done = run_inline("batch", source, "-o", tmp_path / "out.jsonl")
    assert done.returncode == 2 and "holds no line" in done.stderr


def test_two_runs_on_one_output(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "Hi"}]), tmp_path / "out.jsonl"
    other = LineLog(out, keeps_lines=False)
    done = run_inline("batch", source, "-o", out, "--model", model_files["reply"])
    assert done.returncode == 2 and f"in use by pid {os.getpid()}" in done.stderr
    other.close()
    assert run_inline("batch", source, "-o", out, "--model", model_files["reply"]).returncode == 0


def test_shards_are_merged(run_inline: Run, tmp_path: Path, model_files: Models) -> None:
    source = write(tmp_path / "in.jsonl", [{"custom_id": f"n{n}", "prompt": "a"} for n in range(12)])
    outs = [tmp_path / f"{i}.jsonl" for i in (1, 2, 3)]
    for i, out in enumerate(outs, 1):
        done = run_inline("batch", source, "-o", out, "--model", model_files["reply"], "--shard", f"{i}/3")
        assert done.returncode == 0
    names = [set(results(out)) for out in outs]
    assert sum(map(len, names)) == 12 and all(names)
    done = run_inline("batch", "merge", *outs, "-o", tmp_path / "all.jsonl", "--input", source)
    assert done.returncode == 0 and "12 results" in done.stderr
    assert list(results(tmp_path / "all.jsonl")) == [f"n{n}" for n in range(12)]


def test_dry_run(run_inline: Run, tmp_path: Path, bundled_model: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*questions(5), {"prompt": "word " * 5000}])
    done = run_inline("batch", source, "-o", tmp_path / "out.jsonl", "--model", bundled_model, "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "out.jsonl").exists()
    assert "6 lines to answer" in done.stderr and "1 of them do not fit" in done.stderr and "tok/s" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot(run_inline: Run, tmp_path: Path, bundled_model: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{**line, "max_tokens": 400} for line in questions(20)])
    options = ("--model", bundled_model, "--inflight", "2", "--plot", tmp_path / "speed.png")
    assert run_inline("batch", source, "-o", tmp_path / "out.jsonl", *options).returncode == 0
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_stdout_that_is_closed(command_env: dict[str, str], tmp_path: Path, model_files: Models) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "a"}] * 1)
    read, written = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "m2lite", "batch", str(source), "-o", "-", "--model", str(model_files["reply"])],
        env=command_env, stdout=written, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False,
    )  # fmt: skip
    os.close(written)
    assert done.returncode == 0 and "Traceback" not in done.stderr
