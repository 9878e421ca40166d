"""The options: a row has name, type, flags, parser, default, help and panel. Knows no command.

A row is all that an option takes; one of `ModelOptions` is a keyword of `Model.open`, too. A value comes from the flag,
else the environment (M2LITE_<NAME>), else the user's config.toml, else the default; `Settings.origins` says which.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict, Unpack, cast, get_type_hints

from m2lite.errors import UsageError
from m2lite.system.byte_units import parse_bytes, parse_positive_bytes
from m2lite.system.paths import user_dir

_MOST_DIGITS = 19  # of a count
_MOST_BYTES = 1 << 20  # of config.toml
_ENGINE, _DRAFTS, _SAMPLING, _THINKING = "Engine", "Drafts", "Sampling", "Thinking"  # panels of the help
_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


@dataclass(frozen=True)
class Option:
    """One row of the table.

    Its name is the config key, in capitals after M2LITE_ the environment variable, and with dashes the flag.
    """

    metavar: str
    parse: Callable[[str], Any]
    default: Any
    help: str
    panel: str | None = None  # of the help
    short: tuple[str, ...] = ()  # flag
    is_argument: bool = False  # has no flag
    name: str = ""  # the field's

    @property
    def env(self) -> str:
        return "M2LITE_" + self.name.upper()

    @property
    def flags(self) -> tuple[str, ...]:
        return () if self.is_argument else ("--" + self.name.replace("_", "-"), *self.short)

    def text(self, value: Any) -> str:
        """A value as one would type it."""
        return ("off", "on")[value] if isinstance(value, bool) else str(value)


def parse_count(text: str) -> int:
    """A whole number, with k, m, g or t for powers of 1024: 32k is 32,768."""
    match = re.fullmatch(r"\s*([0-9][0-9_,]{0,30})\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError("expected a whole number such as 4096 or 32k")
    digits = re.sub("[_,]", "", match[1]).lstrip("0") or "0"
    if len(digits) > _MOST_DIGITS or (value := int(digits) * _UNITS[match[2].lower()]) >= 1 << 63:
        raise ValueError("expected a number below 2**63")
    return value


def parse_positive(text: str) -> int:
    value = parse_count(text)
    if value < 1:
        raise ValueError("expected at least 1")
    return value


def parse_number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise ValueError(f"expected a number from {low:g} to {high:g}")
        return value

    return parse


def parse_switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise ValueError("expected on or off")
    return text == "on"


def choice(words: str, help: str, panel: str | None = None) -> Option:
    """The row of an option that is one of `a|b|c`, by default the first."""
    choices = words.split("|")

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError("expected " + " or ".join(choices))
        return text

    return Option(words, parse, choices[0], help, panel)


def parse_seed(text: str) -> int:
    if not re.fullmatch(r"0*[0-9]{1,20}", text) or int(text.lstrip("0") or "0") >= 2**64:
        raise ValueError("expected a whole number from 0 to 2**64 - 1")
    return int(text)


class ModelOptions(TypedDict, total=False):
    """How a model is opened: the keywords of `Model.open`, and options of every command that opens one."""

    threads: Annotated[
        int | None, Option("N", parse_positive, None, "Threads [default: one per core]", _ENGINE, ("-t",))
    ]
    ctx: Annotated[
        int | None, Option("N", parse_positive, None, "Context in tokens, e.g. 32k [default: what fits]", _ENGINE)
    ]
    kv: Annotated[str, choice("f16|q8_0", "Type of the KV cache; q8_0 is half", _ENGINE)]
    load: Annotated[str, choice("auto|mmap|direct", "Where weights lie", _ENGINE)]
    amx: Annotated[
        bool, Option("on|off", parse_switch, True, "Use matrix instructions of the processor, if it has them", _ENGINE)
    ]
    ram: Annotated[
        int | None,
        Option("SIZE", parse_positive_bytes, None, "Memory to use, e.g. 12g (GiB) [default: all free]", _ENGINE),
    ]
    tuning: Annotated[bool, Option("on|off", parse_switch, True, "Use what `m2lite tune` found here", _ENGINE)]
    heat: Annotated[bool, Option("on|off", parse_switch, True, "Remember what a streamed model uses", _ENGINE)]
    draft: Annotated[
        str,
        choice(
            "auto|mtp|ngram|off",
            "Tokens drafted for the model to verify: by prediction modules, by prompt lookup, or by what pays",
            _DRAFTS,
        ),
    ]
    draft_tokens: Annotated[
        int | None, Option("K", parse_positive, None, "Most drafts a step [default: what pays]", _DRAFTS)
    ]
    mtp: Annotated[
        str | os.PathLike[str] | None,
        Option("FILE", str, None, "Prediction modules [default: mtp-MODEL.gguf beside the model]", _DRAFTS),
    ]
    template: Annotated[str, choice("file|builtin", "Chat template")]


@dataclass(frozen=True)
class Settings:
    """The value of every option, and where each came from."""

    model: Annotated[
        str | None,
        Option("MODEL", str, None, "GGUF file, first part of a split, or directory with one model", is_argument=True),
    ]
    opening: ModelOptions  # all of them
    kv_disk: Annotated[
        int | None, Option("SIZE", parse_bytes, None, "Disk for computed prompts, 0: none [default: 16g]", _ENGINE)
    ]
    temp: Annotated[float, Option("X", parse_number(0, 100), 1.0, "Temperature; 0 is greedy", _SAMPLING)]
    top_k: Annotated[int, Option("N", parse_count, 40, "Keep the N most likely tokens; 0 is off", _SAMPLING)]
    top_p: Annotated[
        float, Option("X", parse_number(0, 1), 0.95, "Keep the likeliest up to this probability", _SAMPLING)
    ]
    min_p: Annotated[float, Option("X", parse_number(0, 1), 0.0, "Drop tokens below X times the likeliest", _SAMPLING)]
    presence_penalty: Annotated[float, Option("X", parse_number(-2, 2), 0.0, "Against what was said once", _SAMPLING)]
    frequency_penalty: Annotated[float, Option("X", parse_number(-2, 2), 0.0, "Against what was said often", _SAMPLING)]
    seed: Annotated[int | None, Option("N", parse_seed, None, "Random seed [default: drawn and printed]", _SAMPLING)]
    max_tokens: Annotated[
        int | None, Option("N", parse_positive, None, "Stop an answer after N tokens", _SAMPLING, ("-n",))
    ]
    think: Annotated[str, choice("show|hide|off", "The model's thinking: shown, folded, or none", _THINKING)]
    think_budget: Annotated[int | None, Option("N", parse_count, None, "Close the thinking after N tokens", _THINKING)]
    origins: Mapping[str, str]

    def opened(self, **options: Unpack[ModelOptions]) -> Settings:
        """The same with other options of the model."""
        return replace(self, opening=cast(ModelOptions, {**self.opening, **options}))

    def __getitem__(self, name: str) -> Any:
        return self.opening[name] if name in self.opening else getattr(self, name)  # type: ignore[literal-required]


def _rows(table: type) -> dict[str, Option]:
    """The rows of a class whose fields are options, by their names."""
    hints = get_type_hints(table, include_extras=True).items()
    return {name: replace(row, name=name) for name, hint in hints for row in getattr(hint, "__metadata__", ())}


MODEL_OPTIONS = _rows(ModelOptions)
_OTHERS = _rows(Settings)
OPTIONS = {"model": _OTHERS["model"], **MODEL_OPTIONS, **_OTHERS}


def panel(title: str, table: Mapping[str, Option] = OPTIONS) -> tuple[str, ...]:
    return tuple(name for name, option in table.items() if option.panel == title)


def with_defaults(options: ModelOptions) -> ModelOptions:
    """All of them. TypeError for a name that is none, as for a keyword of a function; UsageError for some values.

    The others are checked where the model is known.
    """
    unknown = sorted(set(options) - set(MODEL_OPTIONS))
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no option of a model; known are {', '.join(MODEL_OPTIONS)}")
    defaults = {name: option.default for name, option in MODEL_OPTIONS.items()}
    whole = cast(ModelOptions, {**defaults, **options})
    if whole["threads"] is not None and whole["threads"] < 1:
        raise UsageError(f"{whole['threads']} threads were asked for.", "Use 1 or more.")
    if whole["template"] not in ("file", "builtin"):
        raise UsageError(f"Template {whole['template']!r} does not exist.", "Use file or builtin.")
    return whole


def config_path() -> Path:
    """Where the user's settings live; the file need not exist."""
    return user_dir("config") / "config.toml"


