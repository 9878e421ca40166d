"""Texts that end an answer, as OpenAI's `stop`. Knows strings only."""

from __future__ import annotations

from collections.abc import Sequence

from m2lite.errors import UsageError

MOST = 16  # texts of one answer
_LONGEST = 1000  # characters


def check_stop_texts(texts: object) -> tuple[str, ...]:
    """One text or a list of them; UsageError for anything else."""
    found = [texts] if isinstance(texts, str) else texts
    if not isinstance(found, Sequence) or not all(isinstance(text, str) for text in found):
        raise UsageError("stop is neither a string nor a list of strings.", "Correct it.")
    if len(found) > MOST or any(not 0 < len(text) <= _LONGEST for text in found):
        raise UsageError(f"stop has {len(found)} texts.", f"Use up to {MOST} of 1 to {_LONGEST:,} characters each.")
    return tuple(found)


class StopTexts:
    """Lets text through up to the stop text that is whole first; what may be the beginning of one is held back."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(texts)
        self._held = ""
        self.found: str | None = None  # the text that ended it

    @property
    def is_found(self) -> bool:
        return self.found is not None

    def push(self, text: str) -> str:
        if not self._texts:
            return text
        if self.is_found:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._texts if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.found = min(found)
            self._held = ""
            return text[:at]
        n_held = max(_overlap(text, stop) for stop in self._texts)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def flush(self) -> str:
        """What was held back, when nothing follows."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
