"""Which tensor gets which block format: one table per output type. Knows roles, not names or files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from m2lite.errors import BadModelError, UsageError
from m2lite.quant.names import Binding
from m2lite.storage.blocks import FORMATS, BlockFormat


@dataclass(frozen=True)
class Recipe:
    """An output type: format per role; roles that are not listed stay F32. `mtp` overrules in the sidecar."""

    name: str
    file_type: int  # llama.cpp's general.file_type
    formats: Mapping[str, str]
    mtp: Mapping[str, str]


MATRICES = ("embedding", "head", "attention", "experts", "mtp_projection")


def _uniform(name: str, file_type: int, block_format: str) -> Recipe:
    return Recipe(name, file_type, dict.fromkeys(MATRICES, block_format), {})


# Norms, router and selection bias are F32 in every recipe: they are not in any row.
RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _uniform("f32", 0, "F32"),
        _uniform("f16", 1, "F16"),
        _uniform("bf16", 32, "BF16"),
        _uniform("q8_0", 7, "Q8_0"),
        Recipe(
            "q4_0",
            2,
            {"embedding": "Q8_0", "head": "Q8_0", "attention": "Q4_0", "experts": "Q4_0"},
            # A draft head at 4 bits is hardly ever right (facts: 0-4 % acceptance against 39-59 % at 8 bits).
            {"attention": "Q8_0", "mtp_projection": "Q8_0"},
        ),
    )
}


def find_recipe(name: str) -> Recipe:
    recipe = RECIPES.get(name.lower())
    if recipe is None:
        raise UsageError(f"{name!r} is not an output type.", f"Take one of {', '.join(RECIPES)}.")
    return recipe


def choose_format(recipe: Recipe, binding: Binding) -> BlockFormat:
    """The format of one tensor; a width that is not whole blocks is an error, never a silent other type."""
    table = {**recipe.formats, **recipe.mtp} if binding.mtp else recipe.formats
    chosen = FORMATS[table.get(binding.role, "F32")]
    if binding.shape[-1] % chosen.n_weights:
        raise BadModelError(
            f"Tensor {binding.name!r} has rows of {binding.shape[-1]} weights, which are not whole {chosen.name} blocks"
            f" of {chosen.n_weights}.",
            "Convert with --type f16 or f32.",
        )
    return chosen
