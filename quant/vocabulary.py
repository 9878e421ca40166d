"""The tokenizer's files and their neighbours -> the tokenizer.* and general.sampling.* keys. Touches no weights.

tokenizer.json (byte-level BPE, as M2 has it) counts; tokenizer.model (SentencePiece) only where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from m2lite.errors import BadModelError
from m2lite.quant.ends import GENERATION, KEY_EOS, OWN_END, end_keys
from m2lite.quant.header import Key, array, boolean, float32, int32, string, uint32
from m2lite.quant.pieces import CONTROL, MODEL_NAME, NORMAL, UNUSED, USER_DEFINED, load_pieces
from m2lite.quant.safetensors import check_impostor
from m2lite.quant.texts import load_json, read_small

# The one pre-tokenizer that `tokenizer.ggml.pre = minimax-m2` stands for (o200k), as tokenizer.json spells it.
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

MAX_TEMPLATE_BYTES = 1 << 20
JSON_NAME = "tokenizer.json"

# role: (its key in tokenizer_config.json, the key in the GGUF, M2's own string where the configs are silent)
SPECIAL = {
    "bos": ("bos_token", "tokenizer.ggml.bos_token_id", "]~!b["),
    "eos": ("eos_token", KEY_EOS, OWN_END),  # with what other files say: quant/ends.py
    "unknown": ("unk_token", "tokenizer.ggml.unknown_token_id", "]!d~["),
    "padding": ("pad_token", "tokenizer.ggml.padding_token_id", "]!p~["),
}
# generation_config.json: (key there, key in the GGUF, type). Its bos_token_id is wrong for M2 and not read.
SAMPLING = (
    ("temperature", "general.sampling.temp", float32),
    ("top_k", "general.sampling.top_k", int32),
    ("top_p", "general.sampling.top_p", float32),
    ("min_p", "general.sampling.min_p", float32),
)
# What it may ask for besides, and a GGUF cannot say: (key, the value that asks for nothing).
UNSAID: tuple[tuple[str, Any], ...] = (
    ("repetition_penalty", 1), ("encoder_repetition_penalty", 1), ("presence_penalty", 0), ("frequency_penalty", 0),
    ("no_repeat_ngram_size", 0), ("typical_p", 1), ("epsilon_cutoff", 0), ("eta_cutoff", 0), ("num_beams", 1),
    ("penalty_alpha", 0), ("bad_words_ids", []), ("suppress_tokens", []), ("begin_suppress_tokens", []),
    ("forced_bos_token_id", None), ("forced_eos_token_id", None), ("sequence_bias", {}), ("guidance_scale", 1),
    ("stop_strings", []), ("do_sample", True),
)  # fmt: skip


class BpeVocabulary(NamedTuple):
    tokens: list[str]
    types: list[int]
    merges: list[str]


class Sources(NamedTuple):
    """What other files than the tokenizer's own say of its tokens, and where doubts are told."""

    settings: Mapping[str, Any]  # tokenizer_config.json
    generation: Mapping[str, Any]
    config: Mapping[str, Any]
    warnings: list[str]


def vocabulary_keys(
    directory: Path, n_vocab: int, config: Mapping[str, Any] | None = None, warnings: list[str] | None = None
) -> list[Key]:
    """Every key that the text of a model needs, in a fixed order; doubts are added to `warnings`."""
    settings = load_json(directory, "tokenizer_config.json", optional=True)
    generation = load_json(directory, GENERATION, optional=True)
    sources = Sources(settings, generation, config or {}, [] if warnings is None else warnings)
    has_pieces = not (directory / JSON_NAME).exists() and (directory / MODEL_NAME).exists()
    keys = (_piece_keys if has_pieces else _bpe_keys)(directory, sources, n_vocab)
    template = _load_template(directory, settings)
    return [*keys, string("tokenizer.chat_template", template)] if template else keys


def _bpe_keys(directory: Path, sources: Sources, n_vocab: int) -> list[Key]:
    vocabulary = parse_vocabulary(load_json(directory, JSON_NAME), n_vocab)
    return [
        string("tokenizer.ggml.model", "gpt2"),
        string("tokenizer.ggml.pre", "minimax-m2"),
        array("tokenizer.ggml.tokens", vocabulary.tokens),
        array("tokenizer.ggml.token_type", vocabulary.types),
        array("tokenizer.ggml.merges", vocabulary.merges),
        *_special_keys(vocabulary.tokens, vocabulary.types, sources, JSON_NAME, {}),
        boolean("tokenizer.ggml.add_bos_token", False),  # the chat template writes it: never two
    ]


def _piece_keys(directory: Path, sources: Sources, n_vocab: int) -> list[Key]:
    settings = sources.settings
    pieces = load_pieces(directory, settings, n_vocab)
    keys = [
        string("tokenizer.ggml.model", "llama"),
        string("tokenizer.ggml.pre", "default"),
        array("tokenizer.ggml.tokens", pieces.tokens),
        Key("tokenizer.ggml.scores", pieces.scores, "ARRAY"),
        array("tokenizer.ggml.token_type", pieces.types),
        *_special_keys(pieces.tokens, pieces.types, sources, MODEL_NAME, pieces.special),
        boolean("tokenizer.ggml.add_space_prefix", pieces.space_prefix),
    ]
    for name in ("add_bos_token", "add_eos_token"):
        if isinstance(settings.get(name), bool):
            keys.append(boolean(f"tokenizer.ggml.{name}", settings[name]))
    return keys


