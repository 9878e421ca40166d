"""Texts as chunks: what is read, cut, replaced and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tinymodel
from m2lite import Model, UsageError
from m2lite.measure.chunks import cut_chunks, read_tokens
from tests.model.test_refused import rewrite

Opened = Callable[[str], Model]


def test_a_file_is_read_without_its_last_newline(opened: Opened, tmp_path: Path) -> None:
    model = opened("random")
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf\nsaid the fox\n\n")
    assert read_tokens(model, tmp_path / "text") == list(b"\nsaid the fox\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"cannot be read: No such file or directory\. Name a text file"),
        (b"", r"holds no text \(0 bytes\)"),
        (b" \n\n", r"holds no text \(3 bytes\)"),
        (b"caf\xe9", r"is not UTF-8: byte 3 is 0xe9\. Convert it to UTF-8"),
    ],
)
def test_files_without_text_are_refused(opened: Opened, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_tokens(opened("random"), path)
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_tokens(opened("random"), tmp_path)


def test_whole_chunks_without_overlap(opened: Opened) -> None:
    tokens = [i % 256 for i in range(3 * 16 + 15)]
    chunks = cut_chunks(opened("random"), tokens, 16)
    assert chunks.tolist() == [tokens[:16], tokens[16:32], tokens[32:48]]
    assert cut_chunks(opened("random"), tokens, 16, 2).tolist() == chunks[:2].tolist()
    assert cut_chunks(opened("random"), tokens, 16, 9).tolist() == chunks.tolist()
    assert cut_chunks(opened("random"), bytes(tokens).decode("latin-1")[:16], 16).tolist() == chunks[:1].tolist()


def test_bos_takes_the_place_of_each_first_token(model_files: dict[str, Path], tmp_path: Path) -> None:
    path = rewrite(model_files["random"], tmp_path / "bos.gguf", {"tokenizer.ggml.add_bos_token": True})
    with Model.open(path, ctx=64) as model:
        text = "a" * 31
        (tmp_path / "text").write_text(text)
        assert read_tokens(model, tmp_path / "text") == [tinymodel.BEGIN, *text.encode()]
        expected = np.full((2, 16), ord("a"))
        expected[:, 0] = tinymodel.BEGIN
        assert np.array_equal(cut_chunks(model, text, 16), expected)


@pytest.mark.parametrize(
    ("n_tokens", "n_ctx", "n_chunks", "message"),
    [
        (15, 16, None, r"has 15 tokens; one chunk needs 16\. Use a longer text, or smaller chunks \(-c 15 or less\)\."),
        (7, 16, None, r"has 7 tokens; one chunk needs 16\. Use a longer text\."),
        (99, 7, None, r"Chunks of 7 tokens were asked for; 8 to 2,048 are possible"),
        (99, 2049, None, r"Chunks of 2,049 tokens were asked for; 8 to 2,048 are possible"),
        (99, 16, 0, r"0 chunks were asked for"),
    ],
)
def test_what_cannot_be_cut(opened: Opened, n_tokens: int, n_ctx: int, n_chunks: int | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        cut_chunks(opened("random"), [1] * n_tokens, n_ctx, n_chunks)


@pytest.mark.parametrize("wrong", [-1, tinymodel.N_VOCAB])
def test_ids_outside_the_vocabulary_are_refused(opened: Opened, wrong: int) -> None:
    with pytest.raises(UsageError, match=f"Token id {wrong} is outside"):
        cut_chunks(opened("random"), [1] * 10 + [wrong] * 6, 16)
