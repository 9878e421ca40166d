"""Byte-level BPE of one vocabulary, run by `tokenizers`. Ignores added tokens: no text becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tokenizers import Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

from m2lite.text.vocabulary import KEY, NORMAL, UNUSED, Keys, Vocabulary

if TYPE_CHECKING:
    from m2lite.storage.gguf_reader import GGUFFile

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS: Final = {"minimax-m2": _O200K, "gpt-4o": _O200K, "gpt-2": _GPT2}  # value of tokenizer.ggml.pre -> words


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF_LETTER: Final = _byte_letters()
_BYTES_OF_UTF8 = {*range(0x80), *range(0x80, 0xC0), *range(0xC2, 0xF5)}


class BytePairs:
    """Bytes joined by the file's merges."""

    def __init__(self, gguf: GGUFFile, vocabulary: Vocabulary) -> None:
        pattern = PATTERNS[Keys(gguf).choice("pre", tuple(PATTERNS))]
        if vocabulary.add_space_prefix:
            raise vocabulary.error(f"key '{KEY}add_space_prefix' is true, which byte-level BPE does not have.")
        self._vocabulary = vocabulary
        ids = _base_tokens(vocabulary)
        # The engine drops a byte it has no token for without a word.
        letters = {letter for letter, byte in BYTE_OF_LETTER.items() if byte in _BYTES_OF_UTF8}
        missing = sorted(BYTE_OF_LETTER[letter] for letter in letters - ids.keys())
        if missing:
            raise vocabulary.error(
                f"key '{KEY}tokens': no token for {len(missing)} of the 243 bytes of UTF-8, first 0x{missing[0]:02X}."
            )
        merges = _check_merges(vocabulary, gguf.array(KEY + "merges", str), ids)
        self._engine = Tokenizer(models.BPE(vocab=ids, merges=merges))
        self._engine.pre_tokenizer = Sequence(
            [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        self._engine.decoder = decoders.ByteLevel()

    def encode(self, text: str) -> list[int]:
        return self._engine.encode(text, add_special_tokens=False).ids if text else []

    def token_bytes(self, index: int) -> bytes:
        kind, token = self._vocabulary.types[index], self._vocabulary.tokens[index]
        if kind == NORMAL:
            return bytes(map(BYTE_OF_LETTER.__getitem__, token))
        return b"" if kind == UNUSED else token.encode()


def _base_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Token -> id of the ordinary tokens, spelled in byte letters only."""
    tokens, types = vocabulary.tokens, vocabulary.types
    base = [index for index, kind in enumerate(types) if kind == NORMAL]
    ids = {tokens[index]: index for index in base}
    if len(ids) != len(base):
        index = next(index for index in base if ids[tokens[index]] != index)
        raise vocabulary.error(
            f"key '{KEY}tokens': tokens {index} and {ids[tokens[index]]} are both {tokens[index]!r}."
        )
    if "" in ids or not set("".join(ids)) <= BYTE_OF_LETTER.keys():
        index = next(index for token, index in ids.items() if not token or not set(token) <= BYTE_OF_LETTER.keys())
        raise vocabulary.error(f"key '{KEY}tokens': token {index} {tokens[index]!r} is no byte-level token.")
    return ids


def _check_merges(vocabulary: Vocabulary, merges: list[str], ids: dict[str, int]) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for index, merge in enumerate(merges):
        left, space, right = merge.partition(" ")
        if not (space and left in ids and right in ids and left + right in ids):
            unknown = next((part for part in (left, right, left + right) if part not in ids), merge)
            raise vocabulary.error(
                f"key '{KEY}merges': merge {index} of {len(merges)} {merge!r} refers to {unknown!r}, "
                "which is no ordinary token."
            )
        pairs.append((left, right))
    return pairs
