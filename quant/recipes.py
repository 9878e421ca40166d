"""Which tensor gets which block format: one table per output type. Knows GGUF names and shapes, not files or bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from m2lite.errors import UsageError
from m2lite.formats.table import FORMATS, BlockFormat
from m2lite.quant.names import EXACT_ROLES
from m2lite.system.byte_units import format_bytes


class Candidate(Protocol):
    """What a choice depends on; names.Binding is one."""

    @property
    def name(self) -> str: ...  # in GGUF
    @property
    def shape(self) -> tuple[int, ...]: ...  # row-major
    @property
    def role(self) -> str: ...
    @property
    def mtp(self) -> bool: ...


class Choice(NamedTuple):
    """`wanted` is what was asked for; `block_format` differs from it where the width is not whole blocks."""

    block_format: BlockFormat
    wanted: str


class TensorPlace(NamedTuple):
    """Where a tensor lies, as far as rules ask. Prediction modules lie behind the last layer, all in one place."""

    layer: int
    n_layers: int
    n_gqa: int
    n_experts: int
    has_importance: bool


class Rule(NamedTuple):
    """Tensors of these kinds get `type` where the test holds; the last rule that holds decides."""

    kinds: tuple[str, ...]
    type: str
    where: Callable[[TensorPlace], bool] = lambda place: True


@dataclass(frozen=True)
class Recipe:
    """An output type: `base` for every matrix that no rule names. Norms, router and selection bias are always F32."""

    name: str
    file_type: int  # llama.cpp's general.file_type
    base: str
    rules: tuple[Rule, ...] = ()
    mtp_dense: str | None = None  # attention and eh_proj of prediction modules
    has_ladder: bool = False  # may be fitted to a size


def _more_bits(place: TensorPlace) -> bool:
    eighth = place.n_layers // 8
    return _on_edge(place) or (place.layer - eighth) % 3 == 2


def _on_edge(place: TensorPlace) -> bool:
    """The first and the last eighth of the layers: 0-6 and 54-61 of M2's 62."""
    return _in_first_eighth(place) or place.layer >= 7 * place.n_layers // 8


def _in_first_eighth(place: TensorPlace) -> bool:
    return place.layer < place.n_layers // 8


def _first_eighth_unweighted(place: TensorPlace) -> bool:
    return _in_first_eighth(place) and not place.has_importance


def _first_eighth_weighted(place: TensorPlace) -> bool:
    return _in_first_eighth(place) and place.has_importance


def _first_four(place: TensorPlace) -> bool:
    return place.layer < 4


def _last(place: TensorPlace) -> bool:
    return place.layer == place.n_layers - 1


def _shared_heads(place: TensorPlace) -> bool:
    return place.n_gqa >= 4


def _eight_experts(place: TensorPlace) -> bool:
    return place.n_experts == 8


EMBEDDING, HEAD = ("token_embd",), ("output",)
V, K, Q_AND_O = ("attn_v", "attn_qkv"), ("attn_k",), ("attn_q", "attn_output")
DOWN, GATE_UP = ("ffn_down_exps",), ("ffn_gate_exps", "ffn_up_exps")

# A width that is not whole blocks of the one takes the other, as llama-quantize does; where that fails too, F16.
FALLBACKS: Mapping[str, str] = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}
LAST_RESORT = "F16"

# A draft head at 4 bits is hardly ever right (facts: 0-4 % acceptance against 39-59 % at 8 bits).
MTP_DENSE = "Q8_0"

