"""config.json of a MiniMax-M2, in both spellings, as frozen sizes. Refuses what M2 does not have and names the key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from m2lite.errors import BadModelError
from m2lite.quant.config_keys import ARITHMETIC, HARMLESS, READ, REQUIREMENTS, ROPE_DEFAULTS, ROPE_READ, WRAPPERS

ARCHITECTURE = "MiniMaxM2ForCausalLM"
MODEL_TYPE = "minimax_m2"
FULL_ATTENTION = "full_attention"


@dataclass(frozen=True)
class SourceConfig:
    """Sizes of the model, as its checkpoint states them."""

    n_layers: int
    n_embd: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    rotary_dim: int
    n_ff: int
    n_experts: int
    n_experts_used: int
    n_vocab: int
    n_ctx_train: int
    rope_theta: float
    rms_eps: float
    routing_bias: bool  # False only where config.json says so: then a missing bias tensor means zeros
    mtp_hidden: str | None  # our own key, m2lite_mtp: which hidden state feeds the first module ...
    mtp_zero_at_0: bool | None  # ... and whether position 0 sees a zero embedding; None: as the layout has it

    def dims(self) -> dict[str, int]:
        """The sizes that tensor shapes are made of, by the words that quant/names.py uses."""
        return {
            "vocab": self.n_vocab,
            "embd": self.n_embd,
            "2embd": 2 * self.n_embd,
            "q": self.n_heads * self.head_dim,
            "kv": self.n_kv_heads * self.head_dim,
            "ff": self.n_ff,
            "experts": self.n_experts,
        }


# field: (spellings, largest value). Every one is a whole number of at least 1.
COUNTS: Mapping[str, tuple[tuple[str, ...], int]] = {
    "n_layers": (("num_hidden_layers",), 1024),
    "n_embd": (("hidden_size",), 1 << 20),
    "n_heads": (("num_attention_heads",), 4096),
    "n_kv_heads": (("num_key_value_heads",), 4096),
    "head_dim": (("head_dim",), 4096),
    "n_ff": (("intermediate_size", "moe_intermediate_size"), 1 << 20),
    "n_experts": (("num_local_experts", "num_experts"), 1024),
    "n_experts_used": (("num_experts_per_tok",), 1024),
    "n_vocab": (("vocab_size",), 1 << 24),
    "n_ctx_train": (("max_position_embeddings",), (1 << 31) - 1),
}


def parse_config(raw: Mapping[str, Any]) -> SourceConfig:
    """Sizes from config.json; BadModelError names the key that is missing, out of range or not M2's."""
    check_architecture(raw)
    _check_requirements(raw)
    counts = {field: _count(raw, names, largest) for field, (names, largest) in COUNTS.items()}
    ropes = _rope_tables(raw)
    mtp = _object(raw, "m2lite_mtp")
    for key in mtp.keys() - {"hidden", "zero_at_0"}:
        raise _bad(f"m2lite_mtp.{key}", mtp[key], "only hidden and zero_at_0 there", "Check config.json.")
    config = SourceConfig(
        **counts,
        rotary_dim=_rotary_dim(raw, ropes, counts["head_dim"]),
        rope_theta=_rope_theta(raw, ropes),
        rms_eps=_positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        routing_bias=raw.get("use_routing_bias") is not False,
        mtp_hidden=mtp.get("hidden"),
        mtp_zero_at_0=mtp.get("zero_at_0"),
    )
    _check_relations(config)
    return config


