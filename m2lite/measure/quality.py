"""Perplexity of a text, and how far a model's predictions are from another's. Knows no file, no terminal.

The conventions are those of llama-perplexity: the second half of each chunk is scored, a token's own chunk is all its
context; errors are those of a mean of independent values. Memory: SLICE_ROWS rows of logits per model (51 MB at
MiniMax-M2's vocabulary), and four numbers for every scored token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from m2lite.engine.thread import Stopped, compute_thread
from m2lite.errors import UsageError
from m2lite.measure.chunks import Ids, cut_chunks, feed_chunk
from m2lite.shown import shown

if TYPE_CHECKING:
    from m2lite.api import Model
    from m2lite.engine.runner import Stop

SLICE_ROWS = 64
PERCENTILES = (50, 90, 95, 99, 99.9)

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
# Of one token -ln p; beside another model also its -ln p, KL, and whether both hold the same token most likely.
Score = tuple[float, ...]
Progress = Callable[[int, int, float], None]  # chunks done, chunks in all, perplexity so far


@dataclass(frozen=True)
class Divergence:
    """The model against another: `other` is taken as the truth, as the base is in llama-perplexity."""

    other: str
    other_nll: float
    other_nll_error: float
    other_ppl: float
    other_ppl_error: float
    log_ratio: float  # mean of nll - other_nll: ln(ppl / other_ppl)
    log_ratio_error: float
    ppl_difference: float  # ppl - other_ppl
    ppl_difference_error: float
    kl: float  # mean over tokens of sum p_other ln(p_other / p)
    kl_error: float
    kl_max: float
    kl_percentiles: dict[str, float]
    same_top: float  # share of tokens for which both hold the same token most likely
    same_top_error: float
    p_rms: float  # root of the mean of (p - p_other)**2 of the text's own tokens
    p_rms_error: float


@dataclass(frozen=True)
class Perplexity:
    """What was measured on `n_chunks` of the `n_chunks_asked` chunks."""

    model: str
    n_ctx: int
    n_chunks: int
    n_chunks_asked: int
    n_tokens: int  # scored
    nll: float  # mean of -ln p of the text's own tokens
    nll_error: float
    ppl: float
    ppl_error: float
    against: Divergence | None


def log_softmax(logits: F32) -> F64:
    """Natural logarithms of the probabilities of one row [n_vocab], in float64."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return np.asarray(shifted - math.log(np.exp(shifted).sum()))


def perplexity(
    model: Model,
    text: str | Sequence[int],
    n_ctx: int = 512,
    *,
    against: Model | None = None,
    n_chunks: int | None = None,
    progress: Progress | None = None,
    stop: Stop | None = None,
) -> Perplexity | None:
    """Perplexity of a text (or its tokens) in chunks of `n_ctx`; with `against`, also KL(against || model) and more.

    When `stop` says so, it ends early with what whole chunks gave: None if there is none.
    """
    chunks = cut_chunks(model, text, n_ctx, n_chunks)
    models = [model]
    if against is not None:
        if against is model:
            raise UsageError(f"{model.path.name} was to be compared with itself.", "Open the file a second time.")
        check_same_vocabulary(model, against)
        cut_chunks(against, chunks[0].tolist(), n_ctx)  # for its checks
        models.append(against)
    scores, n_done = list[Score](), 0
    for chunk in chunks:
        try:
            scores += compute_thread().run(partial(_score_chunk, models, chunk, stop))
        except Stopped:
            break
        n_done += 1
        if progress is not None:
            progress(n_done, len(chunks), math.exp(float(np.mean([score[0] for score in scores]))))
    if not n_done:
        return None
    figures = np.array(scores).T.copy()  # [figures, tokens]
    nll, nll_error = mean_error(figures[0])
    ppl = math.exp(nll)
    return Perplexity(
        model=str(model.path),
        n_ctx=n_ctx,
        n_chunks=n_done,
        n_chunks_asked=len(chunks),
        n_tokens=len(scores),
        nll=nll,
        nll_error=nll_error,
        ppl=ppl,
        ppl_error=ppl * nll_error,
        against=None if against is None else _diverge(str(against.path), ppl, *figures),
    )


def check_same_vocabulary(model: Model, other: Model) -> None:
    """Raises UsageError unless every id means the same token to both."""
    what = f"{model.path.name} and {other.path.name} have different vocabularies"
    todo = "Compare files of one model."
    n, n_other = model.config.n_vocab, other.config.n_vocab
    if n != n_other:
        raise UsageError(f"{what}: {n:,} and {n_other:,} tokens.", todo)
    for i in range(n):
        token, other_token = model.tokenizer.token_text(i), other.tokenizer.token_text(i)
        if token != other_token:
            raise UsageError(f"{what}: token {i} is {token!r} and {other_token!r}.", todo)


