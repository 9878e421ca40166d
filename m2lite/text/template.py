"""The chat template of a model file: messages to text, and to token ids with inert content. Knows no weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

from m2lite.errors import BadModelError, UsageError
from m2lite.text import m2_template
from m2lite.text.jinja import CONTEXT_LIMIT_BYTES, InChild, InProcess, RenderError
from m2lite.text.messages import Message, Tool, check_messages, check_tools, to_json
from m2lite.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from m2lite.storage.gguf_reader import GGUFFile


KEY: Final = "tokenizer.chat_template"
# Templates that were read by a person and need no child process: MiniMax-M2's own and the built-in one.
_KNOWN_SHA256: Final = frozenset(
    {
        "967ff7e387676f4b4340585da0585416532f1e6c5ee3f1ede64b2c21ef7ea001",
        hashlib.sha256(m2_template.SOURCE.encode()).hexdigest(),
    }
)
_M2_MARKS: Final = ("]~!b[", "]~b]", "[e~[")
_PROBE: Final = "Good morning"


class Template:
    """One chat template. `warning` says why it is not the file's own, if it ought to be, or not always the same."""

    def __init__(self, source: str, origin: Literal["file", "builtin"], warning: str | None = None) -> None:
        self.source = source
        self.origin = origin
        self.warning = warning
        self.sha256 = hashlib.sha256(source.encode()).hexdigest()
        self._engine = InProcess(source) if self.sha256 in _KNOWN_SHA256 else InChild(source)

    @cached_property
    def date(self) -> str | None:
        """What a prompt says of the time: a hash of one, where the template reads the clock."""
        if "strftime_now" not in self.source:
            return None
        return hashlib.sha256(self.render([{"role": "user", "content": _PROBE}], None).encode()).hexdigest()[:16]

    def render(
        self, messages: list[Message], tools: list[Tool] | None, add_generation_prompt: bool = True, **values: Any
    ) -> str:
        """Canonical messages and tools as text. BadModelError if the template fails, UsageError where it refuses."""
        no_tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "")
        chat = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        context = to_json(no_tokens | values | chat)
        if len(context) > CONTEXT_LIMIT_BYTES:
            raise UsageError(
                f"The messages have {len(context)} characters, limit {CONTEXT_LIMIT_BYTES}.", "Send less text."
            )
        try:
            return self._engine.render(context)
        except RenderError as error:
            if error.raised:
                raise UsageError(f"The chat template refuses these messages: {error}.") from None
            raise BadModelError(
                f"The chat template ({self.origin}, sha256 {self.sha256[:12]}) failed: {error}.",
                "Use --template builtin.",
            ) from None


def load_template(gguf: GGUFFile, builtin: bool = False) -> Template:
    """The file's template if it has one that works, otherwise (or if asked for) the built-in one, with a warning."""
    if builtin:
        return Template(m2_template.SOURCE, "builtin")
    source = gguf.metadata.get(KEY)
    if source is None:
        return _builtin("The model file has no chat template")
    if not isinstance(source, str):
        raise BadModelError(
            f"{gguf.path}: key '{KEY}' is a {type(source).__name__}, expected a string.", "Convert the model again."
        )
    try:
        template = Template(source, "file")
        text = template.render([{"role": "user", "content": _PROBE}], None)
    except (BadModelError, RenderError, UsageError) as error:
        what = error.what if isinstance(error, BadModelError | UsageError) else f"it failed: {error}."
        return _builtin(f"The model file's chat template cannot be used ({what.rstrip('.')})")
    if _PROBE not in text:
        return _builtin("The model file's chat template leaves out what the user says")
    if "strftime_now" in source:
        template.warning = (
            "The model file's chat template reads the clock: the same question gives another prompt on another day. "
            "SOURCE_DATE_EPOCH sets the time."
        )
    return template


def _builtin(why: str) -> Template:
    return Template(m2_template.SOURCE, "builtin", f"{why}; the built-in MiniMax-M2 template is used.")


