"""lm-evaluation-harness with a task of its own: its log likelihoods are those of the logits in this process, and that
of the second half of a text is the one of which `m2lite perplexity` tells the mean."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from m2lite import Model
from m2lite.measure.quality import log_softmax
from tests.clients.checks import Report, environment, last_line
from tests.clients.install import folder
from tests.clients.started import MODEL, ROOT, Failed, Started

NAME, PACKAGE = "lm-eval", "lm-eval[api]==0.4.13"
_TASK = "colors"
_YAML = f"""task: {_TASK}
dataset_path: json
dataset_kwargs:
  data_files:
    test: PATH
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
"""
_LINES = [
    {"question": "The grass in the garden is", "choices": ["green", "blue", "a house", "red and white"], "answer": 0},
    {"question": "On a clear day the sky is", "choices": ["loud", "blue"], "answer": 1},
    {"question": "Snow falls in winter, and it is", "choices": ["white", "black", "warm"], "answer": 0},
]
_TEXT = """The boats come back before noon. Gulls follow them over the wall of the harbour, and old men on the stairs
count the boxes without a word. Then the women buy what is left: small fish, crabs, a bucket of shells. By two o'clock
the stones are dry again, and nobody would say that anything was ever sold here."""
_CLOSE = 1e-3  # JSON holds the numbers as float64; the harness adds them in another order


def evaluate(root: Path, n_layers: int | None = None) -> Report:
    report = Report(NAME, PACKAGE)
    (root / "home").mkdir(parents=True)
    server = Started.with_script(root, [], n_layers or 2)
    server.start()
    try:
        half = _halves(root / "test.gguf")
        found = _run(root, server, [*_LINES, {"question": half[0], "choices": [half[1], "so"], "answer": 0}])
        known = _by_logits(root, [each["arguments"] for each in found])
        worst = max(abs(each["logprob"] - logprob) for each, logprob in zip(found, known, strict=True))
        greatest = max(map(abs, known))
        report.steps["log likelihoods"] = "ok" if worst <= _CLOSE * greatest else f"they are off by up to {worst:.2g}"
        report.steps["perplexity"] = _compare_perplexity(root, half, found)
        report.refused = server.refused(0)
    except (Failed, subprocess.TimeoutExpired) as error:
        report.steps["log likelihoods" if "log likelihoods" not in report.steps else "perplexity"] = str(error)
    finally:
        server.stop()
    return report


def _run(root: Path, server: Started, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each choice with its context, and what the harness made of it."""
    data = root / "colors.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / f"{_TASK}.yaml").write_text(_YAML.replace("PATH", str(data)))
    options = f"model={MODEL},base_url={server.url}/v1/completions,num_concurrent=2,max_retries=1,timeout=3600"
    command = [
        str(folder(PACKAGE) / "lm_eval"), "run", "--model", "local-completions", "--model_args", options, "--tasks",
        _TASK, "--include_path", str(root), "--output_path", str(root / "found"), "--log_samples", "--batch_size", "4",
    ]  # fmt: skip
    env = environment(root / "home", folder(PACKAGE)) | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=env, cwd=root, timeout=300
    )
    (root / "output.txt").write_text(ended.stdout + ended.stderr)
    if ended.returncode:
        raise Failed(f"it ended with {ended.returncode}: {last_line(ended.stderr)}")
    samples = next((root / "found").rglob("samples_*.jsonl"), None)
    if samples is None:
        raise Failed("it wrote no samples")
    found = list[dict[str, Any]]()
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        arguments = [list(each.values()) for each in sample["arguments"].values()]
        for pair, answer in zip(arguments, sample["resps"], strict=True):
            found.append({"arguments": pair, "logprob": float(answer[0][0])})
    if len(found) != sum(len(line["choices"]) for line in lines):
        raise Failed(f"it has {len(found)} log likelihoods")
    return found


def _halves(model: Path) -> tuple[str, str]:
    """The beginning of a text and what follows a blank behind it, which are the halves of its tokens."""
    with Model.open(model) as opened:
        encode, decode = opened.tokenizer.encode, opened.tokenizer.decode
        ids = encode(_TEXT)
        for n in range(len(ids), 64, -1):  # a chunk's first n // 2 + 1 tokens are not scored
            begin, rest = decode(ids[: n // 2 + 1]), decode(ids[n // 2 + 1 : n])
            is_blank = rest[:1] == " " and not begin[-1:].isspace()
            if is_blank and encode(begin) == ids[: n // 2 + 1] and encode(begin + rest) == ids[:n]:
                return begin, rest[1:]
    raise Failed("the text has no halves")


def _compare_perplexity(root: Path, halves: tuple[str, str], found: list[dict[str, Any]]) -> str:
    begin, rest = halves
    (root / "text.txt").write_text(f"{begin} {rest}")
    with Model.open(root / "test.gguf") as model:
        n = len(model.tokenizer.encode(f"{begin} {rest}"))
    command = [sys.executable, "-m", "m2lite", "perplexity", "test.gguf", "text.txt", "-c", str(n), "--json"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root, env=env)
    if ended.returncode:
        raise Failed(f"m2lite perplexity ended with {ended.returncode}: {last_line(ended.stderr)}")
    told = json.loads(ended.stdout)
    known = -told["nll"] * told["n_tokens"]
    logprob = next(each["logprob"] for each in found if each["arguments"] == [begin, f" {rest}"])
    return "ok" if abs(logprob - known) <= _CLOSE * abs(known) else f"{logprob:.6f} where perplexity has {known:.6f}"


def _by_logits(root: Path, pairs: list[list[str]]) -> list[float]:
    """Of each continuation, from the logits of the model in this process."""
    found = list[float]()
    with Model.open(root / "test.gguf") as model:
        for context, more in pairs:
            n, ids = len(model.tokenizer.encode(context)), model.tokenizer.encode(context + more)
            logits = model.logits(ids)
            found.append(math.fsum(log_softmax(logits[i - 1])[ids[i]] for i in range(n, len(ids))))
    return found
