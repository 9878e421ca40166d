"""What tests of the engine ask, and how they look at what came of it. Knows no test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from m2lite import Model, Sampling
from m2lite.engine.answer import Completion
from m2lite.engine.handle import Handle
from m2lite.engine.request import Request
from m2lite.engine.thread import compute_thread
from m2lite.model.cache import PAGE
from m2lite.text.template import encode_chat

CTX = 256  # positions of a sequence
GREEDY = Sampling(0, seed=0)
IDS = [(7 * i * i + 3 * i) % 250 for i in range(5 * PAGE + 10)]  # of five whole pages and a part
STORY = "A fox and a bear went to the sea, and there they met a king who had lost his golden ring. "
SYSTEM = "Answer as if you were talking to a child of six years. " * 12
QUESTIONS = [
    f"Tell me a story about {what}."
    for what in (
        "a fox", "a bear and a king", "the sea", "a cat", "a mouse and a bear", "two dogs", "a tree", "a king", "rain",
    )
]  # fmt: skip


def request_of(model: Model, text: str, n: int = 0, **options: Any) -> Request:
    prompt = encode_chat(model.tokenizer, model.template, [{"role": "user", "content": text}])
    return Request(
        key=str(n), prompt=prompt, rng_stream=n, **{"sampling": Sampling(1.0, seed=1), "max_tokens": 40} | options
    )


def said(done: Completion | None) -> tuple[Any, ...]:
    assert done is not None
    return done.tokens, done.finish_reason, done.reply, done.logprobs


def alone(model: Model, request: Request) -> tuple[Any, ...]:
    model.loop.forget()
    return said(model.submit(replace(request, draft="off")).result())


def n_unheld(model: Model) -> int:
    """Positions in pages that are free, or the cache's alone; the cache can in fact give those back."""
    pool, cache = model.runner.pool, model.loop.prefix_cache
    return compute_thread().run(lambda: pool.n_free + PAGE * cache.n_reclaimable)


def n_pool(model: Model) -> int:
    return model.runner.pool.n_pages * PAGE


def run_all(model: Model, handles: Sequence[Handle]) -> None:
    while not all(handle.is_over for handle in handles):
        model.loop.drive()


def chat_ids(model: Model, text: str, system: str = "") -> list[int]:
    front = [{"role": "system", "content": system}] if system else []
    return encode_chat(model.tokenizer, model.template, [*front, {"role": "user", "content": text}])


def requests_of(model: Model, n_tokens: int, system: str = "") -> list[Request]:
    return [
        Request(key=text, prompt=chat_ids(model, text, system), sampling=GREEDY, max_tokens=n_tokens)
        for text in QUESTIONS
    ]
