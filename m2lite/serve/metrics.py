"""What a server counts, as Prometheus reads it: llama-server's names behind `m2lite_`, and what only m2lite knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from m2lite.drafting.drafted import Drafted
from m2lite.engine.answer import Completion
from m2lite.serve.progress import ReadingSpeed

if TYPE_CHECKING:
    from m2lite.serve.server import Server

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600, 1800)


@dataclass
class Histogram:
    """How many values lie below each bound."""

    bounds: Sequence[float] = _SECONDS
    counts: list[int] = field(default_factory=list)
    total: float = 0.0
    n: int = 0

    def __post_init__(self) -> None:
        self.counts = [0] * len(self.bounds)

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.n += times
        self.total += value * times
        for i, bound in enumerate(self.bounds):
            self.counts[i] += times * (value <= bound)


@dataclass
class Metrics:
    """Since the server was started, of answers that have ended."""

    n_requests: dict[str, int] = field(default_factory=dict)  # by how they ended
    n_prompt: int = 0  # tokens of prompts that were computed
    n_reused: int = 0  # tokens of prompts that the prefix cache had
    n_answer: int = 0
    prompt_s: float = 0.0
    decode_s: float = 0.0
    n_longest: int = 0  # tokens of prompt and answer
    n_recalled: int = 0  # answers in prompts whose own ids were known
    n_rendered: int = 0  # answers in prompts that were rendered
    drafted: Drafted = field(default_factory=Drafted)
    first_token: Histogram = field(default_factory=Histogram)
    between_tokens: Histogram = field(default_factory=Histogram)
    queue: Histogram = field(default_factory=Histogram)
    reading: ReadingSpeed = field(default_factory=ReadingSpeed)

    def ended(self, completion: Completion, how: str) -> None:
        stats, n_answer = completion.stats, len(completion.tokens)
        self.n_requests[how] = self.n_requests.get(how, 0) + 1
        self.n_prompt += max(0, stats.n_prompt - stats.n_reused) if stats.prompt_s else 0
        self.n_reused += stats.n_reused
        self.n_answer += n_answer
        self.prompt_s += stats.prompt_s
        self.decode_s += stats.decode_s
        self.n_longest = max(self.n_longest, stats.n_prompt + n_answer)
        if stats.drafted is not None:
            self.drafted.include(stats.drafted)


def routes(server: Server) -> list[Route]:
    async def metrics(_: Request) -> Response:
        return PlainTextResponse("\n".join(_lines(server)) + "\n", media_type="text/plain; version=0.0.4")

    return [Route("/metrics", metrics, methods=["GET"])]


def _lines(server: Server) -> Iterator[str]:
    found, loop, model = server.metrics, server.model.loop, server.model
    counts, drafted = loop.counts, found.drafted
    numbers: list[tuple[str, str, str, float]] = [
        ("prompt_tokens_total", "counter", "Tokens of prompts that were computed.", found.n_prompt),
        ("prompt_seconds_total", "counter", "Seconds of computing prompts.", found.prompt_s),
        ("tokens_predicted_total", "counter", "Tokens of answers.", found.n_answer),
        ("tokens_predicted_seconds_total", "counter", "Seconds of computing answers.", found.decode_s),
        ("prompt_tokens_seconds", "gauge", "Tokens of prompts in a second.", _ratio(found.n_prompt, found.prompt_s)),
        ("predicted_tokens_seconds", "gauge", "Tokens of answers in a second.", _ratio(found.n_answer, found.decode_s)),
        ("requests_processing", "gauge", "Answers that are computed.", counts.n_running),
        ("requests_deferred", "gauge", "Requests that wait.", max(0, server.n_open - counts.n_running)),
        ("n_tokens_max", "counter", "Tokens of the longest prompt with its answer.", found.n_longest),
        ("n_decode_total", "counter", "Calls of the model.", counts.n_steps),
        ("n_busy_slots_per_decode", "gauge", "Rows of a call.", _ratio(counts.n_rows, counts.n_steps)),
        ("spec_decode_num_drafts_total", "counter", "Steps with drafts.", sum(drafted.sources.values())),
        ("spec_decode_num_draft_tokens_total", "counter", "Drafts that were verified.", drafted.n_proposed),
        ("spec_decode_num_accepted_tokens_total", "counter", "Drafts that were right.", drafted.n_accepted),
        ("prefix_tokens_reused_total", "counter", "Tokens of prompts that need not be computed.", found.n_reused),
        ("answers_recalled_total", "counter", "Answers in prompts whose own ids were known.", found.n_recalled),
        ("answers_rendered_total", "counter", "Answers in prompts that were rendered.", found.n_rendered),
        ("preemptions_total", "counter", "Times that a sequence gave its pages up.", counts.n_preempted),
        ("kv_positions", "gauge", "Positions of the KV pool.", model.runner.pool.n_positions),
        ("kv_positions_free", "gauge", "Of these, nobody's.", model.runner.pool.n_free),
        ("kv_positions_cached", "gauge", "Of these, kept for who begins alike.", loop.prefix_cache.n_positions),
    ]
    disk = loop.prefix_cache.disk
    if disk is not None:
        numbers += [
            ("kv_disk_read_bytes_total", "counter", "Bytes of pages read from disk.", disk.n_read),
            ("kv_disk_written_bytes_total", "counter", "Bytes of pages written to disk.", disk.n_written),
        ]
    stream = model.runner.stream
    if stream is not None:
        traffic = stream.traffic
        numbers += [
            ("expert_bytes_wanted_total", "counter", "Bytes of experts that were needed.", traffic.wanted_bytes),
            ("expert_bytes_read_total", "counter", "Of these, read from disk.", traffic.read_bytes),
            ("expert_hit_rate", "gauge", "Share of the needed bytes that were in memory.", traffic.hit_rate or 0.0),
            ("dense_bytes_read_total", "counter", "Bytes of dense weights read from disk.", traffic.dense_bytes),
            ("stall_seconds_total", "counter", "Seconds for which computing waited for the disk.", traffic.stall_s),
        ]
    for name, kind, text, value in numbers:
        yield from (*_head(name, kind, text), f"m2lite_{name} {value:.10g}")
    yield from _by("requests_total", "Requests for answers, by how they ended.", "end", found.n_requests)
    positions = {str(i): n for i, n in enumerate(drafted.accepted)}
    name = "spec_decode_num_accepted_tokens_per_pos_total"
    yield from _by(name, "Drafts that were right, by their place.", "position", positions)
    yield from _histogram("time_to_first_token_seconds", "From a request to its first token.", found.first_token)
    yield from _histogram("time_between_tokens_seconds", "Between two tokens of an answer.", found.between_tokens)
    yield from _histogram("queue_seconds", "From a request to the first call for it.", found.queue)


def _ratio(n: float, seconds: float) -> float:
    return n / seconds if seconds else 0.0


def _head(name: str, kind: str, text: str) -> tuple[str, str]:
    return f"# HELP m2lite_{name} {text}", f"# TYPE m2lite_{name} {kind}"


def _by(name: str, text: str, label: str, values: dict[str, int]) -> Iterator[str]:
    yield from _head(name, "counter", text)
    for key, value in sorted(values.items()):
        yield f'm2lite_{name}{{{label}="{key}"}} {value}'


def _histogram(name: str, text: str, found: Histogram) -> Iterator[str]:
    yield from _head(name, "histogram", text)
    for bound, count in zip(found.bounds, found.counts, strict=True):
        yield f'm2lite_{name}_bucket{{le="{bound:g}"}} {count}'
    yield f'm2lite_{name}_bucket{{le="+Inf"}} {found.n}'
    yield f"m2lite_{name}_sum {found.total:.10g}"
    yield f"m2lite_{name}_count {found.n}"
