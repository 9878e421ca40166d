"""quant/recipes.py: llama-quantize's mixes, m2-int4, overrides, fallbacks, target sizes; quant/names.role_of.

llama_mixes.json is what `llama-quantize --dry-run` (llama.cpp of llama-cpp-python 0.3.36) says of models of these
sizes, M2's own included: mix -> "most; type layers" -> kinds. "imatrix": with an importance matrix for every tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from m2lite.errors import BadModelError, UsageError
from m2lite.formats.table import FORMATS
from m2lite.quant.names import EXACT_ROLES, LAYER, MTP_TENSORS, TRUNK, role_of
from m2lite.quant.recipes import (
    FALLBACKS,
    FLOOR,
    LADDER,
    LAST_RESORT,
    RECIPES,
    Choice,
    body_bytes,
    choose_formats,
    find_recipe,
    parse_overrides,
    split_name,
)

MIXES: dict[str, Any] = json.loads((Path(__file__).parent / "llama_mixes.json").read_text())
M2 = MIXES["m2"]["dims"]
GB = 10**9


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]
    role: str
    mtp: bool = False


def trunk(dims: dict[str, int]) -> list[Tensor]:
    layers = [(f"blk.{i}.{entry.gguf}", entry) for i in range(dims["layers"]) for entry in LAYER]
    entries = [(entry.gguf, entry) for entry in TRUNK] + layers
    return [Tensor(name, tuple(dims[w] for w in entry.shape), role_of(name)) for name, entry in entries]


def module(dims: dict[str, int], block: int) -> list[Tensor]:
    layer = [t for t in trunk({**dims, "layers": block + 1}) if t.name.startswith(f"blk.{block}.")]
    embd = dims["embd"]
    own = [Tensor(f"blk.{block}.nextn.{n}.weight", (embd, 2 * embd)[: 2 if r == "mtp_projection" else 1], r)
           for n, r in MTP_TENSORS.items()]  # fmt: skip
    return [t._replace(mtp=True) for t in layer + own]


def total(choices: dict[str, Choice], tensors: list[Tensor], alignment: int = 1) -> int:
    return sum(body_bytes(choices[t.name].block_format, t.shape, alignment) for t in tensors)


def layers_of(text: str) -> Iterator[int]:
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def expected_types(case: str, mix: str) -> dict[tuple[str, int], str]:
    """(kind, layer) -> type, as the file of expectations packs it; all the rest is F32."""
    table = MIXES[case]["mixes"][mix]
    if table == "same":
        table = MIXES[case]["mixes"][mix.removesuffix(" imatrix")]
    found = {}
    for types, kinds in table.items():
        most, *others = types.split("; ")
        for kind in kinds.split():
            found |= {(kind, layer): most for layer in range(MIXES[case]["dims"]["layers"])}
            for other in others:
                name, _, where = other.partition(" ")
                found |= {(kind, layer): name for layer in layers_of(where)}
    return found


@pytest.mark.parametrize("case", MIXES)
def test_every_named_mix_is_llama_quantizes(case: str) -> None:
    tensors = trunk(MIXES[case]["dims"])
    for mix in MIXES[case]["mixes"]:
        name, _, weighted = mix.partition(" ")
        choices = choose_formats(find_recipe(name), tensors, has_importance=bool(weighted))
        expected = expected_types(case, mix)
        for tensor in tensors:
            layer, kind = split_name(tensor.name)
            wanted = expected.get((kind, layer or 0), "F32")
            assert choices[tensor.name].block_format.name == wanted, (mix, tensor.name)


def test_the_expectations_cover_every_mix_but_ours() -> None:
    for case in MIXES.values():
        assert {mix for mix in case["mixes"] if " " not in mix} == RECIPES.keys() - {"m2-int4", "f32"}
    assert all(set(case["mixes"]) >= {"q4_0 imatrix", "iq4_xs imatrix"} for case in MIXES.values())


# MiB as llama-quantize prints them for M2.
@pytest.mark.parametrize(
    ("mix", "mib"), [("q4_0", 122992.47), ("q4_k_m", 131925.67), ("iq4_xs", 117485.84), ("q8_0", 231865.49)]
)
def test_m2_has_llama_quantizes_size(mix: str, mib: float) -> None:
    tensors = trunk(M2)
    assert total(choose_formats(find_recipe(mix), tensors), tensors) / 2**20 == pytest.approx(mib, abs=0.006)


def test_every_type_that_a_recipe_names_can_be_written() -> None:
    rules = [rule.type for recipe in RECIPES.values() for rule in recipe.rules] + [r.type for r in (*FLOOR, *LADDER)]
    types = {*rules, *(recipe.base for recipe in RECIPES.values()), *FALLBACKS, *FALLBACKS.values(), LAST_RESORT}
    assert all(FORMATS[name].is_writable for name in types)


def test_m2_int4_spends_its_bits_where_they_count() -> None:
    tensors = trunk(M2) + module(M2, 62)
    chosen = {name: choice.block_format.name for name, choice in choose_formats(RECIPES["m2-int4"], tensors).items()}
    four_bit = chosen["blk.30.ffn_gate_exps.weight"]
    assert {chosen[f"blk.{i}.ffn_{w}_exps.weight"] for i in range(62) for w in ("gate", "up")} == {four_bit}
    down = [chosen[f"blk.{i}.ffn_down_exps.weight"] for i in range(62)]
    assert down == ["Q5_K"] * 7 + [four_bit] * 47 + ["Q5_K"] * 7 + ["Q8_0"]
    assert chosen["token_embd.weight"] == "Q8_0" and chosen["output.weight"] == "Q6_K"
    assert {chosen[f"blk.{i}.attn_{w}.weight"] for i in range(62) for w in "kv"} == {"Q8_0"}
    assert {chosen[f"blk.{i}.attn_{w}.weight"] for i in range(62) for w in ("q", "output")} == {"Q6_K"}
    main = tensors[: -len(module(M2, 62))]
    bits = 8 * total(choose_formats(RECIPES["m2-int4"], main), main) / 228_689_764_864
    assert FORMATS[four_bit].n_bytes * 8 / FORMATS[four_bit].n_weights < bits < 4.8


@pytest.mark.parametrize(
    "name", [name for name, recipe in RECIPES.items() if recipe.base not in ("F32", "F16", "BF16")]
)
def test_dense_parts_of_prediction_modules_are_8_bit(name: str) -> None:
    tensors = trunk(M2) + module(M2, 62) + module(M2, 63)
    choices = choose_formats(find_recipe(name), tensors)
    alone = choose_formats(find_recipe(name), [t for t in tensors if t.mtp])
    for tensor in tensors:
        chosen = choices[tensor.name].block_format.name
        if tensor.role in EXACT_ROLES:
            assert chosen == "F32"
        elif tensor.mtp:
            late = choices.get(tensor.name.replace(f"blk.{split_name(tensor.name)[0]}", "blk.60"))
            assert chosen == (late.block_format.name if late and tensor.role == "experts" else "Q8_0")
        if tensor.mtp:
            assert alone[tensor.name].block_format is choices[tensor.name].block_format


def test_modules_do_not_shift_the_trunks_layers() -> None:
    tensors = trunk(M2)
    plain = choose_formats(RECIPES["q4_k_m"], tensors)
    assert choose_formats(RECIPES["q4_k_m"], module(M2, 62) + tensors).items() >= plain.items()


def test_a_fused_qkv_counts_as_v() -> None:
    tensors = [t for t in trunk(M2) if ".attn_q.w" not in t.name and ".attn_k.w" not in t.name]
    fused = [t._replace(name=t.name.replace("attn_v.", "attn_qkv."), shape=(8192, 3072)) if ".attn_v." in t.name else t
             for t in tensors]  # fmt: skip
    for mix in ("iq4_xs", "q4_k_m"):
        separate = choose_formats(find_recipe(mix), trunk(M2))
        for name, choice in choose_formats(find_recipe(mix), fused).items():
            assert choice == separate[name.replace("attn_qkv.", "attn_v.")]


def test_a_width_that_is_not_whole_blocks_falls_back_and_says_what_was_wanted() -> None:
    tensors = trunk({**M2, "layers": 8, "ff": 1536 + 128})
    choice = choose_formats(RECIPES["q4_k_m"], tensors)
    assert choice["blk.0.ffn_down_exps.weight"] == Choice(FORMATS["Q8_0"], "Q6_K")
    assert choice["blk.2.ffn_down_exps.weight"] == Choice(FORMATS["Q5_0"], "Q4_K")
    assert choice["blk.0.ffn_up_exps.weight"] == Choice(FORMATS["Q4_K"], "Q4_K")
    iq4 = choose_formats(RECIPES["iq4_xs"], [Tensor("blk.7.ffn_down_exps.weight", (4, 8, 32), "experts")])
    assert iq4["blk.7.ffn_down_exps.weight"] == Choice(FORMATS["IQ4_NL"], "IQ4_XS")


def test_a_fixed_set_of_names_is_found() -> None:
    assert find_recipe("Q4_K") is RECIPES["q4_k_m"] and find_recipe("MXFP4_MOE") is RECIPES["mxfp4"]
    assert find_recipe("M2_INT4") is RECIPES["m2-int4"]
    with pytest.raises(UsageError, match=r"'q3_k_m' is not an output type.*q4_0"):
        find_recipe("q3_k_m")


def test_the_first_override_that_matches_counts() -> None:
    tensors = trunk(M2)
    overrides = parse_overrides([r"blk\.(0|61)\.ffn_down=q6_K", "ffn_down_exps=Q5_K", "attn_q=bf16"])
    choices = choose_formats(RECIPES["q4_0"], tensors, overrides)
    plain = choose_formats(RECIPES["q4_0"], tensors)
    for tensor in tensors:
        layer, kind = split_name(tensor.name)
        expected = plain[tensor.name].block_format.name
        if kind == "ffn_down_exps":
            expected = "Q6_K" if layer in (0, 61) else "Q5_K"
        elif kind == "attn_q":  # and not attn_q_norm, which the regex finds too
            expected = "BF16"
        assert choices[tensor.name].block_format.name == expected


def test_an_override_falls_back_like_any_other_choice() -> None:
    choices = choose_formats(RECIPES["f16"], trunk({**M2, "layers": 1, "ff": 96}), parse_overrides(["down=q4_k"]))
    assert choices["blk.0.ffn_down_exps.weight"] == Choice(FORMATS["Q5_0"], "Q4_K")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_down", "'ffn_down' is not REGEX=TYPE"),
        ("=q4_0", "'=q4_0' is not REGEX=TYPE"),
        ("ffn_down=", "'' in 'ffn_down=' is not a tensor type"),
        ("ffn_down=q9_z", "'q9_z' in 'ffn_down=q9_z' is not a tensor type. Take one of f32,"),
        ("ffn_down=iq2_xs", "'iq2_xs' in .* is not a tensor type"),
        ("ffn_(down=q4_0", "is not a regular expression: missing"),
    ],
)
def test_a_malformed_override_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message) if ".*" not in message else message):
        parse_overrides(["attn_q=q8_0", text])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_sideways=q4_0", "No tensor matches 'ffn_sideways'"),
        ("gate_inp=q8_0", "matches only tensors that stay F32, the first is 'blk.0.ffn_gate_inp.weight'"),
        ("_norm=bf16", "matches only tensors that stay F32, the first is '.*_norm.weight'"),
    ],
)
def test_an_override_without_effect_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_formats(RECIPES["q4_0"], trunk(M2), parse_overrides([text]))


def test_a_regex_may_hold_an_equals_sign() -> None:
    ((pattern, name),) = parse_overrides(["attn_(?=v)=q8_0"])
    assert name == "Q8_0" and pattern.search("blk.0.attn_v.weight") and not pattern.search("blk.0.attn_q.weight")


def test_a_target_size_is_just_not_exceeded() -> None:
    tensors = trunk(M2)
    step = body_bytes(FORMATS["Q5_K"], (256, 3072, 1536)) - body_bytes(FORMATS["Q4_K"], (256, 3072, 1536))
    for target in (125 * GB, 130 * GB, 140 * GB, 170 * GB, 200 * GB):
        choices = choose_formats(RECIPES["m2-int4"], tensors, target_bytes=target, alignment=4096)
        assert target - 2 * step < total(choices, tensors, 4096) <= target
        assert choices == choose_formats(RECIPES["m2-int4"], tensors[::-1], target_bytes=target, alignment=4096)
    most = choose_formats(RECIPES["m2-int4"], tensors, target_bytes=900 * GB)
    assert {most[t.name].block_format.name for t in tensors if t.role not in EXACT_ROLES} == {"Q8_0"}


def test_more_room_takes_bits_from_no_tensor() -> None:
    tensors = trunk(M2)
    sizes = []
    for target in range(123, 240, 9):
        choices = choose_formats(RECIPES["m2-int4"], tensors, target_bytes=target * GB)
        sizes.append([body_bytes(choices[t.name].block_format, t.shape) for t in tensors])
        first, middle = (choices[f"blk.{i}.ffn_down_exps.weight"].block_format for i in (0, 30))
        assert first.row_bytes(1536) >= middle.row_bytes(1536)
    assert all(small <= large for a, b in pairwise(sizes) for small, large in zip(a, b, strict=True))


def test_a_target_that_cannot_be_met_names_the_smallest_size() -> None:
    tensors = trunk(M2)
    with pytest.raises(
        UsageError, match=r"takes 114\.0 GiB .* where 93\.1 GiB \(100,000,000,000 bytes\) were"
    ) as caught:
        choose_formats(RECIPES["m2-int4"], tensors, target_bytes=100 * GB)
    least = int(re.findall(r"takes .*?\(([0-9,]+) bytes", str(caught.value))[0].replace(",", ""))
    assert total(choose_formats(RECIPES["m2-int4"], tensors, target_bytes=least), tensors, 32) == least
    with pytest.raises(UsageError, match="smallest file"):
        choose_formats(RECIPES["m2-int4"], tensors, target_bytes=least - 1)
    with pytest.raises(UsageError, match="q4_k_m is a fixed mix"):
        choose_formats(RECIPES["q4_k_m"], tensors, target_bytes=150 * GB)


def test_a_target_leaves_overrides_and_modules_alone() -> None:
    tensors = trunk(M2) + module(M2, 62)
    overrides = parse_overrides([r"blk\.3\.ffn_up=f16"])
    choices = choose_formats(RECIPES["m2-int4"], tensors, overrides, target_bytes=130 * GB)
    plain = choose_formats(RECIPES["m2-int4"], tensors)
    assert choices["blk.3.ffn_up_exps.weight"].block_format.name == "F16"
    assert all(choices[t.name] == plain[t.name] for t in tensors if t.mtp)
    assert 129 * GB < total(choices, [t for t in tensors if not t.mtp]) <= 130 * GB


def test_roles_by_gguf_name() -> None:
    assert role_of("blk.61.ffn_gate_inp.weight") == "router" and role_of("blk.0.ffn_gate_exps.weight") == "experts"
    assert role_of("blk.62.nextn.eh_proj.weight") == "mtp_projection" and role_of("output.weight") == "head"
    assert role_of("blk.3.attn_qkv.weight") == "attention" and role_of("blk.3.exp_probs_b.bias") == "bias"
    for foreign in ("blk.0.ssm_conv1d.weight", "rope_freqs.weight", "blk.07.attn_q.weight", "attn_q.weight"):
        with pytest.raises(BadModelError, match=f"Tensor '{foreign}' has no place in an M2"):
            role_of(foreign)