def _score_chunk(models: Sequence[Model], chunk: Ids, stop: Stop | None) -> list[Score]:
    """All scored tokens of a chunk; on the compute thread."""
    runners, targets, scores = [model.runner for model in models], chunk.tolist(), list[Score]()

    def visit(first: int, n: int) -> None:
        begin, end = max(first, len(chunk) // 2), min(first + n, len(chunk) - 1)
        for start in range(begin, end, SLICE_ROWS):
            compute_thread().check()
            if stop is not None and stop():
                raise Stopped
            n_slice = min(SLICE_ROWS, end - start)
            logits = [runner.row_logits(start - first, n_slice) for runner in runners]
            scores.extend(score([rows[i] for rows in logits], targets[start + i + 1]) for i in range(n_slice))

    feed_chunk(models, chunk, visit, stop)
    return scores


def score(logits: Sequence[F32], target: int) -> Score:
    """Of a token, from its row [n_vocab] of each model."""
    found, *others = map(log_softmax, logits)
    if not others:
        return (-float(found[target]),)
    kl = (np.exp(others[0]) * (others[0] - found)).sum()
    return -float(found[target]), -float(others[0][target]), float(kl), logits[0].argmax() == logits[1].argmax()


def mean_error(values: F64) -> tuple[float, float]:
    """Mean, and its standard error if the values were independent."""
    return float(values.mean()), math.sqrt(float(values.var()) / max(1, len(values) - 1))


def _diverge(path: str, ppl: float, nll: F64, other_nll: F64, kl: F64, is_same: F64) -> Divergence:
    n = len(nll)
    other, other_error = mean_error(other_nll)
    other_ppl = math.exp(other)
    log_ratio, log_ratio_error = mean_error(nll - other_nll)
    # Error of exp(mean a) - exp(mean b) to first order: that of the mean of ppl a - other_ppl b.
    difference_error = mean_error(ppl * nll - other_ppl * other_nll)[1]
    kl_mean, kl_error = mean_error(kl)
    same_top = float(is_same.mean())
    p_square, p_square_error = mean_error((np.exp(-nll) - np.exp(-other_nll)) ** 2)
    p_rms = math.sqrt(p_square)
    return Divergence(
        other=path,
        other_nll=other,
        other_nll_error=other_error,
        other_ppl=other_ppl,
        other_ppl_error=other_ppl * other_error,
        log_ratio=log_ratio,
        log_ratio_error=log_ratio_error,
        ppl_difference=ppl - other_ppl,
        ppl_difference_error=difference_error,
        kl=kl_mean,
        kl_error=kl_error,
        kl_max=float(kl.max()),
        kl_percentiles={f"{p:g}": float(v) for p, v in zip(PERCENTILES, np.percentile(kl, PERCENTILES), strict=True)},
        same_top=same_top,
        same_top_error=math.sqrt(same_top * (1 - same_top) / max(1, n - 1)),
        p_rms=p_rms,
        p_rms_error=p_square_error / (2 * p_rms) if p_rms else 0.0,
    )


def format_perplexity(found: Perplexity) -> str:
    of = "" if found.n_chunks == found.n_chunks_asked else f" of {found.n_chunks_asked:,}"
    lines = [
        shown(found.model),
        f"perplexity  {found.ppl:.4f} ± {found.ppl_error:.4f}  (nll {found.nll:.5f} ± {found.nll_error:.5f}; "
        f"{found.n_tokens:,} tokens in {found.n_chunks:,}{of} chunks of {found.n_ctx:,})",
    ]
    d = found.against
    if d is None:
        return "\n".join(lines)
    spread = ", ".join(f"{p} % {v:.5f}" for p, v in d.kl_percentiles.items())
    lines += [
        f"against {shown(d.other)}",
        f"its perplexity  {d.other_ppl:.4f} ± {d.other_ppl_error:.4f}",
        f"difference      {d.ppl_difference:+.4f} ± {d.ppl_difference_error:.4f}  "
        f"(ln of the ratio {d.log_ratio:+.6f} ± {d.log_ratio_error:.6f})",
        f"KL divergence   {d.kl:.6f} ± {d.kl_error:.6f}  ({spread}, max {d.kl_max:.5f})",
        f"same top token  {d.same_top:.2%} ± {d.same_top_error:.2%}",
        f"rms of delta p  {d.p_rms:.3%} ± {d.p_rms_error:.3%}",
    ]
    return "\n".join(lines)