# The one word to change when measurements prefer another 4-bit type: gate and up, and down within the trunk.
INT4 = "Q4_K"
FILE_TYPES = {"Q4_0": 2, "Q4_K": 15, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4": 38}


def _plain(name: str, file_type: int, base: str) -> Recipe:
    return Recipe(name, file_type, base)


def _mix(name: str, file_type: int, base: str, *rules: Rule) -> Recipe:
    """llama-quantize's mix of that name, with the rules that all of its mixes share around it."""
    first = () if base == "Q8_0" else (Rule(HEAD, "Q6_K"),)
    return Recipe(name, file_type, base, (*first, *rules, Rule((*V, *K), "Q8_0", _eight_experts)), MTP_DENSE)


_O_OF_EIGHT = Rule(("attn_output",), "Q5_K", _eight_experts)
_IQ4 = (Rule(V, "Q5_K", _shared_heads), Rule(DOWN, "Q5_K", _first_eighth_unweighted), _O_OF_EIGHT)
_K_S = (Rule(V, "Q5_K", _first_four), Rule(DOWN, "Q5_K", _in_first_eighth), _O_OF_EIGHT)
_K_M = (Rule((*V, *DOWN), "Q6_K", _more_bits),)

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _plain("f32", 0, "F32"),
        _plain("f16", 1, "F16"),
        _plain("bf16", 32, "BF16"),
        _mix("q8_0", 7, "Q8_0"),
        _mix("q6_k", 18, "Q6_K"),
        _mix("q5_k_m", 17, "Q5_K", *_K_M),
        _mix("q5_k_s", 16, "Q5_K"),
        _mix("q4_k_m", 15, "Q4_K", *_K_M, _O_OF_EIGHT),
        _mix("q4_k_s", 14, "Q4_K", *_K_S),
        # The simple formats spare the first layers' down one step, but only when an importance matrix is there.
        _mix("q5_1", 9, "Q5_1"),
        _mix("q5_0", 8, "Q5_0", Rule(DOWN, "Q5_1", _first_eighth_weighted)),
        _mix("q4_1", 3, "Q4_1"),
        _mix("q4_0", 2, "Q4_0", Rule(DOWN, "Q4_1", _first_eighth_weighted)),
        _mix("iq4_nl", 25, "IQ4_NL", *_IQ4),
        _mix("iq4_xs", 30, "IQ4_XS", *_IQ4),
        Recipe("mxfp4", 38, "Q8_0", (Rule((*GATE_UP, *DOWN), "MXFP4"),), MTP_DENSE),
        # Ours. Decoding reads all of attention and head for every token, but 8 of 256 experts and one row of embedding:
        # bits in attention cost speed, bits in experts cost size, bits in the embedding hardly anything.
        Recipe(
            "m2-int4",
            FILE_TYPES[INT4],
            INT4,
            (
                Rule(EMBEDDING, "Q8_0"),  # 0.15 GB more than Q6_K, one row read per token
                Rule(HEAD, "Q6_K"),  # read whole for every token; above 6 bits nothing is gained
                Rule(Q_AND_O, "Q6_K"),  # Q8_0 here would add 8 % to the bytes of a decoded token
                Rule((*V, *K), "Q8_0"),  # the most sensitive matrices, and 1/7 of attention
                Rule(DOWN, "Q5_K", _on_edge),  # one step higher where rounding hurts most: first and last layers
                Rule(DOWN, "Q8_0", _last),  # its inputs are huge: 4- and 5-bit files gave NaN in other engines
            ),
            MTP_DENSE,
            has_ladder=True,
        ),
    )
}
ALIASES = {"q4_k": "q4_k_m", "q5_k": "q5_k_m", "mxfp4_moe": "mxfp4"}  # as llama-quantize has them

# --target-size starts at FLOOR and takes these steps in order, layer by layer from the edges in, while they fit:
# what is most sensitive per byte comes first.
FLOOR = (
    Rule((*GATE_UP, *DOWN), "IQ4_XS"),
    Rule((*EMBEDDING, *Q_AND_O), "Q5_K"),
    Rule((*V, *K, *HEAD), "Q6_K"),
)
LADDER = (
    Rule((*V, *K), "Q8_0"),
    Rule(DOWN, "Q8_0", _last),
    Rule((*Q_AND_O, *EMBEDDING), "Q6_K"),
    Rule(DOWN, "Q5_K", _on_edge),
    Rule(EMBEDDING, "Q8_0"),
    Rule(DOWN, "Q4_K"),
    Rule(GATE_UP, "Q4_K"),
    Rule(DOWN, "Q6_K", _on_edge),
    Rule(DOWN, "Q5_K"),
    Rule(GATE_UP, "Q5_K"),
    Rule(DOWN, "Q6_K"),
    Rule((*HEAD, *Q_AND_O), "Q8_0"),
    Rule(GATE_UP, "Q6_K"),
    Rule(DOWN, "Q8_0"),
    Rule(GATE_UP, "Q8_0"),
)

