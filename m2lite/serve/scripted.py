"""For tests: what is said to a prompt is read from a file. All else is the real thing: the forward pass, the cache, the
rules of an answer, its parsing. Knows ids and texts, no messages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile

from m2lite.errors import UsageError
from m2lite.system.inputs import read_input
from m2lite.system.json_text import parse_json
from m2lite.text.tokenizer import Tokenizer

_TURN = "]~b]"  # in M2's template, before each turn's role
_MOST_BYTES = 16 << 20


def read_script(name: str, tokenizer: Tokenizer) -> Callable[[Sequence[int]], Sequence[int] | None]:
    """The file's rules, [{"match": [TEXT, ...], "text": TEXT}, ...], as what is said to a prompt's ids.

    The first rule counts whose texts all stand in the turns behind the last answer, or in the system's turn where there
    is no answer yet. Where none does, the model says what it draws.
    """
    try:
        rules = [
            (rule["match"], tokenizer.encode(rule["text"], control=True))
            for rule in parse_json(read_input(name, _MOST_BYTES))
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{name} is no script ({error}).", "Give a list of match and text.") from None

    def script(prompt: Sequence[int]) -> Sequence[int] | None:
        turns = tokenizer.decode(prompt).split(_TURN)[:-1]  # the last is the answer's own
        asked = "".join(takewhile(lambda turn: not turn.startswith("ai\n"), reversed(turns)))
        return next((ids for texts, ids in rules if all(text in asked for text in texts)), None)

    return script