def encode_chat(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The ids of a conversation. Added tokens come from the template alone, whatever the messages and tools hold."""
    if template.origin == "builtin":
        missing = [mark for mark in _M2_MARKS if mark not in tokenizer.control_strings]
        if missing:
            raise BadModelError(
                f"The built-in chat template needs the token {missing[0]!r}, which the vocabulary lacks.",
                "Use a MiniMax-M2 model, or feed the text as it is with --no-template.",
            )
    checked, checked_tools = check_messages(messages), check_tools(tools)
    written = to_json({"messages": checked, "tools": checked_tools})
    guard = _Guard(tokenizer.control_strings, written, template.source)
    tokens = {"bos_token": tokenizer.token_text(tokenizer.bos_id), "eos_token": tokenizer.token_text(tokenizer.eos_id)}
    text = template.render(
        [guard.message(message) for message in checked],
        [guard.message(tool) for tool in checked_tools] if checked_tools else None,
        add_generation_prompt,
        **tokens,
    )
    ids: list[int] = []
    for part in tokenizer.split_control(text):
        ids += [part] if isinstance(part, int) else tokenizer.encode(guard.remove(part))
    return _one_bos(tokenizer, ids)


def _one_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Templates write the begin-of-text token themselves, and files say add_bos besides."""
    begin = {tokenizer.bos_id, tokenizer.control_strings.get(_M2_MARKS[0])} - {None}
    if not ids or ids[0] not in begin:
        return [tokenizer.bos_id, *ids] if tokenizer.add_bos and tokenizer.bos_id is not None else ids
    n_begin = next((n for n, index in enumerate(ids) if index != ids[0]), len(ids))
    return ids[n_begin - 1 :]


class _Guard:
    """Keeps content apart from the template's own control strings while both are one text.

    Every place of the content where a control string begins gets a mark, a character found nowhere in the input, and
    so does an edge of the content that could complete one together with the template's text. Rendering then cannot
    confuse the two, and the mark is removed again from the text between the control strings.
    """

    def __init__(self, control_strings: Iterable[str], *inputs: str) -> None:
        controls = sorted(control_strings, key=len, reverse=True)
        self.mark = _unused_character((*controls, *inputs))
        self._begin = re.compile(f"(?=(?:{'|'.join(map(re.escape, controls))}))(.)" if controls else "(?!)", re.DOTALL)
        self._heads = tuple({control[:n] for control in controls for n in range(1, len(control))})
        self._tails = tuple({control[n:] for control in controls for n in range(1, len(control))})
        self._insides = "\0".join(controls)

    def text(self, text: str) -> str:
        marked = self._begin.sub(rf"\1{self.mark}", text)
        inside = bool(text) and text in self._insides
        before = self.mark if inside or text.startswith(self._tails) else ""
        after = self.mark if inside or text.endswith(self._heads) else ""
        return f"{before}{marked}{after}"

    def value(self, value: Any) -> Any:
        """All strings inside a JSON value, names included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self._name(name): self._item(name, item) for name, item in value.items()}
        return [self.value(item) for item in value] if isinstance(value, list | tuple) else value

    def message(self, value: Mapping[str, Any]) -> dict[str, Any]:
        """A message or a tool in canonical form: as `value`, but for the role, which was checked."""
        return {name: item if name == "role" else self._item(name, item) for name, item in value.items()}

    def remove(self, text: str) -> str:
        return text.replace(self.mark, "").replace(f"\\u{ord(self.mark):04x}", "")

    def _item(self, name: str, item: Any) -> Any:
        """Templates compare the type of a part or a call."""
        return item if name == "type" and item in ("text", "function") else self.value(item)

    def _name(self, name: Any) -> Any:
        """Templates look plain names up, and write them between quotes."""
        return name if not isinstance(name, str) or re.fullmatch(r"\w+", name) else self.text(name)


def _unused_character(texts: Iterable[str]) -> str:
    """A private-use character that no text holds, neither itself nor its hexadecimal number (a JSON escape)."""
    whole = "\0".join(texts)
    for code in range(0xE000, 0xF900):
        if chr(code) not in whole and f"{code:04x}" not in whole:
            return chr(code)
    raise UsageError("The messages use every private-use character of Unicode.", "Remove some.")
