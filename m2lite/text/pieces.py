"""SentencePiece BPE of one vocabulary, run by `sentencepiece`. Ignores added tokens: no text becomes one."""

from __future__ import annotations

import math
import re
import struct
from typing import TYPE_CHECKING, Final

import sentencepiece

from m2lite.text.vocabulary import BYTE, CONTROL, KEY, UNKNOWN, UNUSED, Keys, Vocabulary

if TYPE_CHECKING:
    from m2lite.storage.gguf_reader import GGUFFile

_SPACE: Final = "\u2581"  # how pieces spell a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_VARINT, _FIXED32, _BYTES = 0, 5, 2  # wire types of protocol buffers
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of ModelProto
_BPE = 2  # TrainerSpec.ModelType


class SentencePieces:
    """Characters joined by score; what no piece spells becomes byte tokens."""

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        for name in ("precompiled_charsmap", "remove_extra_whitespaces"):
            value = gguf.metadata.get(KEY + name)
            if value is not None and value is not False:
                raise vocabulary.error(
                    f"key '{KEY}{name}' asks for text to be changed before it is encoded, which is not supported.",
                    "Use a file converted from a MiniMax-M2 checkpoint.",
                )
        scores = gguf.array(KEY + "scores", float, "FLOAT32")
        Keys(gguf).check_length("scores", len(scores), len(vocabulary.tokens))
        bad = next((index for index, score in enumerate(scores) if not math.isfinite(score)), None)
        if bad is not None:
            raise vocabulary.error(f"key '{KEY}scores': token {bad} has score {scores[bad]}.")
        self._vocabulary = vocabulary
        self._byte_ids = _byte_ids(vocabulary)
        self._space_marks = [self._byte_ids[byte] for byte in _SPACE.encode()]
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(_model_proto(vocabulary, scores))
        except (RuntimeError, ValueError) as error:
            raise vocabulary.error(f"the SentencePiece vocabulary is inconsistent ({error}).") from None

    def encode(self, text: str) -> list[int]:
        if not text:
            return []
        if self._vocabulary.add_space_prefix:
            text = " " + text
        ids: list[int] = []
        # The engine reads the space mark in a text as a space; as bytes it survives.
        for index, part in enumerate(text.split(_SPACE)):
            if index:
                ids += self._space_marks
            ids += self._processor.encode(part, out_type=int)
        return ids

    def token_bytes(self, index: int) -> bytes:
        kind, token = self._vocabulary.types[index], self._vocabulary.tokens[index]
        if kind == BYTE:
            return bytes([int(token[3:5], 16)])
        if kind == UNUSED:
            return b""
        return (token if index in self._vocabulary.added_ids else token.replace(_SPACE, " ")).encode()


def _byte_ids(vocabulary: Vocabulary) -> dict[int, int]:
    """byte -> token id, all 256 of them."""
    ids: dict[int, int] = {}
    for index, kind in enumerate(vocabulary.types):
        if kind == BYTE:
            match = _BYTE_PIECE.fullmatch(vocabulary.tokens[index])
            if not match:
                raise vocabulary.error(
                    f"key '{KEY}tokens': byte token {index} is {vocabulary.tokens[index]!r}, expected <0x00> to <0xFF>."
                )
            ids[int(match[1], 16)] = index
    if len(ids) != 256:
        raise vocabulary.error(f"key '{KEY}tokens' has {len(ids)} byte tokens, expected 256, so text would be lost.")
    return ids


def _model_proto(vocabulary: Vocabulary, scores: list[float]) -> bytes:
    """The file's tokens as the message that the engine loads. Added tokens become control pieces, never matched."""
    added = vocabulary.added_ids
    model = bytearray()
    for index, (token, score, kind) in enumerate(zip(vocabulary.tokens, scores, vocabulary.types, strict=True)):
        piece = _field(1, token.encode()) + _field(2, score)
        model += _field(_PIECE, piece + _field(3, CONTROL if index in added and kind != UNKNOWN else kind))
    model += _field(_TRAINER, _field(3, _BPE) + _field(35, 1))  # byte fallback
    # no space in front (done here, by the file's key), nothing trimmed, spaces written as marks
    model += _field(_NORMALIZER, _field(1, b"identity") + _field(3, 0) + _field(4, 0) + _field(5, 1))
    return bytes(model)


def _field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, bytes):
        return _varint(number << 3 | _BYTES) + _varint(len(value)) + value
    if isinstance(value, float):
        return _varint(number << 3 | _FIXED32) + struct.pack("<f", value)
    return _varint(number << 3 | _VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