_NAME = re.compile(r"(?:blk\.([0-9]+)\.)?(.+)\.(?:weight|bias)")


def find_recipe(name: str) -> Recipe:
    key = name.lower().replace("-", "_")
    for recipe in RECIPES.values():
        if recipe.name.replace("-", "_") == ALIASES.get(key, key):
            return recipe
    raise UsageError(f"{name!r} is not an output type.", f"Take one of {', '.join(RECIPES)}.")


def parse_overrides(texts: Sequence[str]) -> list[tuple[re.Pattern[str], str]]:
    """REGEX=TYPE, searched in GGUF names; of several that match a tensor the first counts, as in llama-quantize."""
    overrides = []
    for text in texts:
        regex, found, name = text.rpartition("=")
        if not found or not regex:
            raise UsageError(f"{text!r} is not REGEX=TYPE.", "Write it like ffn_down_exps=q6_k.")
        types = [fmt.name for fmt in FORMATS.values() if fmt.is_writable]
        if name.upper() not in types:
            raise UsageError(f"{name!r} in {text!r} is not a tensor type.", f"Take one of {', '.join(types).lower()}.")
        try:
            overrides.append((re.compile(regex), name.upper()))
        except re.error as error:
            raise UsageError(f"{regex!r} in {text!r} is not a regular expression: {error}.", "Correct it.") from None
    return overrides


def choose_formats(
    recipe: Recipe,
    tensors: Sequence[Candidate],
    overrides: Sequence[tuple[re.Pattern[str], str]] = (),
    has_importance: bool = False,
    target_bytes: int | None = None,
    alignment: int = 32,
    header_bytes: int = 0,
) -> dict[str, Choice]:
    """The format of every tensor, those of the prediction modules included.

    `target_bytes` is what the main file may take: its header, and the bodies, each padded to `alignment`.
    """
    places = _places(tensors, has_importance)
    fixed = _find_overrides(overrides, tensors)
    wanted = {t.name: fixed.get(t.name) or _wanted(recipe, t, places[t.name]) for t in tensors}
    if target_bytes is not None:
        if not recipe.has_ladder:
            raise UsageError(
                f"{recipe.name} is a fixed mix with one size.", "To aim at a size, take --type m2-int4 with it."
            )
        free = [t for t in tensors if not t.mtp and t.role not in EXACT_ROLES and t.name not in fixed]
        _climb(wanted, tensors, free, places, target_bytes, alignment, header_bytes)
    return {t.name: Choice(fit_width(wanted[t.name], t.shape[-1]), wanted[t.name]) for t in tensors}


def fit_width(wanted: str, width: int) -> BlockFormat:
    """The wanted format, or the one that stands in where rows of `width` are not whole blocks of it."""
    for name in (wanted, FALLBACKS.get(wanted, wanted)):
        if width % FORMATS[name].n_weights == 0:
            return FORMATS[name]
    return FORMATS[LAST_RESORT]


def body_bytes(block_format: BlockFormat, shape: tuple[int, ...], alignment: int = 1) -> int:
    """Bytes of a tensor with the padding behind it."""
    size = math.prod(shape[:-1]) * block_format.row_bytes(shape[-1])
    return size + -size % alignment


def split_name(name: str) -> tuple[int | None, str]:
    """blk.3.attn_v.weight -> (3, "attn_v"); output.weight -> (None, "output")."""
    match = _NAME.fullmatch(name)
    assert match is not None, name
    return (int(match[1]) if match[1] else None), match[2]


def _places(tensors: Sequence[Candidate], has_importance: bool) -> dict[str, TensorPlace]:
    """Layers, heads and experts are read off the names and shapes themselves."""
    layers = {t.name: split_name(t.name)[0] for t in tensors}
    n_layers = 1 + max((layers[t.name] or 0 for t in tensors if not t.mtp), default=0)
    shapes = {split_name(t.name)[1]: t.shape for t in tensors}
    n_experts = shapes.get("ffn_gate_inp", shapes.get("ffn_down_exps", (0,)))[0]
    n_gqa = _heads_per_kv_head(shapes)

    def place(tensor: Candidate) -> TensorPlace:
        layer = n_layers if tensor.mtp else layers[tensor.name] or 0
        return TensorPlace(layer, n_layers, n_gqa, n_experts, has_importance)

    return {t.name: place(t) for t in tensors}


