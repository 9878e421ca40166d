"""The commands that make and check files, as a user types them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from m2lite.quant.safetensors import SafetensorsFile
from tests.children import PATIENCE_S, default_signals
from tests.conftest import Run
from tests.quant import checkpoints

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

TEXT = "One day a fox met an owl by the river. They looked for the lantern until it was dark, and then they sang. " * 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(tmp_path_factory.mktemp("checkpoint"), checkpoints.small())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_dry_run_writes_nothing(run_inline: Run, checkpoint: Path, tmp_path: Path) -> None:
    done = run_inline("convert", checkpoint, "-o", tmp_path / "out.gguf", "--type", "q4_k_m", "--dry-run")
    assert done.returncode == 0
    assert "bits per weight" in done.stdout and "ffn_down_exps" in done.stdout
    assert "MXFP4" not in done.stdout and "Q5_0" in done.stdout  # 64 weights are no block of 256
    assert list(tmp_path.iterdir()) == []
    done = run_inline("convert", checkpoint, "-o", tmp_path / "out.gguf", "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert [file["name"] for file in plan["files"]] == ["out.gguf", "mtp-out.gguf"]
    assert plan["disk_needed_bytes"] > 0 and list(tmp_path.iterdir()) == []


def test_what_is_in_doubt_is_told_before_the_work(run_inline: Run, checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "hf"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "revision_of_text\x1b[31m": 0.7}))
    (folder / "generation_config.json").write_text('{"eos_token_id": [289, 40]}')
    for more in (["--dry-run", "--json"], ["--json"]):
        done = run_inline("convert", folder, "-o", tmp_path / "out.gguf", "--type", "q8_0", *more)
        assert done.returncode == 0 and len(json.loads(done.stdout)["warnings"]) == 2
        told = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
        assert "revision_of_text\\x1b[31m (0.7)" in told[0] and "\x1b" not in done.stderr
        assert "generation_config.json ends a reply at 40 " in told[1] and len(told) == 2
    found = json.loads(run_inline("inspect", tmp_path / "out.gguf", "--json").stdout)["tokenizer"]
    assert (found["eos_id"], found["stop_ids"]) == (289, [40, 289]) and found["stop_tokens"][1] == "[e~["
    assert "stop_ids [40, 289]" in run_inline("inspect", tmp_path / "out.gguf").stdout


def test_a_size_that_is_too_small_is_told_in_the_options_unit(
    run_inline: Run, checkpoint: Path, tmp_path: Path
) -> None:
    done = run_inline("convert", checkpoint, "-o", tmp_path / "out.gguf", "--target-size", "1k")
    assert done.returncode == 2 and "where 1.00 KiB (1,024 bytes) were asked for" in done.stderr
    (least,) = re.findall(r"takes [\d.]+ KiB \(([\d,]+) bytes\)", done.stderr)
    done = run_inline("convert", checkpoint, "-o", tmp_path / "least.gguf", "--target-size", least)
    assert done.returncode == 0 and (tmp_path / "least.gguf").stat().st_size == int(least.replace(",", ""))
    done = run_inline("convert", checkpoint, "-o", tmp_path / "out.gguf", "--type", "q8_0", "--dry-run")
    sizes = re.findall(r"[\d.,]+ ([kKMGT]?i?B)\b(?!/s)", done.stdout)
    assert len(sizes) > 10 and set(sizes) <= {"B", "KiB", "MiB", "GiB", "TiB"}


def test_convert_verify_and_damage(run_inline: Run, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = run_inline("convert", checkpoint, "-o", out, "--type", "q8_0", "--tensor-type", "ffn_up=f16")
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mtp-out.gguf", "out.gguf"]
    done = run_inline("verify", out, "--against", checkpoint, "--samples", "100", "--no-run")
    assert done.returncode == 0 and "every byte is what was written" in done.stdout
    found = json.loads(run_inline("verify", out, "--json").stdout)
    assert found["ok"] and found["n_hashed"] == found["n_tensors"] and found["answer"]["n_tokens"] > 0
    raw = bytearray(out.read_bytes())
    raw[-1000] ^= 1
    out.write_bytes(raw)
    done = run_inline("verify", out)
    assert done.returncode == 4 and "WRONG" in done.stdout and "one prompt" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--type", "q9_9"], "q9_9"),
        (["--tensor-type", "ffn_up"], "ffn_up"),
        (["--tensor-type", "ffn_up=q9"], "q9"),
        (["--tensor-type", "(=q8_0"], "("),
        (["--target-size", "much"], "--target-size"),
        (["--target-size", "1k"], "smallest"),
        (["--split-max-size", "0"], "--split-max-size"),
        (["--alignment", "100"], "--alignment"),
        (["--imatrix", "missing.gguf"], "missing.gguf"),
    ],
)
def test_a_bad_option_writes_nothing(
    run_inline: Run,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.setattr(SafetensorsFile, "read", None)  # headers may be looked at, no tensor
    done = run_inline("convert", checkpoint, "-o", tmp_path / "out.gguf", *arguments)
    assert done.returncode in (2, 4) and words in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_importance_perplexity_and_quantize(run_inline: Run, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    full, small, matrix = tmp_path / "full.gguf", tmp_path / "small.gguf", tmp_path / "imatrix.gguf"
    assert run_inline("convert", checkpoint, "-o", full, "--type", "f32", "--no-mtp").returncode == 0
    done = run_inline("imatrix", full, text, "-o", matrix, "-c", "128")
    assert done.returncode == 0 and "experts that no token reached" in done.stdout
    assert run_inline("imatrix", full, text, "-o", matrix).returncode == 2  # exists
    assert run_inline("quantize", full, "-o", small, "--type", "q4_0", "--imatrix", matrix).returncode == 0
    again = run_inline("quantize", small, "-o", tmp_path / "again.gguf", "--type", "iq4_nl")
    assert again.returncode == 2 and "--allow-requantize" in again.stderr
    done = run_inline("perplexity", small, text, "--against", full, "-c", "128", "--json")
    found = json.loads(done.stdout)
    assert found["ppl"] > 1 and found["against"]["kl"] > 0 and 0 <= found["against"]["same_top"] <= 1
    done = run_inline("perplexity", full, text, "--against", full, "-c", "128", "--chunks", "1")
    assert done.returncode == 0 and "chunks of 128" in done.stdout


STOP_AT_12 = """
import os, signal
from m2lite import cli
from m2lite.quant import job
write, n_writes = job._Writer.write, 0
def stop(self, *args):
    global n_writes
    n_writes += 1
    if n_writes == 12:
        os.kill(os.getpid(), signal.SIGINT)
    return write(self, *args)
job.BATCH_BYTES, job._Writer.write = 1000, stop
cli.main()
"""


def test_an_interrupted_convert_goes_on(
    run_m2lite: Run, command_env: dict[str, str], checkpoint: Path, tmp_path: Path
) -> None:
    """Ctrl-C leaves a part and says how to go on; the next run ends with the bytes of one that was left alone."""
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    options = ("--type", "q8_0")
    command = [sys.executable, "-c", STOP_AT_12, "convert", str(checkpoint), "-o", str(out), *options]
    with default_signals():
        done = subprocess.run(command, env=command_env, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert done.returncode == 130 and "run the same command again" in done.stderr, done.stderr
    assert not out.exists() and (tmp_path / "out.gguf.part").exists()
    done = run_m2lite("convert", checkpoint, "-o", out, *options)
    assert done.returncode == 0 and "went on from" in done.stderr
    assert run_m2lite("convert", checkpoint, "-o", whole, *options).returncode == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mtp-out.gguf", "mtp-whole.gguf", "out.gguf", "whole.gguf"]
