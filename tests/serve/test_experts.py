"""The experts that an answer's tokens were drawn with, and what it takes, as a client reads them."""

from __future__ import annotations

from base64 import b64decode
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from m2lite import Model
from m2lite.model import residency
from m2lite.storage import syscalls
from tests.budgets import budget_beyond
from tests.serve.conftest import Serve, Served, serving
from tests.serve.sse import events

CHAT = "/v1/chat/completions"
BODY: Any = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "seed": 3, "return_token_ids": True}


def test_a_stream_has_those_of_the_whole_answer(served: Served) -> None:
    whole = served.http.post(CHAT, json=BODY | {"return_experts": True}).json()
    shape, choice = whole["m2lite_experts"], whole["choices"][0]
    assert shape == {"n_layers": 4, "n_experts": 64, "n_used": 8, "dtype": "uint8"}
    assert len(choice["experts"]) == len(choice["token_ids"]) > 10
    for each in choice["experts"]:
        ids = np.frombuffer(b64decode(each), shape["dtype"]).reshape(shape["n_layers"], shape["n_used"])
        assert (ids[:, 1:] > ids[:, :-1]).all() and ids.max() < shape["n_experts"]
    first, *chunks = [found for _, found in events(served.http, CHAT, BODY | {"return_experts": True})]
    assert first["m2lite_experts"] == shape
    streamed = [each for chunk in chunks for each in chunk["choices"][0]["experts"]]
    assert streamed == choice["experts"]
    assert all(len(each["experts"]) == len(each["token_ids"]) for chunk in chunks for each in chunk["choices"])


def test_who_does_not_ask_gets_none_and_the_same_tokens(served: Served) -> None:
    plain, asked = (served.http.post(CHAT, json=BODY | {"return_experts": flag}).json() for flag in (False, True))
    assert plain["choices"][0]["token_ids"] == asked["choices"][0]["token_ids"]
    assert "experts" not in plain["choices"][0] and "m2lite_experts" not in plain
    wrong = served.http.post(CHAT, json=BODY | {"return_experts": 1})
    assert wrong.status_code == 400 and "return_experts" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("per_token", [False, True])
def test_timings(served: Served, per_token: bool) -> None:
    chunks = [found for _, found in events(served.http, CHAT, BODY | {"timings_per_token": per_token})]
    told = [chunk["timings"] for chunk in chunks if "timings" in chunk]
    assert len(told) == (len(chunks) - 1 if per_token else 1)
    counts, last = [each["predicted_n"] for each in told], told[-1]
    n_tokens = sum(len(chunk["choices"][0]["token_ids"]) for chunk in chunks)
    assert counts == sorted(counts) and last["predicted_n"] == n_tokens
    assert last["predicted_per_second"] == pytest.approx(1e3 * (n_tokens - 1) / last["predicted_ms"])
    again = served.http.post(CHAT, json=BODY).json()
    assert again["timings"]["cache_n"] == again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["timings"]["cache_n"] + again["timings"]["prompt_n"] == again["usage"]["prompt_tokens"]
    assert "bytes_read" not in last  # all is in memory


@pytest.mark.skipif(not syscalls.AVAILABLE, reason="residency is controlled on Linux only")
def test_what_a_streamed_model_reads(bundled_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Live, while it is said: it never shrinks."""
    monkeypatch.setattr(residency, "choose_budget", lambda *_: budget_beyond(2 << 30))
    with Model.open(bundled_model, load="direct", draft="off", heat=False) as model, serving(model) as found:
        chunks = [each for _, each in events(found.http, CHAT, BODY | {"timings_per_token": True})]
    told = [chunk["timings"] for chunk in chunks[1:]]
    read = [each["bytes_read"] for each in told]
    assert read == sorted(read) and read[-1] > 0
    assert told[-1]["bytes_wanted"] > 0 and 0 <= told[-1]["hit_rate"] <= 1


def test_props_say_what_there_is(serve: Serve) -> None:
    found = serve("random")
    c = found.server.model.config
    shape = {"n_layers": c.n_layers, "n_experts": c.n_experts, "n_used": c.n_experts_used, "dtype": "uint8"}
    assert found.http.get("/props").json()["m2lite_experts"] == shape