def sampling_keys(directory: Path, warnings: list[str]) -> list[Key]:
    """The publisher's defaults for sampling, as generation_config.json states them; what is left out is told."""
    found = load_json(directory, GENERATION, optional=True)
    keys = []
    for source, target, make in SAMPLING:
        value = found.get(source)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if not -(2**31) < value < 2**31:
                raise BadModelError(
                    f"generation_config.json: {source} is {str(value)[:40]}, which no sampler has.",
                    "Correct that file.",
                )
            keys.append(make(target, value))
    lost = [f"{key} {str(found[key])[:40]}" for key, nothing in UNSAID if found.get(key) not in (None, nothing)]
    if lost:
        warnings.append(f"generation_config.json asks for {', '.join(lost)}, which a GGUF cannot say: it is left out.")
    return keys


def parse_vocabulary(tokenizer: Mapping[str, Any], n_vocab: int) -> BpeVocabulary:
    """Tokens by id, their types and the merges; BadModelError where tokenizer.json is not M2's kind."""
    try:
        return _parse_vocabulary(tokenizer, n_vocab)
    except (AttributeError, KeyError, TypeError) as error:
        raise _bad(f"a part of it has another form than expected ({error!r})") from None


def _parse_vocabulary(tokenizer: Mapping[str, Any], n_vocab: int) -> BpeVocabulary:
    model = tokenizer.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise _bad("model is not byte-level BPE")
    if tokenizer.get("normalizer") is not None:
        raise _bad("it has a normalizer, M2's has none")
    _check_pre_tokenizer(tokenizer.get("pre_tokenizer"))
    tokens: dict[int, str] = {}
    types: dict[int, int] = {}
    for text, token_id in model["vocab"].items():
        _place(tokens, token_id, text, n_vocab)
        types[token_id] = NORMAL
    for added in tokenizer.get("added_tokens") or []:
        token_id, text = added["id"], added["content"]
        if tokens.get(token_id) != text:
            _place(tokens, token_id, text, n_vocab)
        types[token_id] = CONTROL if added.get("special") else USER_DEFINED
    if len(set(tokens.values())) != len(tokens):
        raise _bad("two ids have the same text")
    for token_id in range(n_vocab):
        if token_id not in tokens:
            tokens[token_id] = f"[PAD{token_id}]"
            types[token_id] = UNUSED
    order = range(n_vocab)
    merges = _parse_merges(model.get("merges"), set(tokens.values()))
    return BpeVocabulary([tokens[i] for i in order], [types[i] for i in order], merges)


def _bad(what: str) -> BadModelError:
    return BadModelError(f"tokenizer.json: {what}.", "Use the tokenizer.json of a MiniMax-M2.")


def _place(tokens: dict[int, str], token_id: Any, text: Any, n_vocab: int) -> None:
    if type(token_id) is not int or not 0 <= token_id < n_vocab:
        raise _bad(f"token {text!r} has id {token_id!r}, beyond the {n_vocab} of config.json's vocab_size")
    if not isinstance(text, str) or not text:
        raise _bad(f"token {token_id} is {text!r}, not a text")
    if token_id in tokens:
        raise _bad(f"id {token_id} belongs to both {tokens[token_id]!r} and {text!r}")
    tokens[token_id] = text


def _parse_merges(merges: Any, known: set[str]) -> list[str]:
    """Merges as "left right", from either of the two spellings."""
    if not isinstance(merges, list) or not merges:
        raise _bad("it has no merges")
    result = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p in known for p in parts):
            raise _bad(f"the merge {merge!r} is not two tokens")
        if "".join(parts) not in known:
            raise _bad(f"the merge {merge!r} makes a token that does not exist")
        result.append(" ".join(parts))
    return result


def _check_pre_tokenizer(pre_tokenizer: Any) -> None:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if isinstance(pre_tokenizer, dict) else []
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if patterns != [PATTERN]:
        raise _bad(f"its pre-tokenizer splits by {patterns!r}, not by M2's pattern")


def _special_keys(
    tokens: list[str], types: list[int], sources: Sources, source: str, defaults: Mapping[str, int]
) -> list[Key]:
    """What tokenizer_config.json names, or M2's own strings, or what the tokenizer itself says."""
    ids = {text: token_id for token_id, text in enumerate(tokens)}
    keys: list[Key] = []
    for role, (setting, target, own) in SPECIAL.items():
        named = sources.settings.get(setting)
        text = named.get("content") if isinstance(named, dict) else named
        if text is not None and not isinstance(text, str):
            raise _bad_setting(setting, f"{text!r}, not a token")
        if text is not None and text not in ids:
            raise BadModelError(
                f"tokenizer_config.json: {setting} {text!r} is not in {source}.", "Use a matching pair."
            )
        token_id = ids.get(own if text is None else text, defaults.get(role))
        if role == "eos":
            ordinary = frozenset(i for i, kind in enumerate(types) if kind not in (CONTROL, USER_DEFINED))
            named_id = None if text is None else token_id
            ends = end_keys(tokens, ordinary, named_id, sources.generation, sources.config, sources.warnings)
            keys += ends or ([] if token_id is None else [uint32(target, token_id)])
        elif token_id is not None:
            keys.append(uint32(target, token_id))
    return keys


def _load_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    data = read_small(path, MAX_TEMPLATE_BYTES)
    if data is not None:
        check_impostor(path, data)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise BadModelError(f"{path.name} is not UTF-8: {error}.", "Check that it is the template.") from None
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones: the default is the one that everybody uses
        found = {str(t.get("name")): t.get("template") for t in template if isinstance(t, dict)}
        if not isinstance(found.get("default"), str):
            raise _bad_setting("chat_template", f"a list without a template named default, of {list(found)}")
        template = found["default"]
    if template is not None and not isinstance(template, str):
        raise _bad_setting("chat_template", f"{template!r}, not a text")
    return template


def _bad_setting(key: str, found: str) -> BadModelError:
    return BadModelError(f"tokenizer_config.json: {key} is {found}.", "Check that file.")
