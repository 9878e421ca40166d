"""The tokenizer.* metadata of a GGUF file as one checked Vocabulary. Encodes and decodes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from m2lite.errors import BadModelError

if TYPE_CHECKING:
    from m2lite.storage.gguf_reader import GGUFFile

KEY: Final = "tokenizer.ggml."
CONVERT_AGAIN: Final = "Convert the model again."

# Token types of the GGUF format.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
ADDED: Final = frozenset({UNKNOWN, CONTROL, USER_DEFINED})  # text never becomes one of these by itself
_TYPES_OF_MODEL: Final = {
    "gpt2": frozenset({NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED}),
    "llama": frozenset({NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}),
}


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens as the file spells them, and what each of them is."""

    path: str
    model: str  # gpt2 or llama
    tokens: list[str]
    types: list[int]
    added: Mapping[str, int]  # string -> id of every token that only the template or the model may produce
    bos_id: int | None
    eos_id: int
    stop_ids: frozenset[int]
    add_bos: bool
    add_space_prefix: bool

    @cached_property
    def added_ids(self) -> frozenset[int]:
        return frozenset(self.added.values())

    def error(self, what: str, todo: str = CONVERT_AGAIN) -> BadModelError:
        return BadModelError(f"{self.path}: {what}", todo)


def load_vocabulary(gguf: GGUFFile) -> Vocabulary:
    """The vocabulary of an open file; raises BadModelError naming the key and the token."""
    keys = _Keys(gguf)
    model = keys.choice("model", tuple(_TYPES_OF_MODEL))
    tokens = gguf.array(KEY + "tokens", str)
    types = gguf.array(KEY + "token_type", int, "INT32")
    keys.check_length("token_type", len(types), len(tokens))
    foreign = set(types) - _TYPES_OF_MODEL[model]
    if foreign:
        index = next(i for i, kind in enumerate(types) if kind in foreign)
        raise keys.error(
            f"key '{KEY}token_type': token {index} {tokens[index]!r} has type {types[index]}, unknown here."
        )
    added = _added_tokens(keys, model, tokens, types)
    ids = {role: keys.token_id(role, len(tokens)) for role in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    for role in ("bos", "eos", "eot", "eom"):
        named = ids[role]
        if named is not None and types[named] not in ADDED:
            raise keys.error(
                f"key '{KEY}{role}_token_id' names token {named} {tokens[named]!r}, "
                "an ordinary token that any text can hold."
            )
    eos_id = ids["eos"]
    if eos_id is None:
        raise keys.error(f"key '{KEY}eos_token_id' is missing, so no answer would ever end.")
    return Vocabulary(
        path=str(gguf.path),
        model=model,
        tokens=tokens,
        types=types,
        added=added,
        bos_id=ids["bos"],
        eos_id=eos_id,
        stop_ids=frozenset(stop for role in ("eos", "eot", "eom") if (stop := ids[role]) is not None),
        add_bos=keys.flag("add_bos_token", default=model == "llama"),
        add_space_prefix=keys.flag("add_space_prefix", default=model == "llama"),
    )


def _added_tokens(keys: _Keys, model: str, tokens: list[str], types: list[int]) -> dict[str, int]:
    added: dict[str, int] = {}
    for index, kind in enumerate(types):
        if kind not in ADDED:
            continue
        token = tokens[index]
        if len(token) < 2:  # a one-character control token could not be kept apart from the same character in text
            if model == "llama" and kind == USER_DEFINED and token:
                continue  # SentencePiece models list single characters this way; they are ordinary text
            raise keys.error(f"key '{KEY}tokens': added token {index} is {token!r}, expected at least 2 characters.")
        if token in added:
            raise keys.error(f"key '{KEY}tokens': added tokens {added[token]} and {index} are both {token!r}.")
        added[token] = index
    return added


class _Keys:
    """Single values under `tokenizer.ggml.`, each with its type and range checked."""

    def __init__(self, gguf: GGUFFile) -> None:
        self._metadata = gguf.metadata
        self._path = gguf.path

    def error(self, what: str, todo: str = CONVERT_AGAIN) -> BadModelError:
        return BadModelError(f"{self._path}: {what}", todo)

    def choice(self, name: str, accepted: tuple[str, ...]) -> str:
        value = self._metadata.get(KEY + name)
        if value not in accepted or not isinstance(value, str):
            found = "is missing" if value is None else f"is {value!r}"
            raise self.error(
                f"key '{KEY}{name}' {found}, supported: {', '.join(accepted)}.",
                "Use a file converted from a MiniMax-M2 checkpoint.",
            )
        return value

    def check_length(self, name: str, found: int, expected: int) -> None:
        if found != expected:
            raise self.error(f"key '{KEY}{name}' has {found} items, expected {expected}, one for each token.")

    def flag(self, name: str, default: bool) -> bool:
        value = self._metadata.get(KEY + name, default)
        if not isinstance(value, bool):
            raise self.error(f"key '{KEY}{name}' is {value!r}, expected true or false.")
        return value

    def token_id(self, role: str, n_tokens: int) -> int | None:
        value = self._metadata.get(f"{KEY}{role}_token_id")
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < n_tokens:
            raise self.error(f"key '{KEY}{role}_token_id' is {value!r}, expected a token id from 0 to {n_tokens - 1}.")
        return value


def check_choice(gguf: GGUFFile, name: str, accepted: tuple[str, ...]) -> str:
    """The string `tokenizer.ggml.<name>`, which must be one of those accepted."""
    return _Keys(gguf).choice(name, accepted)