def load_config(path: Path) -> dict[str, Any]:
    """The keys of config.toml; {} when there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
        config = tomllib.loads(data.decode("utf-8-sig"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}.", "Correct it or move it away.") from error
    unknown = sorted(set(config) - set(OPTIONS))
    if unknown:
        raise UsageError(f"{path} has the unknown key {unknown[0]!r}.", f"Known keys: {', '.join(OPTIONS)}.")
    for name, value in config.items():
        is_text = OPTIONS[name].parse is str
        is_huge = isinstance(value, int) and abs(value) >= 1 << 64  # Python may refuse to print it
        if is_huge or not isinstance(value, str if is_text else str | int | float) or "\0" in str(value):
            what, value = "a text" if is_text else "a text or a number", "a huge number" if is_huge else value
            raise UsageError(
                f"key {name} in {path} is {str(value)[:80]!r}, expected {what}.", "Correct it or leave it out."
            )
    return config


def resolve_settings(
    flags: Mapping[str, str | None],
    environ: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> Settings:
    """Settings from `flags` (option name -> text as typed), the environment and the config file."""
    environ = os.environ if environ is None else environ
    path = config_path() if path is None else path
    config = load_config(path)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in OPTIONS.values():
        spelled = option.flags[0] if option.flags else option.metavar
        sources = [
            (flags.get(option.name), spelled),
            (environ.get(option.env) or None, f"environment variable {option.env}"),
            (config.get(option.name), f"key {option.name} in {path}"),
        ]
        value, origin = next(((v, o) for v, o in sources if v is not None), (None, "default"))
        try:
            values[option.name] = option.default if value is None else option.parse(str(value))
        except ValueError as error:
            raise UsageError(f"{origin} is {str(value)!r}: {error}.", "Correct it or leave it out.") from error
        origins[option.name] = origin
    opening = cast(ModelOptions, {name: values.pop(name) for name in MODEL_OPTIONS})
    return Settings(**values, opening=opening, origins=origins)
