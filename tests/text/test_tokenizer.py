"""Encoding and decoding over both kinds of vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2lite.errors import UsageError
from m2lite.storage.gguf_reader import open_gguf
from m2lite.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.conftest import write_keys

CONTROLS = ["]!p~[", "<fim_prefix>", "]~b]", "[e~[", "]~!b[", "<think>", "</think>", "<minimax:tool_call>"]
CONTROLS += ["</minimax:tool_call>", "<unk>", "<s>", "</s>", "[PAD0]", "<0x0A>"]
FRAGMENTS = [
    *CONTROLS,
    "]~",
    "b]",
    "[e",
    "<",
    ">",
    "</",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\u2581",
    "\0",
    "\ue000",
    "'s",
    "a",
    "Hello",
]
FRAGMENTS += ["e\u0301", "👋🏽", "你好", "Я", "\ufeff", "\U0010ffff", "１２３", "\u00a0", "\u2028"]
characters = st.characters(exclude_categories=["Cs"])
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(characters, max_size=8), max_size=12).map("".join)
# The fixtures are read-only, so one for all examples is right.
many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def added_ids(tokenizer: Tokenizer) -> set[int]:
    return set(tokenizer.control_strings.values())


@many
@given(text=texts)
def test_text_survives_and_is_inert(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text)
    assert not added_ids(any_tokenizer) & set(ids)
    assert any_tokenizer.decode(ids) == text


@many
@given(text=texts)
def test_control_strings_become_ids(any_tokenizer: Tokenizer, text: str) -> None:
    ids = any_tokenizer.encode(text, control=True)
    assert any_tokenizer.decode(ids) == text
    found = [i for i in ids if i in added_ids(any_tokenizer)]
    assert found == [part for part in any_tokenizer.split_control(text) if isinstance(part, int)]


@many
@given(data=st.data())
def test_stream_equals_decode(any_tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.n_vocab - 1), max_size=40))
    stream = any_tokenizer.stream()
    pieces = [*(stream.push(index) for index in ids), stream.flush()]
    assert "".join(pieces) == any_tokenizer.decode(ids)


@many
@given(text=st.text(characters, max_size=20))
def test_stream_never_splits_a_character(any_tokenizer: Tokenizer, text: str) -> None:
    stream = any_tokenizer.stream()
    for index in any_tokenizer.encode(text):
        assert "\ufffd" not in stream.push(index).replace("\ufffd" if "\ufffd" in text else "", "")
    assert stream.flush() == ""


def test_bytes_that_are_no_utf8(any_tokenizer: Tokenizer) -> None:
    tokenizer = any_tokenizer
    lone = [index for byte in (0xE4, 0xBD, 0x41, 0xF0, 0x9F) for index in byte_token(tokenizer, byte)]
    assert tokenizer.decode(lone) == "\ufffdA\ufffd"
    stream = tokenizer.stream()
    assert [stream.push(index) for index in lone] == ["", "", "\ufffdA", "", ""]
    assert stream.flush() == "\ufffd"


def byte_token(tokenizer: Tokenizer, byte: int) -> list[int]:
    return [next(i for i in range(tokenizer.n_vocab) if tokenizer.token_bytes(i) == bytes([byte]))]


def test_m2_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("]~!b[]~b]user\nHi[e~[\n]~b]ai\n<think>\n", control=True)
    assert (ids[0], ids[1], ids[-2]) == (tokenizer.bos_id, tokenizer.control_strings["]~b]"], tokenizer.think_open_id)
    assert tokenizer.eos_id in ids
    assert tokenizer.stop_ids == {tokenizer.control_strings["[e~["]}
    assert tokenizer.think_close_id == tokenizer.control_strings["</think>"]
    assert tokenizer.tool_open_id == tokenizer.control_strings["<minimax:tool_call>"]
    assert tokenizer.tool_close_id == tokenizer.control_strings["</minimax:tool_call>"]
    assert tokenizer.token_bytes(ids[0]) == b"]~!b["
    assert tokenizer.token_bytes(tokenizer.n_vocab - 1) == b""  # unused
    assert not tokenizer.add_bos


def test_longest_control_string_wins(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    tokens = [*bpe_keys["ggml.tokens"], "<think>>", "<think>>>"]
    types = [*bpe_keys["ggml.token_type"], 4, 4]
    tokenizer = load_tokenizer(open_keys(bpe_keys | {"ggml.tokens": tokens, "ggml.token_type": types}))
    assert tokenizer.encode("<think>>>", control=True) == [len(tokens) - 1]
    assert tokenizer.encode("<think>>", control=True) == [len(tokens) - 2]
    assert tokenizer.decode(tokenizer.encode("<think>>>")) == "<think>>>"


def test_more_stop_tokens(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    ids = {
        "ggml.eot_token_id": bpe_keys["ggml.tokens"].index("]~b]"),
        "ggml.eom_token_id": bpe_keys["ggml.eos_token_id"],
    }
    tokenizer = load_tokenizer(open_keys(bpe_keys | ids))
    assert tokenizer.stop_ids == {ids["ggml.eot_token_id"], ids["ggml.eom_token_id"]}
    assert not tokenizer.warnings


def test_ids_that_nothing_needs_may_be_wrong(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    """Some write -1 for none; as UINT32 that is 4294967295."""
    wrong = {"padding": -1, "unknown": 10**6, "bos": 2**32 - 1, "eot": True, "eom": "[e~["}
    tokenizer = load_tokenizer(open_keys(bpe_keys | {f"ggml.{role}_token_id": v for role, v in wrong.items()}))
    assert tokenizer.bos_id is None and tokenizer.stop_ids == {bpe_keys["ggml.eos_token_id"]}
    assert len(tokenizer.warnings) == len(wrong)
    for role, value in wrong.items():
        assert any(f"{role}_token_id' is {value!r}, expected a token id" in text for text in tokenizer.warnings)


@pytest.mark.parametrize("eos", [None, -1, 10**6, "]~b]", 300])
def test_m2s_own_end_ends_a_turn_whatever_the_file_says(
    open_keys: Any, bpe_keys: dict[str, Any], eos: int | str | None
) -> None:
    tokens, own = bpe_keys["ggml.tokens"], bpe_keys["ggml.eos_token_id"]
    named = tokens.index(eos) if isinstance(eos, str) else eos
    tokenizer = load_tokenizer(open_keys(bpe_keys | {"ggml.eos_token_id": named}))
    is_usable = named is not None and 0 <= named < len(tokens)
    assert tokenizer.stop_ids == ({named, own} if is_usable else {own})
    assert tokenizer.eos_id == (named if is_usable else own)
    assert bool(tokenizer.warnings) == (eos != "]~b]")


def test_stop_ids_of_our_own_key(tmp_path: Path, bpe_keys: dict[str, Any]) -> None:
    path = tmp_path / "m.gguf"
    write_keys(path, bpe_keys, {"m2lite.stop_token_ids": ([bpe_keys["ggml.eos_token_id"], 300, 301, 10**6], "UINT32")})
    with open_gguf(path) as file:
        tokenizer = load_tokenizer(file)
    assert tokenizer.stop_ids == {bpe_keys["ggml.eos_token_id"], 300, 301}
    assert any("holds 1000000, no token id" in text for text in tokenizer.warnings)
    assert any(f"ends at token 300 {bpe_keys['ggml.tokens'][300]!r}" in text for text in tokenizer.warnings)


def test_lone_surrogate(any_tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"U\+D83D.*position 2"):
        any_tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("index", [-1, 10**6])
def test_id_out_of_range(tokenizer: Tokenizer, index: int) -> None:
    with pytest.raises(UsageError, match="outside the vocabulary"):
        tokenizer.decode([index])


@many
@given(text=texts)
def test_bpe_ids_are_the_trainers(tokenizer: Tokenizer, bpe_reference: tokenizers.Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == bpe_reference.encode(text, add_special_tokens=False).ids


@many
@given(text=texts)
def test_spm_ids_are_the_trainers(
    spm_tokenizer: Tokenizer, spm_reference: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    text = text.replace("\u2581", "")  # the reference reads it as a space
    assert spm_tokenizer.encode(text) == spm_reference.encode(text, out_type=int)


def test_spm_without_space_prefix(open_keys: Any, spm_keys: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(open_keys(spm_keys | {"ggml.add_space_prefix": False}))
    for text in (" a", "a", "  ", "</s> a\u2581"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text, control=True)) == text
    assert tokenizer.encode("a") != load_tokenizer(open_keys(spm_keys)).encode("a")


def test_spm_stream_that_continues_keeps_its_space(spm_tokenizer: Tokenizer) -> None:
    (index,) = [i for i in spm_tokenizer.encode("a") if spm_tokenizer.token_bytes(i).startswith(b" ")][:1]
    text = spm_tokenizer.token_bytes(index).decode()
    assert spm_tokenizer.stream(start=False).push(index) == text
    assert spm_tokenizer.stream().push(index) == text[1:]


def test_spm_single_characters_may_be_listed(open_keys: Any, spm_keys: dict[str, Any]) -> None:
    tokens = [*spm_keys["ggml.tokens"], "\n"]
    changed = {"ggml.tokens": tokens, "ggml.token_type": [*spm_keys["ggml.token_type"], 4]}
    tokenizer = load_tokenizer(open_keys(spm_keys | changed | {"ggml.scores": [*spm_keys["ggml.scores"], 0.0]}))
    assert tokenizer.encode("a\nb").count(len(tokens) - 1) == 1
    assert tokenizer.decode(tokenizer.encode("a\nb\n")) == "a\nb\n"


# Words of the o200k pattern. llama.cpp's ASCII approximation cuts the Cyrillic and Greek ones elsewhere.
WORDS = {
    "It's HERE'S camelCase URLs": ["It's", " HERE'S", " camel", "Case", " URLs"],
    "ПриветМир ΑλφαΒήτα": ["Привет", "Мир", " Αλφα", "Βήτα"],
    "12345 a1": ["123", "45", " a", "1"],
    "a  b\n\n  c \n": ["a", " ", " b", "\n\n", " ", " c", " \n"],
    "x//\r\n!?\ny": ["x", "//\r\n", "!?\n", "y"],
    "naïve e\u0301te\u0301 你好": ["naïve", " e\u0301te\u0301", " 你好"],
    "\t_foo(bar)": ["\t", "_foo", "(bar", ")"],
}


@pytest.mark.parametrize("text", WORDS)
def test_words(tokenizer: Tokenizer, text: str) -> None:
    engine: Any = tokenizer._engine
    spans = [span for _, span in engine._engine.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == WORDS[text]


def test_pattern_is_written_out_as_published() -> None:
    from m2lite.text.bpe import PATTERNS

    published = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert PATTERNS["minimax-m2"] == published


def test_gpt2_words(open_keys: Any, bpe_keys: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(open_keys(bpe_keys | {"ggml.pre": "gpt-2"}))
    engine: Any = tokenizer._engine
    spans = [span for _, span in engine._engine.pre_tokenizer.pre_tokenize_str("It's 12345\n")]
    assert ["It's 12345\n"[start:end] for start, end in spans] == ["It", "'s", " 12345", "\n"]


def test_state_is_json_plain(tokenizer: Tokenizer) -> None:
    assert json.loads(json.dumps(dict(tokenizer.control_strings))) == tokenizer.control_strings
