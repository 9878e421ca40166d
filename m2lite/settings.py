"""The options: one table with flag, environment variable, config key, default and parser. Knows no command.

A value comes from the flag, else the environment (M2LITE_<NAME>), else the user's config.toml, else the default;
`Settings.origins` says which.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from m2lite.errors import UsageError
from m2lite.system.byte_units import parse_bytes, parse_positive_bytes
from m2lite.system.paths import user_dir

_MOST_DIGITS = 19  # of a count
_MOST_BYTES = 1 << 20  # of config.toml
_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}


@dataclass(frozen=True)
class Option:
    """One row of the table; `name` is the config key and, in capitals after M2LITE_, the environment variable."""

    name: str
    flags: tuple[str, ...]
    metavar: str
    parse: Callable[[str], Any]
    default: Any
    help: str

    @property
    def env(self) -> str:
        return "M2LITE_" + self.name.upper()


@dataclass(frozen=True)
class Settings:
    """The value of every option, and where each came from."""

    model: str | None
    threads: int | None
    ctx: int | None
    kv: str
    load: str
    ram: int | None
    heat: str
    kv_disk: int | None
    draft: str
    draft_tokens: int | None
    mtp: str | None
    temp: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    max_tokens: int | None
    think: str
    think_budget: int | None
    template: str
    origins: Mapping[str, str]


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


def parse_choice(*choices: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError("expected " + " or ".join(choices))
        return text

    return parse


def parse_seed(text: str) -> int:
    if not re.fullmatch(r"0*[0-9]{1,20}", text) or int(text.lstrip("0") or "0") >= 2**64:
        raise ValueError("expected a whole number from 0 to 2**64 - 1")
    return int(text)


OPTIONS: dict[str, Option] = {
    option.name: option
    for option in [
        Option("model", (), "MODEL", str, None, "GGUF file, first part of a split, or directory with one model"),
        Option("threads", ("--threads", "-t"), "N", parse_positive, None, "Threads [default: one per core]"),
        Option("ctx", ("--ctx",), "N", parse_positive, None, "Context in tokens, e.g. 32k [default: what fits]"),
        Option("kv", ("--kv",), "f16|q8_0", parse_choice("f16", "q8_0"), "f16", "Type of the KV cache; q8_0 is half"),
        Option(
            "load", ("--load",), "auto|mmap|direct", parse_choice("auto", "mmap", "direct"), "auto", "Where weights lie"
        ),
        Option(
            "ram",
            ("--ram",),
            "SIZE",
            parse_positive_bytes,
            None,
            "Memory to use, e.g. 12g (GiB) [default: all free]",
        ),
        Option("heat", ("--heat",), "on|off", parse_choice("on", "off"), "on", "Remember what a streamed model uses"),
        Option("kv_disk", ("--kv-disk",), "SIZE", parse_bytes, None, "Disk for rows of chats, 0: none [default: 16g]"),
        Option(
            "draft",
            ("--draft",),
            "auto|mtp|ngram|off",
            parse_choice("auto", "mtp", "ngram", "off"),
            "auto",
            "Tokens drafted for the model to verify: by prediction modules, by prompt lookup, or by what pays",
        ),
        Option(
            "draft_tokens", ("--draft-tokens",), "K", parse_positive, None, "Most drafts a step [default: what pays]"
        ),
        Option("mtp", ("--mtp",), "FILE", str, None, "Prediction modules [default: mtp-MODEL.gguf beside the model]"),
        Option("temp", ("--temp",), "X", parse_number(0, 100), 1.0, "Temperature; 0 is greedy"),
        Option("top_k", ("--top-k",), "N", parse_count, 40, "Keep the N most likely tokens; 0 is off"),
        Option("top_p", ("--top-p",), "X", parse_number(0, 1), 0.95, "Keep the likeliest up to this probability"),
        Option("min_p", ("--min-p",), "X", parse_number(0, 1), 0.0, "Drop tokens below X times the likeliest"),
        Option(
            "presence_penalty", ("--presence-penalty",), "X", parse_number(-2, 2), 0.0, "Against what was said once"
        ),
        Option(
            "frequency_penalty", ("--frequency-penalty",), "X", parse_number(-2, 2), 0.0, "Against what was said often"
        ),
        Option("seed", ("--seed",), "N", parse_seed, None, "Random seed [default: drawn and printed]"),
        Option("max_tokens", ("--max-tokens", "-n"), "N", parse_positive, None, "Stop an answer after N tokens"),
        Option(
            "think",
            ("--think",),
            "show|hide|off",
            parse_choice("show", "hide", "off"),
            "show",
            "The model's thinking: shown, folded, or none",
        ),
        Option("think_budget", ("--think-budget",), "N", parse_count, None, "Close the thinking after N tokens"),
        Option("template", ("--template",), "file|builtin", parse_choice("file", "builtin"), "file", "Chat template"),
    ]
}


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
        values[option.name] = option.default if value is None else _parse(option, str(value), origin)
        origins[option.name] = origin
    return Settings(**values, origins=origins)


def _parse(option: Option, text: str, origin: str) -> Any:
    try:
        return option.parse(text)
    except ValueError as error:
        raise UsageError(f"{origin} is {text!r}: {error}.", "Correct it or leave it out.") from error


assert set(OPTIONS) == {f.name for f in fields(Settings)} - {"origins"}
