"""tokenizer.json and its neighbours: what becomes of them, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from m2lite.errors import BadModelError
from m2lite.quant.vocabulary import PATTERN, parse_vocabulary, sampling_keys, vocabulary_keys
from m2lite.text.bpe import PATTERNS
from tests.golden.models import tokenizer_json, write_texts

N_VOCAB = 300


def keys(directory: Path) -> dict[str, Any]:
    return {key.name: key.value for key in vocabulary_keys(directory, N_VOCAB)}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    write_texts(tmp_path, N_VOCAB)
    return tmp_path


def test_the_pattern_is_the_one_that_we_run() -> None:
    assert PATTERNS["minimax-m2"] == PATTERN


def test_merges_may_be_pairs_or_strings() -> None:
    pairs = tokenizer_json(N_VOCAB)
    strings = tokenizer_json(N_VOCAB)
    strings["model"]["merges"] = [" ".join(pair) for pair in strings["model"]["merges"]]
    assert parse_vocabulary(pairs, N_VOCAB) == parse_vocabulary(strings, N_VOCAB)


def test_the_bos_of_generation_config_is_not_read(texts: Path) -> None:
    found = keys(texts)
    assert found["tokenizer.ggml.tokens"][found["tokenizer.ggml.bos_token_id"]] == "]~!b["
    assert [(key.name, key.value) for key in sampling_keys(texts, [])] == [
        ("general.sampling.temp", 1.0), ("general.sampling.top_k", 40), ("general.sampling.top_p", 0.95),
    ]  # fmt: skip


def test_what_a_gguf_cannot_say_is_told(texts: Path) -> None:
    path = texts / "generation_config.json"
    warnings: list[str] = []
    path.write_text(json.dumps({"do_sample": True, "repetition_penalty": 1.0, "num_beams": 1, "bad_words_ids": None}))
    assert sampling_keys(texts, warnings) == [] and warnings == []
    path.write_text(json.dumps({"repetition_penalty": 1.1, "suppress_tokens": [3], "do_sample": False, "top_k": 5}))
    assert [key.value for key in sampling_keys(texts, warnings)] == [5]
    assert "repetition_penalty 1.1, suppress_tokens [3], do_sample False, which a GGUF cannot say" in warnings[0]


def test_special_tokens_may_be_objects_and_override_m2s_own(texts: Path) -> None:
    settings = {"bos_token": {"content": "]~b]"}, "eos_token": None, "pad_token": "<think>"}
    (texts / "tokenizer_config.json").write_text(json.dumps(settings))
    found = keys(texts)
    tokens = found["tokenizer.ggml.tokens"]
    assert tokens[found["tokenizer.ggml.bos_token_id"]] == "]~b]"
    assert tokens[found["tokenizer.ggml.eos_token_id"]] == "[e~["
    assert tokens[found["tokenizer.ggml.padding_token_id"]] == "<think>"


def ends(directory: Path, config: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    """Keys of end tokens, and what is told."""
    warnings: list[str] = []
    made = {key.name: key for key in vocabulary_keys(directory, N_VOCAB, config, warnings)}
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    found = {name.split(".")[-1][:3]: made[name].value for name in names if name in made}
    stop = made.get("m2lite.stop_token_ids")
    assert stop is None or stop.kind == "UINT32"
    return found | ({"stop": stop.value} if stop else {}), warnings


def say(directory: Path, **generation: Any) -> None:
    (directory / "generation_config.json").write_text(json.dumps(generation))


def test_every_end_token_is_kept(texts: Path) -> None:
    """The first is eos, the next are eot and eom, and a list of our own holds what is left."""
    tokens = keys(texts)["tokenizer.ggml.tokens"]
    end, turn, pad, fim = (tokens.index(text) for text in ("[e~[", "]~b]", "]!p~[", "<fim_prefix>"))
    assert ends(texts) == ({"eos": end}, [])
    for ids, expected in (
        (end, {"eos": end}),
        ([end], {"eos": end}),
        ([end, turn, end], {"eos": end, "eot": turn}),
        ([end, turn, pad], {"eos": end, "eot": turn, "eom": pad}),
        ([end, turn, pad, fim], {"eos": end, "eot": turn, "eom": pad, "stop": [end, turn, pad, fim]}),
    ):
        say(texts, eos_token_id=ids)
        assert ends(texts, {"eos_token_id": end}) == (expected, [])
    say(texts, eos_token_id=[end, 40])
    found, (told,) = ends(texts)
    assert found == {"eos": end, "eot": 40} and f"40 {tokens[40]!r}, no control token" in told


def test_sources_that_contradict_on_the_end_are_told(texts: Path) -> None:
    tokens = keys(texts)["tokenizer.ggml.tokens"]
    end, turn = tokens.index("[e~["), tokens.index("]~b]")
    found, told = ends(texts, {"eos_token_id": turn})
    assert found == {"eos": end} and len(told) == 1
    assert (
        f"tokenizer_config.json ends a reply at {end} '[e~[', config.json at {turn} ']~b]': the first counts" in told[0]
    )
    say(texts, eos_token_id=turn)
    found, told = ends(texts, {"eos_token_id": [end]})
    assert found == {"eos": turn} and len(told) == 3
    assert "generation_config.json ends a reply at" in told[0] and "tokenizer_config.json at" in told[0]
    assert "does not name M2's own end of a turn" in told[2]
    (texts / "tokenizer_config.json").write_text("{}")
    say(texts)
    assert ends(texts, {"eos_token_id": [end, turn]}) == ({"eos": end, "eot": turn}, [])
    for wrong in ("x", True, -1, N_VOCAB, [end, None], 1.5):
        say(texts, eos_token_id=wrong)
        found, told = ends(texts)
        assert found == {"eos": end} and len(told) == 1 and "generation_config.json: eos_token_id holds" in told[0]


def test_the_template_comes_from_its_file_first(texts: Path) -> None:
    (texts / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from the config"}))
    assert keys(texts)["tokenizer.chat_template"].startswith("{{ ']~!b[' }}")
    (texts / "chat_template.jinja").unlink()
    assert keys(texts)["tokenizer.chat_template"] == "from the config"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (texts / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert keys(texts)["tokenizer.chat_template"] == "yes"
    (texts / "tokenizer_config.json").unlink()
    assert "tokenizer.chat_template" not in keys(texts)


def test_a_template_that_is_no_text_is_refused(texts: Path) -> None:
    (texts / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BadModelError, match="is not UTF-8"):
        keys(texts)
    (texts / "chat_template.jinja").write_bytes(b"x" * (1 << 20) + b"x")
    with pytest.raises(BadModelError, match="1,048,577 bytes"):
        keys(texts)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model"), "not byte-level BPE"),
        (lambda t: t["model"].update(type="Unigram"), "not byte-level BPE"),
        (lambda t: t["model"].update(vocab=[1, 2]), "not byte-level BPE"),
        (lambda t: t.update(normalizer={"type": "NFC"}), "has a normalizer"),
        (lambda t: t.update(pre_tokenizer=None), "not by M2's pattern"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+"), "not by M2's pattern"),
        (lambda t: t["pre_tokenizer"].update(pretokenizers=[7]), "another form"),
        (lambda t: t["model"]["vocab"].update(new=N_VOCAB), "token 'new' has id 300, beyond the 300"),
        (lambda t: t["model"]["vocab"].update(new=-1), "has id -1"),
        (lambda t: t["model"]["vocab"].update(new="1"), "has id '1'"),
        (lambda t: t["model"]["vocab"].update(new=0), "id 0 belongs to both"),
        (lambda t: t["model"]["vocab"].update({"": 299}), "token 299 is '', not a text"),
        (lambda t: t["added_tokens"][0].update(id=3), "id 3 belongs to both"),
        (lambda t: t["added_tokens"][0].update(content="Ā"), "two ids have the same text"),
        (lambda t: t["added_tokens"][0].pop("content"), "another form"),
        (lambda t: t.update(added_tokens=[5]), "another form"),
        (lambda t: t["model"].update(merges=[]), "no merges"),
        (lambda t: t["model"].update(merges=None), "no merges"),
        (lambda t: t["model"]["merges"].append(["a", "unknown"]), "is not two tokens"),
        (lambda t: t["model"]["merges"].append("a b c"), "is not two tokens"),
        (lambda t: t["model"]["merges"].append(["!", "!"]), "makes a token that does not exist"),
    ],
)
def test_what_is_not_m2s_tokenizer_is_refused(change: Callable[[dict[str, Any]], None], words: str) -> None:
    tokenizer = tokenizer_json(N_VOCAB)
    change(tokenizer)
    with pytest.raises(BadModelError) as caught:
        parse_vocabulary(tokenizer, N_VOCAB)
    assert str(caught.value).startswith("tokenizer.json: ") and words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chat_template": [{"name": "tool_use", "template": "x"}]}, "a list without a template named default"),
        ({"chat_template": [1, {"name": "default", "template": 5}]}, "a list without a template named default"),
        ({"chat_template": 7}, "chat_template is 7, not a text"),
        ({"eos_token": ["x"]}, "eos_token is ['x'], not a token"),
        ({"bos_token": {"content": 7}}, "bos_token is 7, not a token"),
    ],
)
def test_settings_of_another_form_are_refused(texts: Path, settings: dict[str, Any], words: str) -> None:
    (texts / "chat_template.jinja").unlink()
    (texts / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(BadModelError) as caught:
        keys(texts)
    assert str(caught.value).startswith("tokenizer_config.json: ") and words in str(caught.value)


def test_a_template_that_was_not_downloaded_is_refused(texts: Path) -> None:
    (texts / "chat_template.jinja").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(BadModelError, match=r"chat_template.jinja is a Git LFS pointer"):
        keys(texts)


def test_files_that_do_not_fit_together_are_refused(texts: Path) -> None:
    (texts / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(BadModelError, match=r"eos_token '</s>' is not in tokenizer\.json"):
        keys(texts)
    (texts / "tokenizer.json").unlink()
    with pytest.raises(BadModelError, match=r"tokenizer\.json is missing"):
        keys(texts)


def test_half_a_character_is_refused(texts: Path) -> None:
    text = (texts / "tokenizer.json").read_text().replace('"]!p~["', '"\\ud800"', 1)
    (texts / "tokenizer.json").write_text(text)
    (texts / "tokenizer_config.json").unlink()
    with pytest.raises(BadModelError, match=r"tokenizer\.json is not valid JSON: the string .* half of a character"):
        vocabulary_keys(texts, N_VOCAB)
