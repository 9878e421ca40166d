"""A batch from its first line to its last result: what is left is answered, each result is kept as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from m2lite import __version__
from m2lite.batch.lines import Input, Line, line_key, line_stream
from m2lite.batch.results import Results, result_line
from m2lite.dialogue.chat_request import ChatRequest, check_whole, response_body
from m2lite.engine.batch import Batch, Done
from m2lite.engine.request import Request
from m2lite.engine.scheduler import Counts
from m2lite.errors import M2liteError, UsageError
from m2lite.text.template import encode_chat

if TYPE_CHECKING:  # this imports Numba
    from m2lite.api import Model
    from m2lite.engine.runner import Stop

Write = Callable[[Mapping[str, Any], int], None]  # a result and its name's hash


@dataclass(frozen=True)
class Shard:
    """Part `index` of `n`, from 1: the lines whose names' hashes fall to it."""

    index: int = 1
    n: int = 1

    def __contains__(self, line: Line) -> bool:
        return line.key % self.n == self.index - 1


def facts(model: Model) -> dict[str, Any]:
    """What the answers follow from, beside the requests: the same on every machine that works on a batch."""
    from m2lite.storage.identity import trunk_identity

    return {
        "m2lite": __version__,
        "model": model.path.name,
        "model_identity": trunk_identity(model.gguf),
        "template_sha256": model.template.sha256,
        **({} if model.template.date is None else {"template_date": model.template.date}),
        "kv": model.kv,
        "ctx": model.ctx,
    }


@dataclass
class Tally:
    """How far a run is. `n_total` are all lines of it, those of earlier runs included."""

    n_total: int
    n_layers: int
    n_done: int = 0
    n_failed: int = 0
    n_before: int = 0  # results that earlier runs left
    n_tokens: int = 0  # of answers in this run's results
    began: float = field(default_factory=time.monotonic)
    counts: Counts = field(default_factory=Counts)
    kv_bytes: tuple[int, int] = (0, 0)  # of prompts' KV, written to disk and read from there

    def add(self, result: Mapping[str, Any]) -> None:
        """Another line has its result."""
        self.n_done += result["error"] is None
        self.n_failed += result["error"] is not None
        if result["response"] is not None:
            self.n_tokens += result["response"]["body"]["usage"]["completion_tokens"]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def tokens_per_s(self) -> float:
        """Tokens drawn in the run so far, those of answers under way included."""
        return self.counts.n_drawn / max(self.seconds, 1e-9)

    @property
    def left_s(self) -> float | None:
        """By the lines a second so far."""
        n_here = self.n_done + self.n_failed - self.n_before
        n_left = self.n_total - self.n_done - self.n_failed
        return self.seconds / n_here * n_left if n_here else None

    @property
    def experts_per_token(self) -> float | None:
        """Of a layer: those gone through for each row that was computed; M2's 8 without any sharing."""
        n_rows = self.counts.n_rows * self.n_layers
        return self.counts.n_expert_reads / n_rows if n_rows else None


def count_ended(source: Input, results: Results, shard: Shard) -> tuple[int, int]:
    """How many lines of this input are done and failed already: an output may hold those of others, too."""
    if not results.ended:
        return 0, 0
    ends = [results.ended[line.key] for line in source if line in shard and line.key in results.ended]
    return len(ends) - sum(ends), sum(ends)


def lines_left(source: Input, ended: Container[int], shard: Shard, limit: int | None) -> Iterator[Line]:
    """What is still to be answered, at most `limit` lines; `ended` are the keys of the others."""
    return islice((line for line in source if line in shard and line.key not in ended), limit)


class Runner:
    """Answers lines with a model, in this process."""

    def __init__(self, model: Model, n_inflight: int, kv_disk: int | None = 0) -> None:
        """`kv_disk`: bytes on disk for prompts that were computed, of all models; None: for what lines share, only."""
        self._model, self._n_inflight, self._saves_all = model, n_inflight, bool(kv_disk)
        self.facts, self.n_layers = facts(model), model.config.n_layers
        self._requests = dict[str, ChatRequest]()  # of answers under way
        if kv_disk != 0:
            model.use_disk(kv_disk)

    def run(
        self,
        lines: Iterator[Line | None],
        write: Write,
        tally: Tally,
        show: Callable[[Tally], None],
        stop: Stop | None = None,
    ) -> None:
        """Until no line is left; Stopped where `stop` says so. What is written by then is done.

        A line that is None says that there is none just now.
        """
        self._write, self._tally = write, tally
        batch, loop = Batch(self._model, self._n_inflight, stop), self._model.loop
        tally.counts, tally.began = batch.counts, time.monotonic()
        try:
            with closing(batch.run(self._submitted(lines), lambda: show(tally))) as ends:
                for end in ends:
                    self._keep(end)
                    if self._saves_all:
                        loop.save(end.request.prompt, stop)
                    show(tally)
        finally:
            loop.save_shared(stop)
            disk = loop.prefix_cache.disk
            tally.kv_bytes = (0, 0) if disk is None else (disk.n_written, disk.n_read)

    def close(self) -> None:
        self._model.close()

    def _submitted(self, lines: Iterator[Line | None]) -> Iterator[Request | None]:
        model = self._model
        for line in lines:
            if line is None:
                yield None
                continue
            try:
                if line.request is None:
                    raise UsageError(str(line.error))
                row = encode_chat(model.tokenizer, model.template, line.request.messages, line.request.tools)
            except M2liteError as error:
                self._add(line.custom_id, None, error, line.key)
                continue
            self._requests[line.custom_id] = line.request
            yield line.request.to_engine(row, line_stream(line.custom_id), line.custom_id)

    def _keep(self, end: Done) -> None:
        custom_id, answer, error, body = end.request.key, end.completion, end.error, None
        request = self._requests.pop(custom_id)
        if answer is not None:
            try:
                check_whole(request.schema, answer)
                line = result_line(custom_id, None, None)
                name = "chatcmpl-" + line["id"].removeprefix("batch_req_")
                body = response_body(answer, self._model.tokenizer, name, self._model.path.name, int(time.time()))
            except M2liteError as failed:
                error = failed
        self._add(custom_id, body, error, line_key(custom_id))

    def _add(self, custom_id: str, body: dict[str, Any] | None, error: M2liteError | None, key: int) -> None:
        result = result_line(custom_id, body, error)
        self._write(result, key)
        self._tally.add(result)
