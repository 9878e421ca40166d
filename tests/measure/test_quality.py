"""Perplexity and divergence against a plain NumPy computation from the model's logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import tinymodel
from m2lite import Model, UsageError
from m2lite.engine.thread import compute_thread
from m2lite.measure.quality import SLICE_ROWS, format_perplexity, mean_error, perplexity
from m2lite.simd.tuning import DEFAULTS, VALUES
from tests.golden.compare import log_softmax
from tests.model.test_refused import rewrite

Opened = Callable[[str], Model]
TOKENS = [int(i) for i in np.random.default_rng(3).integers(0, 256, 1350)]
N_CTX = 600  # more than one call's rows, and not a multiple of what is scored at a time


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Other weights, and fewer rows a call."""
    path = tinymodel.write_model(tmp_path_factory.mktemp("other") / "other.gguf", seed=1)
    with Model.open(path, ctx=2048) as model:
        model.n_rows = 250
        yield model


def scored(model: Model, n_ctx: int) -> np.ndarray:
    """Log-probabilities [chunks, scored, n_vocab] of the second halves."""
    chunks = np.reshape(TOKENS[: len(TOKENS) // n_ctx * n_ctx], (-1, n_ctx))
    return np.stack([log_softmax(model.logits(c.tolist()))[n_ctx // 2 : -1] for c in chunks])


def nll_of(log_p: np.ndarray, n_ctx: int) -> np.ndarray:
    targets = np.reshape(TOKENS[: len(log_p) * n_ctx], (-1, n_ctx))[:, n_ctx // 2 + 1 :]
    return -np.take_along_axis(log_p, targets[..., None], axis=-1).reshape(-1)


@pytest.mark.parametrize("n_ctx", [8, 9, N_CTX])
def test_perplexity_is_that_of_the_logits(opened: Opened, n_ctx: int) -> None:
    model = opened("random")
    nll = nll_of(scored(model, n_ctx), n_ctx)
    found = perplexity(model, TOKENS, n_ctx)
    assert found is not None and found.against is None
    assert (found.n_tokens, found.n_chunks) == (len(nll), len(TOKENS) // n_ctx)
    assert found.n_tokens == found.n_chunks * (n_ctx - 1 - n_ctx // 2)
    error = nll.std(ddof=1) / len(nll) ** 0.5
    expected = [nll.mean(), error, np.exp(nll.mean()), np.exp(nll.mean()) * error]
    # The sums are taken in another order than NumPy's.
    assert [found.nll, found.nll_error, found.ppl, found.ppl_error] == pytest.approx(expected, rel=1e-12)


def test_divergence_is_that_of_the_logits(opened: Opened, other: Model) -> None:
    model = opened("random")
    log_q, log_p = scored(model, N_CTX), scored(other, N_CTX)
    nll, other_nll = nll_of(log_q, N_CTX), nll_of(log_p, N_CTX)
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1).reshape(-1)
    same = (log_p.argmax(axis=-1) == log_q.argmax(axis=-1)).mean()
    n, ppl, other_ppl = len(nll), np.exp(nll.mean()), np.exp(other_nll.mean())
    found = perplexity(model, TOKENS, N_CTX, against=other)
    assert found is not None and found.against is not None
    d, plain = found.against, perplexity(other, TOKENS, N_CTX)
    assert plain is not None
    assert (d.other, d.other_nll, d.other_nll_error) == (plain.model, plain.nll, plain.nll_error)
    assert (d.other_ppl, d.other_ppl_error) == (plain.ppl, plain.ppl_error)
    assert replace(found, against=None) == perplexity(model, TOKENS, N_CTX)

    def error(values: np.ndarray) -> float:
        return float(values.std(ddof=1) / n**0.5)

    cov = np.cov(nll, other_nll)[0, 1] / n
    ratio_error = (error(nll) ** 2 + error(other_nll) ** 2 - 2 * cov) ** 0.5
    a, b = ppl * error(nll), other_ppl * error(other_nll)
    p_diff = np.exp(-nll) - np.exp(-other_nll)
    rms = (p_diff**2).mean() ** 0.5
    expected = {
        "log_ratio": nll.mean() - other_nll.mean(),
        "log_ratio_error": ratio_error,
        "ppl_difference": ppl - other_ppl,
        "ppl_difference_error": (a**2 + b**2 - 2 * ppl * other_ppl * cov) ** 0.5,
        "kl": kl.mean(),
        "kl_error": error(kl),
        "kl_max": kl.max(),
        "same_top": same,
        "same_top_error": (same * (1 - same) / (n - 1)) ** 0.5,
        "p_rms": rms,
        "p_rms_error": error(p_diff**2) / (2 * rms),
    }
    # Errors are differences of close numbers here; the code takes them of the differences themselves.
    assert {name: getattr(d, name) for name in expected} == pytest.approx(expected, rel=1e-9)
    assert d.kl_percentiles["90"] == pytest.approx(np.percentile(kl, 90), rel=1e-9)
    assert list(d.kl_percentiles) == ["50", "90", "95", "99", "99.9"]
    assert d.kl > 0.01 and 0 < d.same_top < 1


def test_figures_of_llama_perplexity(opened: Opened, other: Model) -> None:
    """What llama-perplexity (llama.cpp in llama-cpp-python 0.3.36) prints for these two files and this text.

    -c 128 with --kl-divergence-base on the other, then --kl-divergence. Within 1 %: the base is kept in 16 bits there,
    and sums in another order send a few tokens to other experts.
    """
    found = perplexity(opened("random"), " ".join(str(i * i) for i in range(700)), 128, against=other)
    assert found is not None and found.against is not None
    d = found.against
    assert (found.n_chunks, found.n_tokens) == (34, 34 * 63)
    assert [found.ppl, d.other_ppl] == pytest.approx([502.743127, 409.842498], rel=0.002)
    assert [found.ppl_error, d.other_ppl_error] == pytest.approx([10.156253, 9.590256], rel=0.002)
    assert [d.log_ratio, d.log_ratio_error] == pytest.approx([0.204306, 0.028928], rel=0.01)
    assert [d.ppl_difference, d.ppl_difference_error] == pytest.approx([92.900629, 13.062721], rel=0.01)
    assert [d.kl, d.kl_error, d.kl_max] == pytest.approx([1.020223, 0.002404, 1.566699], rel=0.01)
    expected = {"50": 1.007415, "90": 1.170446, "95": 1.215551, "99": 1.307912, "99.9": 1.515081}
    assert d.kl_percentiles == pytest.approx(expected, rel=0.01)


def test_a_file_does_not_diverge_from_itself(opened: Opened, model_files: dict[str, Path]) -> None:
    model = opened("random")
    with pytest.raises(UsageError, match=r"random\.gguf was to be compared with itself"):
        perplexity(model, TOKENS[:200], 64, against=model)
    with Model.open(model_files["random"], ctx=64) as again:
        found = perplexity(model, TOKENS[:200], 64, against=again)
    assert found is not None and found.against is not None
    d = found.against
    assert (d.kl, d.kl_max, d.kl_error, d.log_ratio, d.ppl_difference, d.p_rms) == (0, 0, 0, 0, 0, 0)
    assert (d.log_ratio_error, d.ppl_difference_error, d.p_rms_error) == (0, 0, 0)
    assert (d.same_top, d.same_top_error) == (1, 0)


def test_threads_and_rows_change_nothing(
    model_files: dict[str, Path], opened: Opened, other: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = perplexity(opened("random"), TOKENS, N_CTX, against=other)
    assert expected is not None
    for table in (DEFAULTS, VALUES):
        monkeypatch.setitem(table, "alone_macs", 0)
    with Model.open(model_files["random"], ctx=640, threads=1) as model:
        model.n_rows = 100
        assert perplexity(model, TOKENS, N_CTX, against=other) == expected
        # Memory: logits of a slice of rows, never of a chunk.
        assert len(model.runner.buffers.logits) == SLICE_ROWS
        assert compute_thread().run(lambda: model.runner.pool.n_free) == 640


def test_stopping_keeps_whole_chunks(opened: Opened) -> None:
    model, heard = opened("random"), []
    n_free = compute_thread().run(lambda: model.runner.pool.n_free)

    def progress(n: int, n_all: int, ppl: float) -> None:
        heard.append((n, n_all, ppl))

    found = perplexity(model, TOKENS, 64, n_chunks=9, progress=progress, stop=lambda: len(heard) == 2)
    expected = perplexity(model, TOKENS, 64, n_chunks=2)
    assert found is not None and expected is not None
    assert found == replace(expected, n_chunks_asked=9)
    assert [(n, n_all) for n, n_all, _ in heard] == [(1, 9), (2, 9)]
    assert heard[1][2] == pytest.approx(found.ppl, rel=1e-12)
    assert "in 2 of 9 chunks" in format_perplexity(found)
    assert perplexity(model, TOKENS, 64, stop=lambda: True) is None
    assert compute_thread().run(lambda: model.runner.pool.n_free) == n_free


def test_a_stop_within_a_chunk_leaves_none_of_it(opened: Opened) -> None:
    model, asked = opened("random"), []

    def stop() -> bool:
        asked.append(1)
        return len(asked) == n_stop

    expected = perplexity(model, TOKENS, 160, n_chunks=1)
    assert expected is not None
    perplexity(model, TOKENS, 160, n_chunks=2, stop=lambda: bool(asked.append(1)))
    n_stop = len(asked)  # the last time it is asked: between two slices of the second chunk
    asked.clear()
    assert perplexity(model, TOKENS, 160, n_chunks=2, stop=stop) == replace(expected, n_chunks_asked=2)


def test_other_vocabularies_are_refused(opened: Opened, model_files: dict[str, Path], tmp_path: Path) -> None:
    model = opened("random")
    with Model.open(None, ctx=64) as bundled, pytest.raises(UsageError, match=r"different vocabularies: 272 and 4,"):
        perplexity(model, TOKENS, 32, against=bundled)
    tokens = [model.tokenizer.token_text(i) for i in range(tinymodel.N_VOCAB)]
    tokens[268] = "<other>"
    path = rewrite(model_files["random"], tmp_path / "other.gguf", {"tokenizer.ggml.tokens": tokens})
    with (
        Model.open(path, ctx=64) as changed,
        pytest.raises(UsageError, match=r"random.gguf and other.gguf have .*: token 268 is '<unused\d>' and '<other>'"),
    ):
        perplexity(model, TOKENS, 32, against=changed)


def test_the_other_needs_the_context_too(opened: Opened, model_files: dict[str, Path]) -> None:
    with Model.open(model_files["random"], ctx=64) as small, pytest.raises(UsageError, match="8 to 64 are possible"):
        perplexity(opened("random"), TOKENS, 128, against=small)


def test_mean_and_its_error() -> None:
    mean, error = mean_error(np.array([1.0, 2.0, 6.0]))
    assert mean == 3 and error == pytest.approx((7 / 3) ** 0.5)  # sample variance 7, of three values
    assert mean_error(np.array([5.0])) == (5, 0)


def test_report_and_json_hold_the_figures(opened: Opened, other: Model) -> None:
    found = perplexity(opened("random"), TOKENS, 100, against=other)
    assert found is not None and found.against is not None
    again = json.loads(json.dumps(asdict(found), allow_nan=False))
    assert again["ppl"] == found.ppl and again["against"]["kl_percentiles"]["99.9"] > again["against"]["kl"]
    text = format_perplexity(found)
    for figure in (f"{found.ppl:.4f} ±", f"{found.against.kl:.6f} ±", f"{found.against.same_top:.2%} ±", "637 tokens"):
        assert figure in text
    assert "against" not in format_perplexity(replace(found, against=None))
