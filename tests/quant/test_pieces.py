"""quant/pieces.py: a SentencePiece model, trained here, becomes a vocabulary that encodes as the trainer's own."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from m2lite.errors import BadModelError
from m2lite.quant.header import build_header
from m2lite.quant.pieces import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, parse_model
from m2lite.quant.vocabulary import vocabulary_keys
from m2lite.storage.gguf_reader import open_gguf
from m2lite.text.tokenizer import Tokenizer, load_tokenizer
from tests.golden.models import write_texts

TEXT = """Once upon a time there was a small model that spoke in short clean sentences. It said: think, then speak.
The tool's reply was 12345, and 67 times nothing else!  Indented   text, naïve café. Привет, мир. 你好。
"""
ADDED = {"]~!b[": True, "]~b]": True, "[e~[": True, "]!d~[": True, "<think>": False, "</think>": False}


def train(**options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": 400,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "num_threads": 1,
            "minloglevel": 2,
            "hard_vocab_limit": False,
            **options,
        },
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return train(user_defined_symbols=["<sep>"])


@pytest.fixture(scope="module")
def reference(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


@pytest.fixture
def texts(tmp_path: Path, model: bytes) -> Path:
    """A checkpoint's small files, with a tokenizer.model instead of tokenizer.json."""
    write_texts(tmp_path, 300)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(model)
    n = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    decoder = {str(n + i): {"content": text, "special": special} for i, (text, special) in enumerate(ADDED.items())}
    settings = {"bos_token": "]~!b[", "eos_token": {"content": "[e~["}, "add_bos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "added_tokens_decoder": decoder}))
    return tmp_path


def keys(directory: Path, n_vocab: int = 420) -> dict[str, Any]:
    return {key.name: key.value for key in vocabulary_keys(directory, n_vocab)}


def load(directory: Path, n_vocab: int = 420) -> Tokenizer:
    header = build_header("minimax-m2", vocabulary_keys(directory, n_vocab), [])
    path = directory / "vocabulary.gguf"
    path.write_bytes(b"GGUF" + header.data[4:])
    with open_gguf(path) as file:
        return load_tokenizer(file)


def test_pieces_are_the_trainers(model: bytes, reference: sentencepiece.SentencePieceProcessor) -> None:
    n = reference.get_piece_size()
    pieces = parse_model(model, n + 2)
    assert pieces.tokens == [*(reference.id_to_piece(i) for i in range(n)), f"[PAD{n}]", f"[PAD{n + 1}]"]
    assert pieces.scores[:n] == [reference.get_score(i) for i in range(n)]
    assert pieces.types[n:] == [UNUSED] * 2 and pieces.types.count(BYTE) == 256
    assert [pieces.types[i] for i in range(3)] == [UNKNOWN, CONTROL, CONTROL]
    assert pieces.types[reference.piece_to_id("<sep>")] == NORMAL
    assert pieces.special == {"unknown": 0, "bos": 1, "eos": 2} and pieces.space_prefix


@pytest.mark.parametrize(
    "text", [*TEXT.splitlines(), "", " ", "  a  b ", "x\n\ty", "\u2581", "unseen ☃ 🎈 [e~[ <think>"]
)
def test_a_round_trip_through_a_gguf(texts: Path, reference: sentencepiece.SentencePieceProcessor, text: str) -> None:
    tokenizer = load(texts)
    ids = tokenizer.encode(text)
    if "\u2581" not in text:  # the engine itself would read it as a space
        assert ids == reference.encode(text, out_type=int)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == (" " + text if text else "")


def test_added_tokens_and_special_ids(texts: Path, reference: sentencepiece.SentencePieceProcessor) -> None:
    found, n = keys(texts), reference.get_piece_size()
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == len(found["tokenizer.ggml.scores"]) == 420
    assert tokens[n : n + 6] == list(ADDED) and types[n : n + 6] == [CONTROL] * 4 + [USER_DEFINED] * 2
    assert found["tokenizer.ggml.bos_token_id"] == n and found["tokenizer.ggml.eos_token_id"] == n + 2
    assert found["tokenizer.ggml.unknown_token_id"] == n + 3  # M2's own, where the config is silent
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_bos_token"] is False
    assert found["tokenizer.ggml.add_space_prefix"] is True and "tokenizer.ggml.padding_token_id" not in found
    assert found["tokenizer.chat_template"].startswith("{{ ']~!b[' }}")


def test_a_plain_model_brings_its_own_special_ids(texts: Path, reference: sentencepiece.SentencePieceProcessor) -> None:
    (texts / "tokenizer_config.json").unlink()
    (texts / "added_tokens.json").write_text(json.dumps({"<extra>": 419}))
    found = keys(texts)
    assert [found[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert found["tokenizer.ggml.token_type"][419] == USER_DEFINED and found["tokenizer.ggml.tokens"][419] == "<extra>"
    assert "tokenizer.ggml.add_bos_token" not in found
    assert load(texts).encode("a small time") == reference.encode("a small time", out_type=int)


def test_a_token_may_be_listed_again(texts: Path) -> None:
    decoder = {"0": {"content": "<unk>", "special": True}, "2": {"content": "</s>", "special": True}}
    (texts / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    types = keys(texts)["tokenizer.ggml.token_type"]
    assert types[:3] == [UNKNOWN, CONTROL, CONTROL]


def test_no_space_in_front_is_kept(texts: Path) -> None:
    (texts / "tokenizer.model").write_bytes(train(add_dummy_prefix=False, vocab_size=390))
    (texts / "tokenizer_config.json").unlink()
    assert keys(texts)["tokenizer.ggml.add_space_prefix"] is False
    assert load(texts).token_bytes(load(texts).encode("time")[0])[:1] == b"t"


def test_tokenizer_json_comes_first(texts: Path) -> None:
    write_texts(texts, 300)
    assert keys(texts, 300)["tokenizer.ggml.model"] == "gpt2"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "unigram", "vocab_size": 330}, "is not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes text before it splits it (rule 'nmt_nfkc')"),
        ({"remove_extra_whitespaces": True}, "changes text before it splits it (rule 'identity')"),
        ({"byte_fallback": False, "vocab_size": 120}, "has no byte pieces"),
    ],
)
def test_models_that_we_would_run_differently_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadModelError) as caught:
        parse_model(train(**options), 1000)
    assert words in str(caught.value) and str(caught.value).startswith("tokenizer.model: it ")


