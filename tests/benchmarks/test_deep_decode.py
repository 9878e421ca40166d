"""benchmarks/deep_decode.py: what llama-completion of llama.cpp 0c1e570 logs, and prompts of exact length."""

from __future__ import annotations

from pathlib import Path

import pytest

import deep_decode
from m2lite import Model
from runs import RunError, Work

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long

LOG = """
0.04.535.445 I common_perf_print:    sampling time =       1.68 ms
0.04.535.579 I common_perf_print: prompt eval time =     268.24 ms /     1 tokens
0.04.535.617 I common_perf_print:        eval time =    8000.00 ms /    32 runs
"""


def work_on(path: Path) -> Work:
    return Work(model=path, prompts=(), decodes=(32,), depths=(16384,), threads=2, repeats=1)


def test_times_are_read(tmp_path: Path) -> None:
    [test], _ = deep_decode.parse_completion(work_on(tmp_path), LOG)
    assert (test["kind"], test["n"], test["depth"], test["samples"]) == ("decode", 32, 16384, [4.0])


def test_a_prompt_that_was_not_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="16383 tokens of a prompt"):
        deep_decode.parse_completion(work_on(tmp_path), LOG.replace("/     1 tokens", "/ 16383 tokens"))
    with pytest.raises(RunError, match="no times"):
        deep_decode.parse_completion(work_on(tmp_path), "failed to load the model")


@pytest.mark.parametrize("n", [1, 100, 257])
def test_a_prompt_has_exactly_so_many_tokens(model_files: dict[str, Path], n: int) -> None:
    path = model_files["random"]
    text = deep_decode.prompt_of(path, n)
    with Model.open(path, ctx=64) as model:
        assert len(model.encode_prompt(text)) == n
