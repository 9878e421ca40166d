"""tokenizer.model (SentencePiece) and the tokens added to it -> tokens, scores and types by id. Encodes nothing."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m2lite.errors import BadModelError
from m2lite.quant.safetensors import check_impostor
from m2lite.quant.texts import load_json, read_small

MODEL_NAME = "tokenizer.model"
MAX_BYTES = 64 * 2**20

# Types of pieces, the same numbers there and in a GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNUSED_SCORE, ADDED_SCORE = -10000.0, -1000.0

# Protocol buffers: wire types, and the fields of ModelProto and its parts that matter here.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
PIECE, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_TYPE = 1, 2, 3
MODEL_TYPE, BPE = 3, 2
SPECIAL_IDS = {"unknown": (40, 0), "bos": (41, 1), "eos": (42, 2), "padding": (43, -1)}  # field, default
NORMALIZER_NAME, CHARSMAP, DUMMY_PREFIX, REMOVE_SPACES, ESCAPE_SPACES = 1, 2, 3, 4, 5


@dataclass
class PieceVocabulary:
    """A vocabulary by id. `special` holds what the model itself says of bos, eos, unknown and padding."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    special: dict[str, int] = field(default_factory=dict)
    space_prefix: bool = True


def load_pieces(directory: Path, settings: Mapping[str, Any], n_vocab: int) -> PieceVocabulary:
    """The model's pieces, then added_tokens.json, then added_tokens_decoder of tokenizer_config.json."""
    data = read_small(directory / MODEL_NAME, MAX_BYTES)
    if data is None:
        raise BadModelError(f"{directory / MODEL_NAME} is missing.", "Fetch that file.")
    check_impostor(directory / MODEL_NAME, data)
    pieces = parse_model(data, n_vocab)
    for text, token_id in load_json(directory, "added_tokens.json", optional=True).items():
        _add(pieces, "added_tokens.json", token_id, text, USER_DEFINED)
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise _bad_added("tokenizer_config.json", "added_tokens_decoder is not an object")
    for key, token in decoder.items():
        if not key.isascii() or not key.isdigit() or not isinstance(token, dict):
            raise _bad_added("tokenizer_config.json", f"added_tokens_decoder[{key!r}] is not a token")
        kind = CONTROL if token.get("special") else USER_DEFINED
        _add(pieces, "tokenizer_config.json", int(key), token.get("content"), kind)
    if len(set(pieces.tokens)) != len(pieces.tokens):
        raise _bad("with the tokens added to it, two ids have the same text")
    return pieces


def parse_model(data: bytes, n_vocab: int) -> PieceVocabulary:
    """The pieces of a serialized ModelProto, filled up to `n_vocab`; refused where our tokenizer would differ."""
    found: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number not in (PIECE, TRAINER, NORMALIZER):
            continue
        if not isinstance(value, bytes):
            raise _bad("it is not a SentencePiece model")
        if number == PIECE:
            found.append(_parse_piece(value, len(found)))
        elif number == TRAINER:
            trainer |= dict(_fields(value))
        else:
            normalizer |= dict(_fields(value))
    _check_kind(found, trainer, normalizer, n_vocab)
    n_unused = n_vocab - len(found)
    pieces = PieceVocabulary(
        [text for text, _, _ in found] + [f"[PAD{i}]" for i in range(len(found), n_vocab)],
        [score for _, score, _ in found] + [UNUSED_SCORE] * n_unused,
        [kind for _, _, kind in found] + [UNUSED] * n_unused,
        space_prefix=bool(normalizer.get(DUMMY_PREFIX, True)),
    )
    for role, (number, default) in SPECIAL_IDS.items():
        token_id = trainer.get(number, default)
        if isinstance(token_id, int) and token_id < len(found) and found[token_id][2] in (CONTROL, UNKNOWN):
            pieces.special[role] = token_id
    return pieces


def _check_kind(
    found: list[tuple[str, float, int]], trainer: Mapping[int, Any], normalizer: Mapping[int, Any], n_vocab: int
) -> None:
    if not found:
        raise _bad("it holds no pieces")
    if len(found) > n_vocab:
        raise _bad(f"it has {len(found)} pieces, more than the {n_vocab} of config.json's vocab_size")
    if trainer.get(MODEL_TYPE, 1) != BPE:
        raise _bad("it is not a BPE model, the only kind that is supported")
    if normalizer.get(CHARSMAP) or normalizer.get(REMOVE_SPACES, True) or not normalizer.get(ESCAPE_SPACES, True):
        name = normalizer.get(NORMALIZER_NAME, b"")
        shown = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
        raise _bad(f"it changes text before it splits it (rule {shown!r}), which is not supported")
    if sum(kind == BYTE for _, _, kind in found) != 256:
        raise _bad("it has no byte pieces, so text would be lost")


def _parse_piece(data: bytes, index: int) -> tuple[str, float, int]:
    text: Any = b""
    score: Any = 0.0
    kind: Any = NORMAL
    for number, value in _fields(data):
        if number == PIECE_TEXT:
            text = value
        elif number == PIECE_SCORE:
            score = value
        elif number == PIECE_TYPE:
            kind = value
    if not isinstance(text, bytes) or not text or not isinstance(score, float) or kind not in range(NORMAL, BYTE + 1):
        raise _bad(f"piece {index} is malformed")
    try:
        # A user-defined piece of the model itself is text like any other; control is only what was added as such.
        return text.decode(), score, NORMAL if kind == USER_DEFINED else kind
    except UnicodeDecodeError:
        raise _bad(f"piece {index} is not UTF-8") from None


def _add(pieces: PieceVocabulary, file: str, token_id: Any, text: Any, kind: int) -> None:
    if type(token_id) is not int or not 0 <= token_id < len(pieces.tokens):
        raise _bad_added(file, f"token {text!r} has id {token_id!r}, beyond the {len(pieces.tokens)} of vocab_size")
    if not isinstance(text, str) or not text:
        raise _bad_added(file, f"token {token_id} is {text!r}, not a text")
    if pieces.types[token_id] in (UNKNOWN, BYTE) and pieces.tokens[token_id] == text:
        return
    if pieces.types[token_id] != UNUSED and pieces.tokens[token_id] != text:
        raise _bad_added(file, f"id {token_id} is {text!r} there and {pieces.tokens[token_id]!r} in {MODEL_NAME}")
    pieces.tokens[token_id], pieces.scores[token_id], pieces.types[token_id] = text, ADDED_SCORE, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field, value) of a protocol buffers message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        value: int | float | bytes
        if wire == VARINT:
            value, at = _varint(data, at)
            value = value - (1 << 64) if value >> 63 else value  # negative numbers take all ten bytes
        else:
            size, at = _varint(data, at) if wire == BYTES else ({FIXED32: 4, FIXED64: 8}.get(wire), at)
            if size is None or at + size > len(data):
                raise _bad("it is cut off, or not a SentencePiece model")
            raw, at = data[at : at + size], at + size
            value = struct.unpack("<f", raw)[0] if wire == FIXED32 else raw
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte, at = data[at], at + 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _bad("it is cut off, or not a SentencePiece model")


def _bad(what: str) -> BadModelError:
    return BadModelError(f"{MODEL_NAME}: {what}.", "Use the tokenizer of a MiniMax-M2.")


def _bad_added(file: str, what: str) -> BadModelError:
    return BadModelError(f"{file}: {what}.", "Use files that belong together.")
