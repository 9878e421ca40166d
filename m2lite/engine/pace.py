"""How many rows of prompts a step may have beside answers that are under way, so that nobody waits for long."""

from __future__ import annotations

STEP_S = 0.5  # that a step may take beside others, or twice what a token takes, if that is longer
_SHORT_S, _TOKENS = 0.1, 3  # but no more than so long, or so many tokens take, if that is longer
MOST_ROWS = 64  # of a prompt in such a step; more are computed with other steps between their layers
_FIRST_ROWS = 8  # until it is known what a row takes
_RATE = 0.25  # of what was seen last


class Pace:
    """Learnt from the steps of one model."""

    def __init__(self) -> None:
        self.decode_s = self.row_s = 0.0  # of a step without prompts, and of a row of a prompt; 0: not known

    def saw(self, n_decoding: int, n_prompt: int, seconds: float) -> None:
        """A step computed n_decoding tokens of answers and n_prompt rows of prompts."""
        if not n_prompt:
            self.decode_s += (_RATE if self.decode_s else 1.0) * (seconds - self.decode_s)
        elif n_prompt <= MOST_ROWS:
            seconds = max(0.0, seconds - self.decode_s * (n_decoding > 0)) / n_prompt
            self.row_s += (_RATE if self.row_s else 1.0) * (seconds - self.row_s)

    def rows(self, n_decoding: int) -> int:
        """Of prompts, in a step with n_decoding tokens of answers."""
        if not self.row_s:
            return _FIRST_ROWS
        seconds = max(STEP_S, 2 * self.decode_s)
        if n_decoding:
            seconds = min(seconds, max(_SHORT_S, _TOKENS * self.decode_s)) - self.decode_s
        return max(1, min(MOST_ROWS, int(seconds / self.row_s)))
