"""Text to token ids and back, for one vocabulary. Knows nothing of turns, templates or weights."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

from m2lite.errors import UsageError
from m2lite.text.bpe import BytePairs
from m2lite.text.vocabulary import Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from m2lite.storage.gguf_reader import GGUFFile
    from m2lite.text.pieces import SentencePieces


class Tokenizer:
    """The vocabulary of one model file. Added tokens come from `encode(control=True)` only."""

    def __init__(self, vocabulary: Vocabulary, engine: BytePairs | SentencePieces) -> None:
        self._vocabulary = vocabulary
        self._engine = engine
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.stop_ids = vocabulary.stop_ids
        self.warnings = vocabulary.warnings
        self.add_bos = vocabulary.add_bos and vocabulary.bos_id is not None
        self.control_strings: Mapping[str, int] = MappingProxyType(dict(vocabulary.added))
        self.think_open_id = self.control_strings.get("<think>")
        self.think_close_id = self.control_strings.get("</think>")
        self.tool_open_id = self.control_strings.get("<minimax:tool_call>")
        self.tool_close_id = self.control_strings.get("</minimax:tool_call>")
        longest_first = sorted(self.control_strings, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str, control: bool = False) -> list[int]:
        """Token ids; only with `control` do the strings of added tokens become those tokens."""
        check_text(text)
        if not control:
            return self._engine.encode(text)
        ids: list[int] = []
        for part in self.split_control(text):
            ids += [part] if isinstance(part, int) else self._engine.encode(part)
        return ids

    def split_control(self, text: str) -> list[str | int]:
        """The text cut at the strings of added tokens: ids of those, and the ordinary text between."""
        parts: list[str | int] = []
        end = 0
        for match in self._control.finditer(text):
            parts += [text[end : match.start()], self.control_strings[match[0]]]
            end = match.end()
        return [part for part in (*parts, text[end:]) if part != ""]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, added tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        stream = self.stream()
        return b"".join(map(stream.next_bytes, ids)).decode(errors="replace")

    def token_bytes(self, index: int) -> bytes:
        """The bytes that the token stands for; none for an unused id."""
        if not 0 <= index < self.n_vocab:
            raise UsageError(f"Token id {index} is outside the vocabulary.", f"Ids go from 0 to {self.n_vocab - 1}.")
        return self._engine.token_bytes(index)

    def token_text(self, index: int | None) -> str:
        """The token as the file spells it; empty for no token."""
        return "" if index is None else self._vocabulary.tokens[index]

    def stream(self, start: bool = True) -> DecodeStream:
        """A decoder to push ids into; `start` is false where the ids continue a text."""
        return DecodeStream(self.token_bytes, self._vocabulary, start)


class DecodeStream:
    """Text from ids, one at a time; never a part of a character. The pieces add up to what `decode` gives."""

    def __init__(self, token_bytes: Callable[[int], bytes], vocabulary: Vocabulary, start: bool) -> None:
        self._token_bytes = token_bytes
        self._added_ids = vocabulary.added_ids
        self._strip = vocabulary.add_space_prefix  # a space was put in front of every stretch of text
        self._at_start = start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        return self._utf8.decode(self.next_bytes(index))

    def flush(self) -> str:
        """What is left of an unfinished character, as U+FFFD."""
        return self._utf8.decode(b"", True)

    def next_bytes(self, index: int) -> bytes:
        """The token's bytes at this place of the text."""
        data = self._token_bytes(index)
        if not self._strip:
            return data
        was_at_start, self._at_start = self._at_start, index in self._added_ids
        return data.removeprefix(b" ") if was_at_start and not self._at_start else data


def load_tokenizer(gguf: GGUFFile) -> Tokenizer:
    """The tokenizer of an open model file; raises BadModelError naming the key."""
    vocabulary = load_vocabulary(gguf)
    if vocabulary.model == "gpt2":
        return Tokenizer(vocabulary, BytePairs(gguf, vocabulary))
    from m2lite.text.pieces import SentencePieces  # rare: M2's own vocabulary is byte-level BPE

    return Tokenizer(vocabulary, SentencePieces(gguf, vocabulary))


def check_text(text: str, what: str = "The text") -> None:
    """Raises UsageError for a string that no UTF-8 can spell (half of a surrogate pair)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{what} holds U+{ord(text[error.start]):04X}, half of a character, at position {error.start}.",
            "Give the text as valid Unicode.",
        ) from None
