"""Options that `chat`, `generate` and `batch` share: how to draw, how long to think, what JSON to keep to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from m2lite.errors import UsageError
from m2lite.settings import Settings
from m2lite.system.inputs import read_input
from m2lite.system.streams import note

if TYPE_CHECKING:
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.sampling.draw import Sampling


MOST_BYTES = 64 << 20  # of a schema or a request: as of a batch's line

StopOption = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends an answer")]
SchemaOption = Annotated[
    str | None, typer.Option("--json-schema", metavar="FILE", help="Answers are JSON of this schema")
]


def answer_defaults(
    settings: Settings, stop_text: list[str] | None, json_schema: str | None, default_seed: int | None = None
) -> ChatRequest:
    """How to answer where a request does not say, checked before anything is loaded.

    Without a seed, and none by default, one is drawn: `say_seed` when it is used.
    """
    from m2lite.dialogue.chat_request import ChatRequest
    from m2lite.sampling.draw import Sampling, new_seed
    from m2lite.sampling.json_schema import load_schema
    from m2lite.text.stop_text import check_stop_texts

    schema = None if json_schema is None else load_schema(read_given(json_schema), json_schema)
    stop_texts = check_stop_texts(stop_text or [])
    seed = default_seed if settings.seed is None else settings.seed
    sampling = Sampling(
        settings.temp, settings.top_k, settings.top_p, settings.min_p, new_seed() if seed is None else seed,
        settings.presence_penalty, settings.frequency_penalty,
    )  # fmt: skip
    think_tokens = 0 if settings.think == "off" else settings.think_budget
    return ChatRequest([], sampling, None, settings.max_tokens, think_tokens, stop_texts, schema)


def say_seed(sampling: Sampling, settings: Settings) -> None:
    """The seed that an answer can be had again with, unless the user gave it or nothing is drawn."""
    if sampling.temperature > 0 and sampling.seed != settings.seed:
        note(f"seed {sampling.seed}")


def read_given(source: str) -> bytes:
    """A schema or a request that an option names; - is stdin."""
    try:
        return read_input(source, MOST_BYTES)
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}.") from None
