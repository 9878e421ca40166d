"""One way to write bytes and one to read them, with the unit that was meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from m2lite.system.byte_units import format_bytes, format_speed, parse_bytes, parse_positive_bytes, parse_speed

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"), (1023, "1,023 B"), (1024, "1.00 KiB"), (6_460_000, "6.16 MiB"), (125 << 30, "125.0 GiB"),
        (132_790_586_368, "123.7 GiB"), ((1 << 20) - 1, "1.00 MiB"), (1000 << 20, "1,000 MiB"), (3 << 40, "3.00 TiB"),
        (17.3 * 2**20, "17.3 MiB"),
    ],
)  # fmt: skip
def test_sizes_are_powers_of_1024(n: float, text: str) -> None:
    assert format_bytes(n) == text


def test_speeds_are_powers_of_1000() -> None:
    found = [format_speed(n) for n in (0, 999, 1000, 850e6, 3.5e9, 26.04e9, 1.2e12)]
    assert found == ["0 B/s", "999 B/s", "1.00 kB/s", "850.0 MB/s", "3.50 GB/s", "26.0 GB/s", "1.20 TB/s"]


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("125g", 125 << 30), ("125 GiB", 125 << 30), ("1.5G", 3 << 29), ("4_096", 4096), ("1,024k", 1 << 20),
        ("2t", 2 << 40), ("0", 0), ("123.7g", 1237 * 2**30 // 10),
    ],
)  # fmt: skip
def test_sizes_are_read_as_they_are_written(text: str, n: int) -> None:
    assert parse_bytes(text) == n
    assert parse_bytes(format_bytes(n)) == pytest.approx(n, rel=5e-3)


@pytest.mark.parametrize("text", ["", "g", "-1", "1e9", "0x10", "12q", "²", "1.5", "3g/s", ".5g", "1.g"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 120g"):
        parse_bytes(text)
    with pytest.raises(ValueError, match="at least 1 byte"):
        parse_positive_bytes("0")


def test_speeds_are_read_in_powers_of_1000() -> None:
    assert [parse_speed(text) for text in ("3.5g", "800m", "3.50 GB/s", "1000")] == [3.5e9, 8e8, 3.5e9, 1000]
    for text in ("fast", "0", "3x", ""):
        with pytest.raises(ValueError, match="expected"):
            parse_speed(text)


def test_nobody_formats_bytes_by_hand() -> None:
    """A division by a power of 1000 or 1024 beside the name of a unit, outside of the one module."""
    by_hand = re.compile(r"/ ?(1e[369]|10 ?\*\* ?[369]|2 ?\*\* ?[123]0|1024|1 ?<< ?[123]0).*\b([kMGT]i?B)\b")
    for folder in ("m2lite", "quant"):
        for path in (ROOT / folder).glob("**/*.py"):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                assert not by_hand.search(line), f"{path}:{number}: {line.strip()}"
