"""A text as chunks of tokens, and a chunk through open models. Knows no figure that is made of it.

As llama.cpp's tools do it, so that figures compare: chunks of `n_ctx` tokens without overlap, each on a fresh timeline,
its first token replaced by the beginning-of-text token where the vocabulary adds one; what is left over is not used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from m2lite.errors import UsageError
from m2lite.system.inputs import read_input

if TYPE_CHECKING:
    from m2lite.api import Model
    from m2lite.engine.runner import Stop
    from m2lite.model.observer import Observer

MIN_CTX = 8
MOST_BYTES = 1 << 30  # of a text, unpacked

Ids = npt.NDArray[np.int64]
Visit = Callable[[int, int], None]  # position of the first row of a call, rows


def read_tokens(model: Model, path: str | os.PathLike[str]) -> list[int]:
    """The ids of a UTF-8 file; a newline at its very end does not count."""
    try:
        raw = read_input(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{path}: cannot be read: {reason}.", "Name a text file.") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}: is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}.", "Convert it to UTF-8 first."
        ) from None
    if not text.strip():
        raise UsageError(f"{path}: holds no text ({len(raw):,} bytes).", "Name a text file.")
    return model.encode_prompt(text.removesuffix("\n"))


def cut_chunks(model: Model, text: str | Sequence[int], n_ctx: int, n_chunks: int | None = None) -> Ids:
    """int64 [n, n_ctx]: all whole chunks of the text or its tokens, or the first `n_chunks` of them."""
    most = min(model.ctx, model.config.n_ctx_train)
    if not MIN_CTX <= n_ctx <= most:
        raise UsageError(
            f"Chunks of {n_ctx:,} tokens were asked for; {MIN_CTX} to {most:,} are possible.", "Change -c."
        )
    if n_chunks is not None and n_chunks < 1:
        raise UsageError(f"{n_chunks} chunks were asked for.", "Ask for at least one.")
    tokens = model.encode_prompt(text) if isinstance(text, str) else text
    n_found = len(tokens) // n_ctx
    if not n_found:
        smaller = f", or smaller chunks (-c {len(tokens)} or less)" if len(tokens) >= MIN_CTX else ""
        raise UsageError(
            f"The text has {len(tokens):,} tokens; one chunk needs {n_ctx:,}.", f"Use a longer text{smaller}."
        )
    n = n_found if n_chunks is None else min(n_chunks, n_found)
    chunks = np.array(tokens[: n * n_ctx], np.int64).reshape(n, n_ctx)
    wrong = (chunks < 0) | (chunks >= model.config.n_vocab)
    if wrong.any():
        raise UsageError(
            f"Token id {chunks[wrong][0]} is outside the vocabulary.", f"Ids go from 0 to {model.config.n_vocab - 1}."
        )
    bos_id = model.tokenizer.bos_id
    if model.tokenizer.add_bos and bos_id is not None:
        chunks[:, 0] = bos_id
    return chunks


def feed_chunk(
    models: Sequence[Model],
    chunk: Ids,
    visit: Visit | None = None,
    stop: Stop | None = None,
    observers: Sequence[Observer] = (),
) -> None:
    """A chunk through each of the models, some rows a call; a job of the compute thread.

    After each call `visit` is told of its rows, whose logits every model's runner can then say. Raises Stopped as soon
    as `stop` says so.
    """
    runners = [model.runner for model in models]
    n_rows = min(model.n_rows for model in models)
    timelines = [runner.pool.timeline() for runner in runners]
    try:
        for first in range(0, len(chunk), n_rows):
            part = chunk[first : first + n_rows]
            for runner, timeline in zip(runners, timelines, strict=True):
                runner.evaluate(timeline, first, part.tolist(), stop=stop, observers=observers)
            if visit is not None:
                visit(first, len(part))
    finally:
        for timeline in timelines:
            timeline.release()
