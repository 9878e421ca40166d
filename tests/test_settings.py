"""The option table: parsers, sources and their order."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from m2lite.errors import UsageError
from m2lite.settings import (
    MODEL_OPTIONS,
    OPTIONS,
    ModelOptions,
    Settings,
    panel,
    parse_count,
    resolve_settings,
    with_defaults,
)

NOWHERE = Path("/nonexistent/config.toml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("4096", 4096), ("32k", 32768), ("32K", 32768), ("1_000", 1000), ("4,096", 4096), (" 16G ", 16 << 30),
     ("2m", 2 << 20), ("1KiB", 1024), ("1t", 1 << 40)],
)  # fmt: skip
def test_counts(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5k", "1e3", "0x10", "12q", "²"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(ValueError, match="whole number"):
        parse_count(text)


def test_order_of_sources(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('ctx = 1024\ntop_k = 7\ntemp = 0.25\nthink = "hide"\n')
    settings = resolve_settings({"ctx": "4k", "temp": None}, {"M2LITE_CTX": "2k", "M2LITE_TOP_K": "9"}, config)
    assert (settings.opening["ctx"], settings.top_k, settings.temp, settings.think) == (4096, 9, 0.25, "hide")
    assert settings.origins["ctx"] == "--ctx"
    assert settings.origins["top_k"] == "environment variable M2LITE_TOP_K"
    assert settings.origins["temp"] == f"key temp in {config}"
    assert settings.origins["top_p"] == "default"


def test_defaults() -> None:
    settings = resolve_settings({}, {}, NOWHERE)
    assert (settings.temp, settings.top_k, settings.top_p, settings.min_p) == (1.0, 40, 0.95, 0.0)
    assert settings.seed is None and settings.model is None
    assert set(settings.origins) == set(OPTIONS)


def test_an_empty_variable_is_none() -> None:
    assert resolve_settings({}, {"M2LITE_CTX": ""}, NOWHERE).opening["ctx"] is None


BAD_VALUES = [
    "ctx = true", "ctx = [1]", "ctx = 1.5", "think = 'perhaps'", "seed = -1", "ctx = 1979-05-27", "ctx = {a = 1}",
    "model = 3", "model = true", "model = ['a']", 'mtp = "a\\u0000b"', "ctx = '9999999t'", f"ram = '{'9' * 5000}'",
    f"seed = '{'9' * 5000}'", f"ctx = 0x{'f' * 9000}",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_VALUES, ids=lambda text: text[:20])
def test_bad_values_in_the_file(tmp_path: Path, text: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    with pytest.raises(UsageError, match=text.split()[0]):
        resolve_settings({}, {}, config)


BAD_FILES = [
    b"ctx = ", b"\xff\xfe", b"speed = 3", b"ctx = 1\nctx = 2", b'model = "\\ud800"', b"ctx = " + b"9" * 5000,
    b"ctx = " + b"[" * 100_000, b"#" * (2 << 20),
]  # fmt: skip


@pytest.mark.parametrize("content", BAD_FILES, ids=lambda content: str(content[:20]))
def test_bad_files(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "config.toml"
    config.write_bytes(content)
    with pytest.raises(UsageError, match=r"config\.toml"):
        resolve_settings({}, {}, config)
    with pytest.raises(UsageError, match="cannot be read"):
        resolve_settings({}, {}, tmp_path)


def test_a_row_is_a_keyword_of_open_and_an_option_of_each_command() -> None:
    """Whoever adds an option writes its row, and reads it where it is used."""
    settings = resolve_settings({"heat": "off", "threads": "2", "mtp": "a.gguf"}, {}, NOWHERE)
    assert set(settings.opening) == set(ModelOptions.__annotations__) == set(MODEL_OPTIONS)
    assert settings.opening == with_defaults({"heat": False, "threads": 2, "mtp": "a.gguf"})
    assert [settings[name] for name in ("heat", "temp")] == [False, 1.0]
    assert {field.name for field in fields(Settings)} == set(OPTIONS) - set(MODEL_OPTIONS) | {"opening", "origins"}
    assert {*panel("Engine", MODEL_OPTIONS), *panel("Drafts"), "template"} == set(MODEL_OPTIONS)
    assert settings.opened(kv="q8_0", heat=True).opening == {**settings.opening, "kv": "q8_0", "heat": True}
    with pytest.raises(TypeError, match="'contex' is no option of a model"):
        with_defaults({"contex": 9})  # type: ignore[typeddict-unknown-key]
    with pytest.raises(UsageError, match="'own' does not exist"):
        with_defaults({"template": "own"})
    with pytest.raises(UsageError, match="0 threads were asked for"):
        with_defaults({"threads": 0})


def test_defaults_are_of_the_type_that_is_parsed() -> None:
    for name, option in OPTIONS.items():
        if option.default is not None:
            assert option.parse(option.text(option.default)) == option.default, name


def test_names_are_spelled_alike() -> None:
    for name, option in OPTIONS.items():
        assert option.env == f"M2LITE_{name.upper()}"
        assert not option.flags or option.flags[0] == "--" + name.replace("_", "-")