def _heads_per_kv_head(shapes: Mapping[str, tuple[int, ...]]) -> int:
    if "attn_q" in shapes and "attn_k" in shapes:
        return shapes["attn_q"][0] // shapes["attn_k"][0]
    if "attn_qkv" in shapes and "attn_output" in shapes:
        n_q = shapes["attn_output"][1]
        return n_q * 2 // (shapes["attn_qkv"][0] - n_q)
    return 1


def _wanted(recipe: Recipe, tensor: Candidate, place: TensorPlace) -> str:
    if tensor.role in EXACT_ROLES:
        return "F32"
    if tensor.mtp and recipe.mtp_dense and tensor.role != "experts":
        return recipe.mtp_dense
    return _last_rule(recipe.rules, tensor, place) or recipe.base


def _last_rule(rules: Sequence[Rule], tensor: Candidate, place: TensorPlace) -> str | None:
    kind = split_name(tensor.name)[1]
    return next((rule.type for rule in reversed(rules) if kind in rule.kinds and rule.where(place)), None)


def _find_overrides(overrides: Sequence[tuple[re.Pattern[str], str]], tensors: Sequence[Candidate]) -> dict[str, str]:
    """Tensor -> type. Norms, router and bias stay F32 under any regex; one that finds nothing else is refused."""
    found: dict[str, str] = {}
    for pattern, type_name in overrides:
        matches = [t for t in tensors if pattern.search(t.name)]
        if not matches:
            raise UsageError(f"No tensor matches {pattern.pattern!r}.", "`m2lite inspect` lists the names.")
        free = [t for t in matches if t.role not in EXACT_ROLES]
        if not free and type_name != "F32":
            raise UsageError(
                f"{pattern.pattern!r} matches only tensors that stay F32, the first is {matches[0].name!r}.",
                "Norms, router and selection bias are never quantized: drop it.",
            )
        for tensor in free:
            found.setdefault(tensor.name, type_name)
    return found


def _climb(
    wanted: dict[str, str],
    tensors: Sequence[Candidate],
    free: Sequence[Candidate],
    places: Mapping[str, TensorPlace],
    target_bytes: int,
    alignment: int,
    header_bytes: int,
) -> None:
    """Puts `free` on the floor, then raises one after another as long as the main file stays within its target."""

    def size(tensor: Candidate, type_name: str) -> int:
        return body_bytes(fit_width(type_name, tensor.shape[-1]), tensor.shape, alignment)

    for tensor in free:
        wanted[tensor.name] = _last_rule(FLOOR, tensor, places[tensor.name]) or INT4
    left = target_bytes - header_bytes - sum(size(t, wanted[t.name]) for t in tensors if not t.mtp)
    if left < 0:
        least = target_bytes - left
        raise UsageError(
            f"The smallest file of this model takes {format_bytes(least)} ({least:,} bytes), where"
            f" {format_bytes(target_bytes)} ({target_bytes:,} bytes) were asked for.",
            "Ask for a larger size, where 1g is 1 GiB; below 4 bits nothing is written.",
        )
    for tensor, type_name in _steps(free, places):
        more = size(tensor, type_name) - size(tensor, wanted[tensor.name])
        if more > left:  # and nothing behind it: of two targets the larger gives every tensor at least as much
            break
        if more > 0:
            wanted[tensor.name] = type_name
            left -= more


def _steps(free: Sequence[Candidate], places: Mapping[str, TensorPlace]) -> Iterator[tuple[Candidate, str]]:
    """The ladder, tensor by tensor; within a step the outermost layers first, the last before the first."""

    def depth(tensor: Candidate) -> tuple[int, int, str]:
        place = places[tensor.name]
        return min(place.layer, place.n_layers - 1 - place.layer), -place.layer, tensor.name

    for rule in LADDER:
        chosen = (t for t in free if split_name(t.name)[1] in rule.kinds and rule.where(places[t.name]))
        for tensor in sorted(chosen, key=depth):
            yield tensor, rule.type
