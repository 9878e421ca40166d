"""Lines of a batch's input, each a request with a name; all are checked before the first is answered. Knows no model.

A line is OpenAI's batch request, {"custom_id", "method", "url", "body"}, or shorter, a body alone with or without a
custom_id, where {"prompt": TEXT} stands for one question. Each line of a .txt file is a question. Names that are not
given are "line-N".
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from m2lite.dialogue.chat_request import FIELDS, ChatRequest, parse_request
from m2lite.errors import UsageError
from m2lite.system.inputs import TextInput
from m2lite.system.json_text import JsonError, parse_json

URL = "/v1/chat/completions"
_ENVELOPE = ("custom_id", "method", "url", "body")
_LONGEST = 64 << 20  # bytes of a line
_LONGEST_ID = 512  # characters


@dataclass(frozen=True)
class Line:
    """A line that is a request, or says why it is none."""

    number: int
    custom_id: str
    request: ChatRequest | None
    error: str | None = None

    @property
    def key(self) -> int:
        return line_key(self.custom_id)


@dataclass(frozen=True)
class Checked:
    n_lines: int
    sha256: str
    errors: list[str]  # the first of them, with line numbers
    n_errors: int


def line_key(custom_id: str) -> int:
    """128 bits that stand for a name: of a hundred thousand names, far less memory than the names."""
    return xxhash.xxh3_128_intdigest(custom_id.encode("utf-8", "surrogatepass"))


def line_stream(custom_id: str) -> int:
    """The stream of a line's random numbers: the same in any order, shard and restart."""
    return xxhash.xxh3_64_intdigest(b"m2lite batch\0" + custom_id.encode("utf-8", "surrogatepass"))


class Input:
    """Lines of a file, a pipe or stdin, which may be packed. What `check` has read is what all later readings give."""

    def __init__(self, source: str, defaults: ChatRequest) -> None:
        self._defaults, self.name = defaults, source
        self.is_text = source.removesuffix(".gz").removesuffix(".zst").endswith(".txt")
        self._text = TextInput(source)

    @property
    def n_grown(self) -> int:
        """Bytes that came behind what was checked, and are not read."""
        return self._text.n_grown

    def check(self, most_errors: int = 20) -> Checked:
        """Read all of it: bad lines, and names that come twice."""
        errors, n, n_errors, digest = list[str](), 0, 0, hashlib.sha256()
        for line in self._named(digest):
            n += 1
            if line.error is not None:
                n_errors += 1
                if len(errors) < most_errors:
                    errors.append(f"line {line.number}: {line.error}")
        return Checked(n, digest.hexdigest(), errors, n_errors)

    def __iter__(self) -> Iterator[Line]:
        return self._named()

    def _named(self, digest: Any = None) -> Iterator[Line]:
        """One after the other; a name that comes again is an error there, of a line with a name of its own."""
        seen = set[int]()
        for line in self._lines(digest):
            if line.key in seen:
                name = f"line-{line.number}"
                while line_key(name) in seen:
                    name += "-again"
                line = Line(line.number, name, None, line.error or f"custom_id {line.custom_id!r} was there before.")
            seen.add(line.key)
            yield line

    def _lines(self, digest: Any) -> Iterator[Line]:
        for number, raw in enumerate(self._text.lines(_LONGEST), 1):
            if digest is not None:
                digest.update(raw)
            if number == 1:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if len(raw) > _LONGEST:
                raise UsageError(f"{self.name}: line {number} has more than {_LONGEST:,} bytes.", "Split it.")
            if raw.strip():
                yield self._parse(raw.rstrip(b"\r\n"), number)

    def _parse(self, raw: bytes, number: int) -> Line:
        name = f"line-{number}"
        try:
            text = raw.decode()
            value: Any = {"prompt": text} if self.is_text else parse_json(text)
            name, body = _name_and_body(value, name)
            return Line(number, name, parse_request(body, self._defaults))
        except UnicodeDecodeError as error:
            return Line(number, name, None, f"no UTF-8: byte {error.start} is 0x{raw[error.start]:02x}.")
        except JsonError as error:
            return Line(number, name, None, f"no JSON ({error}).")
        except UsageError as error:
            return Line(number, name, None, str(error))


def _name_and_body(value: object, name: str) -> tuple[str, Mapping[str, Any]]:
    """The line's name, by default `name`, and its request's body. UsageError carries no name: it is in the text."""
    if not isinstance(value, Mapping):
        raise UsageError(f"it is a {type(value).__name__}, expected an object.")
    custom_id = value.get("custom_id", name)
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_ID:
        raise UsageError(f"custom_id is {custom_id!r}.", f"Use a string of 1 to {_LONGEST_ID} characters.")
    if "body" not in value:
        return custom_id, _question({key: item for key, item in value.items() if key != "custom_id"})
    unknown = next((key for key in value if key not in _ENVELOPE), None)
    if unknown is not None:
        raise UsageError(f"The field {unknown!r} is not supported beside body.", f"Known are {', '.join(_ENVELOPE)}.")
    if value.get("method", "POST") != "POST" or value.get("url", URL) != URL:
        raise UsageError(f"method and url are {value.get('method')!r}, {value.get('url')!r}.", f"Use POST and {URL}.")
    body = value["body"]
    if not isinstance(body, Mapping):
        raise UsageError(f"body is a {type(body).__name__}, expected an object.")
    return custom_id, body


def _question(body: dict[str, Any]) -> dict[str, Any]:
    """{"prompt": TEXT} as a message."""
    if "prompt" not in body:
        return body
    prompt = body.pop("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise UsageError(f"prompt is {prompt!r}.", "Use a text.")
    if "messages" in body:
        raise UsageError("prompt was given with messages.", "Leave one of them out.")
    return {"messages": [{"role": "user", "content": prompt}], **body}


assert not set(_ENVELOPE) & set(FIELDS)
