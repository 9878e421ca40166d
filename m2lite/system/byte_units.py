"""Bytes as people write and read them: sizes in powers of 1024, speeds in powers of 1000, each with its unit.

125g is 125 x 2**30 bytes wherever a size is asked for, and is shown as 125.0 GiB. Disks and memory are sold by GB/s,
so 3.5g of speed is 3.5 x 10**9 bytes a second, and is shown as 3.50 GB/s.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SIZES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SPEEDS = ("B/s", "kB/s", "MB/s", "GB/s", "TB/s")
_NUMBER = re.compile(r"\s*([0-9][0-9_,]*)(\.[0-9]+)?\s*([kmgtp]?)(?:i?b)?(/s)?\s*", re.IGNORECASE | re.ASCII)


def format_bytes(n_bytes: float) -> str:
    """A size in powers of 1024, three digits or more: 17.3 MiB, 125.0 GiB, 999 B."""
    return _format(n_bytes, 1024, _SIZES)


def format_speed(bytes_per_s: float) -> str:
    """Bytes a second in powers of 1000, three digits or more: 850.0 MB/s, 3.50 GB/s."""
    return _format(bytes_per_s, 1000, _SPEEDS)


def parse_bytes(text: str) -> int:
    """A size; k, m, g and t are powers of 1024, and a fraction is cut to whole bytes: 1.5g is 1,610,612,736."""
    return int(_parse(text, 1024, "a size such as 120g, or a number of bytes"))


def parse_positive_bytes(text: str) -> int:
    value = parse_bytes(text)
    if value < 1:
        raise ValueError("expected at least 1 byte")
    return value


def parse_speed(text: str) -> float:
    """Bytes a second; k, m and g are powers of 1000: 3.5g is 3.5e9."""
    value = float(_parse(text, 1000, "bytes a second, such as 800m or 3.5g (GB/s)", is_speed=True))
    if not value:
        raise ValueError("expected more than 0")
    return value


def _format(value: float, base: int, units: tuple[str, ...]) -> str:
    n = 0
    while value >= base - 0.5 and n + 1 < len(units):
        value, n = value / base, n + 1
    digits = 0 if not n or value >= 999.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f} {units[n]}"


def _parse(text: str, base: int, expected: str, *, is_speed: bool = False) -> Fraction:
    match = _NUMBER.fullmatch(text)
    if match is None or (match[4] and not is_speed) or (match[2] and not match[3]):
        raise ValueError(f"expected {expected}")
    unit: int = base ** " kmgtp".index(match[3].lower() or " ")
    return Fraction(re.sub("[_,]", "", match[1]) + (match[2] or "")) * unit
