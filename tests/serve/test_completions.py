"""OpenAI's older completions, and the logprobs of prompts that harnesses ask for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openai
import pytest
from openai.types import Completion

from m2lite import Model
from m2lite.measure.quality import log_softmax, perplexity
from tests.serve.conftest import Served, serving
from tests.serve.sse import events

TEXT = "The capital of France is Paris, and that of Italy is Rome. " * 8
TOKENS: dict[str, Any] = {"model": "m", "max_tokens": 20, "seed": 3}


def post(served: Served, **body: Any) -> Any:
    answer = served.http.post("/v1/completions", json=TOKENS | body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    for each in found["choices"] if body.get("echo") else []:  # nobody foretold the first token, whatever the type says
        noted = each["logprobs"] or {"token_logprobs": [None], "top_logprobs": [None]}
        assert noted["token_logprobs"][0] is noted["top_logprobs"][0] is None
        each["logprobs"] = None if each["logprobs"] is None else {name: noted[name][1:] for name in noted}
    Completion.model_validate(found)
    return answer.json()


def choice(served: Served, **body: Any) -> Any:
    found = post(served, **body)["choices"]
    assert len(found) == 1
    return found[0]


def test_an_answer_is_what_python_gives(served: Served, tiny: Model) -> None:
    found = served.openai.completions.create(**TOKENS, prompt=TEXT)
    expected = tiny.generate(TEXT, seed=3, max_tokens=20)
    assert found.choices[0].text == tiny.tokenizer.decode(expected.tokens)
    assert found.choices[0].finish_reason == expected.finish_reason
    assert found.usage is not None
    assert found.usage.completion_tokens == len(expected.tokens)
    assert choice(served, prompt=tiny.encode_prompt(TEXT))["text"] == found.choices[0].text


def test_tags_stay_as_they_are(tiny: Model) -> None:
    said = "<think>\nHm.\n</think>\n\nFine.<minimax:tool_call>x</minimax:tool_call>\n"
    script = tiny.tokenizer.encode(said, control=True)
    with serving(tiny, script=lambda _: script) as served:
        assert choice(served, prompt="x", max_tokens=100)["text"] == said
        streamed = events(served.http, "/v1/completions", TOKENS | {"prompt": "x", "max_tokens": 100})
    assert "".join(data["choices"][0]["text"] for _, data in streamed) == said


@pytest.mark.parametrize(
    "more", [{}, {"logprobs": 2}, {"logprobs": 1, "echo": True}, {"echo": True}, {"stop": [" is", "a"]},
             {"max_tokens": 1}, {"return_token_ids": True}],
)  # fmt: skip
def test_streaming_gives_the_same(served: Served, more: dict[str, Any]) -> None:
    asked = TOKENS | {"prompt": "Once upon a time, é, ", "seed": 5} | more
    whole = post(served, **asked)
    told = events(served.http, "/v1/completions", asked | {"stream_options": {"include_usage": True}})
    usage = told.pop()[1]
    assert usage["choices"] == []
    for name in ("prompt_tokens", "completion_tokens"):
        assert usage["usage"][name] == whole["usage"][name]
    expected, choices = whole["choices"][0], [data["choices"][0] for _, data in told]
    assert "".join(each["text"] for each in choices) == expected["text"]
    assert [each["finish_reason"] for each in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == expected["finish_reason"]
    if "logprobs" in more:
        for name, values in expected["logprobs"].items():
            assert [each for part in choices for each in part["logprobs"][name]] == values
    if "return_token_ids" in more:
        assert [i for each in choices for i in each["token_ids"]] == expected["token_ids"]
        assert len(expected["token_ids"]) == whole["usage"]["completion_tokens"]
    if "stop" in more:
        assert expected["finish_reason"] == "stop"
        assert not any(each in expected["text"] for each in more["stop"])


def test_logprobs_of_a_prompt(served: Served, tiny: Model) -> None:
    """As a harness asks for them: those of the model's own logits, whatever was computed and kept before."""
    ids = tiny.tokenizer.encode(TEXT)
    choice(served, prompt=ids, max_tokens=1)  # the prompt is in the prefix cache
    found = post(served, prompt=[ids], echo=True, max_tokens=1, logprobs=1, temperature=0)
    told = found["choices"][0]["logprobs"]
    logits = tiny.logits(ids)
    expected = [float(log_softmax(row)[i]) for row, i in zip(logits[:-1], ids[1:], strict=True)]
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    np.testing.assert_allclose(told["token_logprobs"][1:-1], expected, atol=1e-9)  # sums in another order
    scored, half = perplexity(tiny, ids, len(ids)), told["token_logprobs"][len(ids) // 2 + 1 : -1]
    assert scored is not None
    assert -sum(half) == pytest.approx(scored.nll * scored.n_tokens, rel=1e-9)  # m2lite perplexity's
    best = [float(log_softmax(row).max()) for row in logits]
    np.testing.assert_allclose([max(top.values()) for top in told["top_logprobs"][1:]], best, atol=1e-9)
    assert told["token_logprobs"][-1] == max(told["top_logprobs"][-1].values())
    assert "".join(told["tokens"][:-1]) == tiny.tokenizer.decode(ids) == TEXT
    text = found["choices"][0]["text"]
    ends = [*told["text_offset"][1:], len(text)]
    assert [text[a:b] for a, b in zip(told["text_offset"], ends, strict=True)] == told["tokens"]
    assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert tiny.loop.n_cached(ids) >= len(ids) - 1


def test_nothing_but_the_prompt(served: Served) -> None:
    found = post(served, prompt="Hello there", echo=True, max_tokens=0, logprobs=0)
    assert found["choices"][0]["text"] == "Hello there"
    assert found["usage"]["completion_tokens"] == 0
    told = found["choices"][0]["logprobs"]
    assert len(told["tokens"]) == found["usage"]["prompt_tokens"]
    assert all(len(top) == 1 for top in told["top_logprobs"][1:])


def test_the_end_has_a_logprob(tiny: Model) -> None:
    """Harnesses take the last one for that of a token that they did not ask for: else the prompt's last would be it."""
    end = [tiny.tokenizer.eos_id]
    with serving(tiny, script=lambda _: end) as served:
        found = choice(served, prompt="Hello there", echo=True, max_tokens=1, logprobs=1, temperature=0)
    ids = tiny.encode_prompt("Hello there")
    assert len(found["logprobs"]["token_logprobs"]) == len(ids) + 1
    assert found["text"] == "Hello there"
    assert (found["logprobs"]["tokens"][-1], found["logprobs"]["text_offset"][-1]) == ("[e~[", len("Hello there"))
    assert found["finish_reason"] == "stop"


def test_prompts_of_one_request(served: Served, tiny: Model) -> None:
    prompts = ["One", "Two", "Three", "Four", "Five", "Six", "One"]
    found = post(served, prompt=prompts, echo=True, logprobs=1)
    assert [each["index"] for each in found["choices"]] == list(range(7))
    for prompt, each in zip(prompts, found["choices"], strict=True):
        alone = choice(served, prompt=prompt, echo=True, logprobs=1)
        assert {**alone, "index": 0} == {**each, "index": 0}
    assert found["choices"][0]["text"] == found["choices"][-1]["text"]
    assert found["usage"]["prompt_tokens"] == sum(len(tiny.encode_prompt(each)) for each in prompts)


def test_many_at_once(served: Served) -> None:
    def ask(seed: int) -> Any:
        return choice(served, prompt=TEXT, seed=seed, echo=seed % 2 == 0, logprobs=1)

    assert served.http.get("/health").status_code == 200
    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(ask, range(20)))
    for seed in (0, 19):
        assert ask(seed) == found[seed]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"prompt": None}, "There is no prompt"),
        ({"prompt": []}, "There is no prompt"),
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": [[], [1]]}, "The prompt is empty"),
        ({"prompt": [{"a": 1}]}, "A prompt is a dict"),
        ({"prompt": [1 << 40]}, "outside the vocabulary"),
        ({"prompt": ["a", [-1]]}, "outside the vocabulary"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": "x", "logprobs": True}, "logprobs is True"),
        ({"prompt": "x", "logprobs": 21}, "logprobs is 21"),
        ({"prompt": "x", "n": 2}, "n is 2"),
        ({"prompt": "x", "best_of": 2}, "'best_of' is not supported"),
        ({"prompt": "x", "suffix": "y"}, "'suffix' is not supported"),
        ({"prompt": "x", "tools": [1]}, "'tools' is not supported"),
        ({"prompt": ["x", "y"], "stream": True}, "2 prompts cannot be streamed"),
        ({"prompt": "x", "stream_options": 3}, "stream_options is a int"),
    ],
)
def test_what_cannot_be_meant(served: Served, more: dict[str, Any], words: str) -> None:
    answer = served.http.post("/v1/completions", json=TOKENS | more)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_too_long(served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        served.openai.completions.create(**TOKENS, prompt=["Hello", "word " * 40_000])
    assert caught.value.code == "context_length_exceeded"
