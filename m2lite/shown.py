"""How text that a stranger wrote is shown to a person: it moves no cursor, forges no line. Knows no stream.

Names and values out of model files, requests, answers, tool results and paths all come through here.
"""

from __future__ import annotations

import re

# What a terminal may obey or what reorders a line: C0 without newline and tab, DEL, C1, and bidirectional controls.
_CONTROLS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421"}
# JSON may spell every character by its number: the value stays what it was.
_IN_JSON = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str) -> str:
    """`text` within one line: what does not print stands there as an escape, such as \\n, \\x1b or \\u202e."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def shown_lines(text: str) -> str:
    """Running text: line breaks and tabs stay, control characters become the pictures that Unicode has for them."""
    return _CONTROLS.sub(lambda match: _PICTURES.get(ord(match[0]), "\ufffd"), text)


def shown_json(text: str) -> str:
    """JSON with no control character in it, and the same value."""
    return _IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