def piece(text: bytes, rest: bytes = b"") -> bytes:
    body = b"\x0a" + bytes([len(text)]) + text + rest
    return b"\x0a" + bytes([len(body)]) + body


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m[:-3], "is cut off"),
        (lambda m: b"", "holds no pieces"),
        (lambda m: b"version https://git-lfs.github.com/spec/v1\n", "cut off, or not a SentencePiece model"),
        (lambda m: b"\xff" * 20, "cut off, or not"),
        (lambda m: b"\x08\x05", "is not a SentencePiece model"),
        (lambda m: piece(b"") + m, "piece 0 is malformed"),
        (lambda m: piece(b"\xff") + m, "piece 0 is not UTF-8"),
        (lambda m: piece(b"a", b"\x18\x09") + m, "piece 0 is malformed"),
        (lambda m: piece(b"a", b"\x11" + struct.pack("<d", 1)) + m, "piece 0 is malformed"),
        (lambda m: m * 2, "more than the 420 of config.json's vocab_size"),
    ],
)
def test_damaged_models_are_refused(model: bytes, change: Callable[[bytes], bytes], words: str) -> None:
    with pytest.raises(BadModelError) as caught:
        parse_model(change(model), 420)
    assert words in str(caught.value)


def test_what_a_failed_download_leaves_is_named(texts: Path) -> None:
    (texts / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(BadModelError, match=r"tokenizer.model is a Git LFS pointer. Run `git lfs pull`"):
        keys(texts)
    (texts / "tokenizer.json").write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    with pytest.raises(BadModelError, match=r"tokenizer.json is a web page. Download the file again"):
        keys(texts)


def test_every_truncation_is_refused_or_parsed(model: bytes) -> None:
    for size in range(0, len(model), 37):
        try:
            pieces = parse_model(model[:size], 420)
        except BadModelError:
            continue
        assert len(pieces.tokens) == 420


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("added_tokens.json", {"x": 420}, "token 'x' has id 420, beyond the 420"),
        ("added_tokens.json", {"x": "7"}, "token 'x' has id '7'"),
        ("added_tokens.json", {"x": 300}, "id 300 is 'x' there and "),
        ("added_tokens.json", {"": 419}, "token 419 is '', not a text"),
        ("added_tokens.json", {"<s>": 419}, "two ids have the same text"),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}, "added_tokens_decoder is not an object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {}}}, "added_tokens_decoder['-1'] is not a token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"419": {}}}, "token 419 is None, not a text"),
        ("tokenizer_config.json", {"eos_token": "[nope]"}, "eos_token '[nope]' is not in tokenizer.model"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(texts: Path, name: str, content: Any, words: str) -> None:
    (texts / name).write_text(json.dumps(content))
    with pytest.raises(BadModelError) as caught:
        keys(texts)
    assert words in str(caught.value)
