"""Which tokens end a reply, from every file of a checkpoint that says so. Knows ids and texts, writes no file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m2lite.quant.header import Key, uint32

GENERATION, SETTINGS, CONFIG = "generation_config.json", "tokenizer_config.json", "config.json"
OWN_END = "[e~["  # M2's own: it ends a turn whatever a file says
KEY_EOS, KEY_EOT, KEY_EOM = (f"tokenizer.ggml.{role}_token_id" for role in ("eos", "eot", "eom"))
KEY_STOP_IDS = "m2lite.stop_token_ids"


def end_keys(
    tokens: Sequence[str],
    ordinary: frozenset[int],
    named: int | None,
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    warnings: list[str],
) -> list[Key]:
    """Keys of the end tokens: the first is eos, then eot and eom, and what those do not hold is a list of our own.

    generation_config.json counts, as for transformers; then `named`, the eos_token of tokenizer_config.json; then
    config.json, then M2's own. Where they differ it is told in `warnings`.
    """
    found = {
        GENERATION: _ids(GENERATION, generation, len(tokens), warnings),
        SETTINGS: [] if named is None else [named],
        CONFIG: _ids(CONFIG, config, len(tokens), warnings),
    }
    own = [tokens.index(OWN_END)] if OWN_END in tokens else []
    source, ids = next(((source, ids) for source, ids in found.items() if ids), ("M2", own))
    for other, others in found.items():
        if others and others[0] not in ids:
            warnings.append(
                f"{source} ends a reply at {_shown(ids, tokens)}, {other} at {_shown(others, tokens)}: the first"
                " counts."
            )
    if own and ids and own[0] not in ids:
        warnings.append(f"{source} does not name M2's own end of a turn, {_shown(own, tokens)}, which ends one too.")
    words = [token_id for token_id in ids if token_id in ordinary]
    if words:
        warnings.append(
            f"{source} ends a reply at {_shown(words, tokens)}, no control token: a reply ends wherever it comes up."
        )
    keys = [uint32(key, token_id) for key, token_id in zip((KEY_EOS, KEY_EOT, KEY_EOM), ids, strict=False)]
    return [*keys, Key(KEY_STOP_IDS, ids, "UINT32")] if len(ids) > len(keys) else keys


def _ids(source: str, table: Mapping[str, Any], n_tokens: int, warnings: list[str]) -> list[int]:
    """The ids under eos_token_id, one or several, each once; what is no token id is told and left out."""
    value = table.get("eos_token_id")
    items = value if isinstance(value, list) else [] if value is None else [value]
    good = [item for item in items if type(item) is int and 0 <= item < n_tokens]
    bad = [item for item in items if item not in good]
    if bad:
        warnings.append(f"{source}: eos_token_id holds {str(bad)[:80]}, no token id below {n_tokens:,}: not used.")
    return list(dict.fromkeys(good))


def _shown(ids: Sequence[int], tokens: Sequence[str]) -> str:
    return ", ".join(f"{token_id} {tokens[token_id]!r}" for token_id in ids[:8]) + (", ..." if ids[8:] else "")
