"""The tokenizer.* metadata of a GGUF file as one checked Vocabulary. Encodes and decodes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Final

from m2lite.errors import BadModelError
from m2lite.storage.gguf_header import GGUFArray

if TYPE_CHECKING:
    from m2lite.storage.gguf_reader import GGUFFile

KEY: Final = "tokenizer.ggml."
KEY_STOP_IDS: Final = "m2lite.stop_token_ids"
OWN_END: Final = "[e~["  # it ends a turn of M2 whatever the file calls its end
ROLES: Final = ("bos", "eos", "eot", "eom", "unknown", "padding")
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
    stop_ids: frozenset[int]  # whatever the file calls an end, and M2's own [e~[
    warnings: tuple[str, ...]  # what the file says and does not hold
    add_bos: bool
    add_space_prefix: bool

    @cached_property
    def added_ids(self) -> frozenset[int]:
        return frozenset(self.added.values())

    def error(self, what: str, todo: str = CONVERT_AGAIN) -> BadModelError:
        return BadModelError(f"{self.path}: {what}", todo)


def load_vocabulary(gguf: GGUFFile) -> Vocabulary:
    """The vocabulary of an open file; raises BadModelError naming the key and the token."""
    keys = Keys(gguf)
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
    own_end = added.get(OWN_END)
    add_bos = keys.flag("add_bos_token", default=model == "llama")
    needed = ("bos",) if add_bos else ("eos",) if own_end is None else ()
    ids = {role: keys.token_id(role, len(tokens), is_needed=role in needed) for role in ROLES}
    bos_id, eos_id = ids["bos"], own_end if ids["eos"] is None else ids["eos"]
    if bos_id is not None and types[bos_id] not in ADDED:
        raise keys.error(f"key '{KEY}bos_token_id' names token {_ordinary(bos_id, tokens)}.")
    if eos_id is None:
        raise keys.error(f"key '{KEY}eos_token_id' is missing, so no answer would ever end.")
    if ids["eos"] is None:
        keys.warnings.append(f"no usable '{KEY}eos_token_id': a reply ends at {OWN_END}.")
    stop_ids = {stop for role in ("eos", "eot", "eom") if (stop := ids[role]) is not None}
    stop_ids |= {eos_id, *([] if own_end is None else [own_end]), *keys.stop_ids(len(tokens))}
    for stop in sorted(stop_ids):
        if types[stop] not in ADDED:
            keys.warnings.append(f"a reply ends at token {_ordinary(stop, tokens)}.")
    return Vocabulary(
        path=str(gguf.path),
        model=model,
        tokens=tokens,
        types=types,
        added=added,
        bos_id=bos_id,
        eos_id=eos_id,
        stop_ids=frozenset(stop_ids),
        warnings=tuple(keys.warnings),
        add_bos=add_bos,
        add_space_prefix=keys.flag("add_space_prefix", default=model == "llama"),
    )


def _ordinary(index: int, tokens: list[str]) -> str:
    return f"{index} {tokens[index]!r}, an ordinary token that any text can hold"


def _added_tokens(keys: Keys, model: str, tokens: list[str], types: list[int]) -> dict[str, int]:
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


class Keys:
    """Single values under `tokenizer.ggml.`, each with its type and range checked."""

    def __init__(self, gguf: GGUFFile) -> None:
        self._metadata = gguf.metadata
        self._path = gguf.path
        self.warnings: list[str] = []

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

    def token_id(self, role: str, n_tokens: int, is_needed: bool) -> int | None:
        """None where there is none, or where it is no token's and nothing needs it: some write -1 for none."""
        value = self._metadata.get(f"{KEY}{role}_token_id")
        if value is None or _is_id(value, n_tokens):
            return value  # type: ignore[return-value]  # it was looked at
        what = f"key '{KEY}{role}_token_id' is {value!r}, expected a token id from 0 to {n_tokens - 1}"
        if is_needed:
            raise self.error(f"{what}.")
        self.warnings.append(f"{what}: not used.")
        return None

    def stop_ids(self, n_tokens: int) -> list[int]:
        """What our own key adds to eos, eot and eom, which hold three ids."""
        value = self._metadata.get(KEY_STOP_IDS)
        if value is None:
            return []
        items = value.items(int) if isinstance(value, GGUFArray) and value.item_type.kind is int else [value]
        bad = [item for item in items if not _is_id(item, n_tokens)]
        if bad:
            self.warnings.append(f"key '{KEY_STOP_IDS}' holds {bad[0]!r}, no token id below {n_tokens}: not used.")
        return [item for item in items if isinstance(item, int) and item not in bad]


def _is_id(value: object, n_tokens: int) -> bool:
    return type(value) is int and 0 <= value < n_tokens
