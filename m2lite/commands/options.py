"""Options that `chat`, `generate` and `batch` share: how to draw, how long to think, what JSON to keep to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from m2lite.errors import UsageError
from m2lite.settings import Settings
from m2lite.system.inputs import read_input
from m2lite.system.streams import note

if TYPE_CHECKING:
    from m2lite.sampling.draw import Sampling
    from m2lite.sampling.json_schema import Schema


MOST_BYTES = 64 << 20  # of a schema or a request: as of a batch's line

StopOption = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends an answer")]
SchemaOption = Annotated[
    str | None, typer.Option("--json-schema", metavar="FILE", help="Answers are JSON of this schema")
]


def make_sampling(settings: Settings, default_seed: int | None = None) -> Sampling:
    """The sampling options; without a seed, and none by default, one is drawn. `say_seed` when it is used."""
    from m2lite.sampling.draw import Sampling, new_seed

    seed = default_seed if settings.seed is None else settings.seed
    if seed is None:
        seed = new_seed()
    return Sampling(
        settings.temp, settings.top_k, settings.top_p, settings.min_p, seed,
        settings.presence_penalty, settings.frequency_penalty,
    )  # fmt: skip


def say_seed(sampling: Sampling, settings: Settings) -> None:
    """The seed that an answer can be had again with, unless the user gave it or nothing is drawn."""
    if sampling.temperature > 0 and sampling.seed != settings.seed:
        note(f"seed {sampling.seed}")


def think_tokens(settings: Settings) -> int | None:
    """How long the model may think."""
    return 0 if settings.think == "off" else settings.think_budget


def read_schema(source: str) -> Schema:
    """The JSON schema in a file, checked: before anything is loaded."""
    from m2lite.sampling.json_schema import load_schema

    try:
        return load_schema(read_input(source, MOST_BYTES), source)
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}.") from None