def config_warnings(raw: Mapping[str, Any]) -> list[str]:
    """Sentences on what a config that `parse_config` takes leaves in doubt."""
    warnings = []
    for key, own in (("model_type", MODEL_TYPE), ("architectures", [ARCHITECTURE])):
        if raw.get(key) not in (None, own):
            warnings.append(f"config.json: {key} is {raw[key]!r}, M2's is {own!r}: it is read as an M2 all the same.")
    if unknown := _unknown(raw):
        shown = ", ".join(f"{key[:60]} ({str(raw[key])[:40]})" for key in unknown[:8]) + (
            ", ..." if unknown[8:] else ""
        )
        warnings.append(
            f"config.json has keys that no M2 is known to have and that are not read, {len(unknown)} in all: {shown}."
            " If one of them changes what the model computes, the result is another model."
        )
    if not any(table.get("partial_rotary_factor") for _, table in _rope_tables(raw)) and not any(
        raw.get(key) for key in ("rotary_dim", "partial_rotary_factor")
    ):
        warnings.append(
            "config.json says nothing of the rotary width (rotary_dim or partial_rotary_factor): all of each head is"
            " rotated, where the published M2 rotates half of it."
        )
    return warnings


NOTHING: tuple[Any, ...] = (None, False, {}, [], "")


def check_architecture(raw: Mapping[str, Any]) -> None:
    """Raises BadModelError where config.json is of another model, or of one that M2 is only a part of."""
    for key in WRAPPERS:
        if raw.get(key) not in NOTHING:
            keys = ", ".join(raw[key]) if isinstance(raw[key], dict) else repr(raw[key])
            raise BadModelError(
                f"config.json: {key} is given ({keys[:200]}): this is a model within another one.",
                "Only a checkpoint of MiniMax-M2 by itself can be converted.",
            )

    if raw.get("model_type") != MODEL_TYPE and raw.get("architectures") != [ARCHITECTURE]:
        raise _bad(
            "model_type", raw.get("model_type"), f"{MODEL_TYPE!r}", "Only MiniMax-M2 checkpoints can be converted."
        )


def _check_requirements(raw: Mapping[str, Any]) -> None:
    for key, (passes, has) in REQUIREMENTS.items():
        value = raw.get(key)
        if value is not None and not passes(value):
            raise _bad(key, value, f"what M2 has: {has}", "This is another architecture.")
    # An object is never a remark: its keys decide something, and none of them would be read.
    for key in _unknown(raw):
        if isinstance(raw[key], dict) or ARITHMETIC.search(key):
            what = "no such object in an M2" if isinstance(raw[key], dict) else "no such key in an M2"
            raise _bad(key, raw[key], what, "Remove it only if it does not change the arithmetic.")


def _unknown(raw: Mapping[str, Any]) -> list[str]:
    """Keys with a value that no M2 is known to have."""
    known = HARMLESS | READ | REQUIREMENTS.keys() | {name for names, _ in COUNTS.values() for name in names}
    return [key for key in raw if key not in known and raw[key] not in NOTHING and not key.startswith("_")]


def _bad(key: str, found: object, expected: str, todo: str) -> BadModelError:
    return BadModelError(f"config.json: {key} is {repr(found)[:200]}, expected {expected}.", todo)


def _count(raw: Mapping[str, Any], names: tuple[str, ...], largest: int) -> int:
    given = [name for name in names if raw.get(name) is not None]
    key = given[0] if given else names[0]
    value = raw.get(key)
    for other in given[1:]:
        if raw[other] != value:
            raise _bad(other, raw[other], f"the {value!r} of {key}", "Keep one of them.")
    if key == "head_dim" and value is None:
        value = _count(raw, ("hidden_size",), 1 << 20) // _count(raw, ("num_attention_heads",), 4096)
    if type(value) is not int or not 1 <= value <= largest:
        raise _bad(key, value, f"a whole number from 1 to {largest}", "Check config.json.")
    return value


def _object(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise _bad(key, value, "an object", "Check config.json.")
    return value


RopeTables = list[tuple[str, Mapping[str, Any]]]


def _rope_tables(raw: Mapping[str, Any]) -> RopeTables:
    """Every place that speaks of rotary positions, with its name: flat, or one table for each type of layer."""
    return [*_rope_places(raw, "rope_parameters"), *_rope_places(raw, "rope_scaling")]


def _rope_places(raw: Mapping[str, Any], key: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    table = _object(raw, key)
    nested = {name: value for name, value in table.items() if isinstance(value, dict)}
    if not nested:
        _check_rope(key, table, table if key == "rope_scaling" else None)
        yield f"{key}.", table
        return
    own = nested.get(FULL_ATTENTION)
    for name, value in table.items():
        # transformers gives each type of layer its own table; every layer of an M2 is of one type.
        if own is None or (name != FULL_ATTENTION and value != own):
            what = f"equal to {key}.{FULL_ATTENTION}, since M2 has one type of layer"
            raise _bad(f"{key}.{name}", value, what, "This is another architecture.")
    assert own is not None
    _check_rope(f"{key}.{FULL_ATTENTION}", own, None)
    yield f"{key}.{FULL_ATTENTION}.", own


def _check_rope(place: str, table: Mapping[str, Any], whole: object) -> None:
    """Plain RoPE, and nothing in the table that would make another of it; `whole` is quoted where it is given."""
    for key, value in table.items():
        if key in ROPE_READ or (key in ROPE_DEFAULTS and value in ROPE_DEFAULTS[key]):
            continue
        name, found = (f"{place}.{key}", value) if whole is None else (place, whole)
        expected = " or ".join(map(repr, ROPE_DEFAULTS[key])) if key in ROPE_DEFAULTS else "no such key"
        more = "" if whole is None else f" (of {key})"
        raise _bad(name, found, f"{expected}{more}", "M2 has plain RoPE, without scaling.")


def _agreed(what: str, found: Mapping[str, Any]) -> Any:
    """The one value that all places give, None where none does."""
    if len(set(found.values())) > 1:
        raise BadModelError(f"config.json contradicts itself on {what}: {dict(found)}.", "Keep one of them.")
    return next(iter(found.values()), None)


def _rotary_dim(raw: Mapping[str, Any], ropes: RopeTables, head_dim: int) -> int:
    """Old spelling: rotary_dim. New: a factor of head_dim. Neither: all of the head, as transformers reads it."""
    found = {}
    if raw.get("rotary_dim") is not None:
        found["rotary_dim"] = raw["rotary_dim"]
    for place, table in (*ropes, ("", raw)):
        factor = table.get("partial_rotary_factor")
        if factor is not None:
            if type(factor) not in (int, float) or not 0 < factor <= 1:
                raise _bad(f"{place}partial_rotary_factor", factor, "a number in (0, 1]", "Check config.json.")
            found[f"{place}partial_rotary_factor"] = int(head_dim * factor)
    for key, value in found.items():
        if type(value) is not int or not 2 <= value <= head_dim or value % 2:
            raise _bad(key, value, f"an even width up to head_dim {head_dim}", "Check config.json.")
    width = _agreed("the rotary width", found)
    return head_dim if width is None else int(width)


def _rope_theta(raw: Mapping[str, Any], ropes: RopeTables) -> float:
    found = {f"{place}rope_theta": table["rope_theta"] for place, table in (*ropes, ("", raw)) if "rope_theta" in table}
    checked = {key: _positive(key, value) for key, value in found.items() if value is not None}
    theta = _agreed("the base of the rotary positions", checked)
    return 5e6 if theta is None else float(theta)


def _positive(key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise _bad(key, value, "a positive number", "Check config.json.")
    return float(value)


def _check_relations(config: SourceConfig) -> None:
    if config.n_heads % config.n_kv_heads:
        raise _bad("num_key_value_heads", config.n_kv_heads, f"a divisor of {config.n_heads}", "Check config.json.")
    if config.n_experts_used > config.n_experts:
        raise _bad("num_experts_per_tok", config.n_experts_used, f"at most {config.n_experts}", "Check config.json.")
    if config.mtp_hidden not in (None, "pre_norm", "post_norm"):
        raise _bad("m2lite_mtp.hidden", config.mtp_hidden, "'pre_norm' or 'post_norm'", "Check config.json.")
    if config.mtp_zero_at_0 not in (None, True, False):
        raise _bad("m2lite_mtp.zero_at_0", config.mtp_zero_at_0, "true or false", "Check config.json.")
