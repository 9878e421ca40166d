"""The rubric for replies to heldout_prompts.json: pure functions of text, no model.

A reply is the text as decoded, from inside the thinking on, without the end token. Three judgements:

* ended: the model wrote the end token within 200 tokens, thinking included.
* repeats: some run of six words (case and punctuation aside) occurs three times or more in the reply.
* on_topic: the answer, that is the text after the first "</think>", is not empty, satisfies every group of `all` (one regular
  expression of the group is enough, case-insensitive), matches none of `none`, and has at least `min_words` words if given
  (40 for stories). No "</think>", no answer. A wrong sum, a wrong capital or a story without its subject is off topic; sums are
  judged by the last number in the answer.

The targets over 40 prompts x seeds 1, 2, 3, unselected: at least 95 % ended, at most 5 % repeats, at least 60 % on topic.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 200
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Verdict:
    """What the rubric says of one reply."""

    ended: bool
    repeats: bool
    on_topic: bool


def split_reply(reply: str) -> tuple[str, str]:
    """Thinking and answer; the answer is empty if the thinking was never closed."""
    thinking, closed, answer = reply.partition("</think>")
    return thinking.strip(), answer.strip() if closed else ""


def has_repeats(reply: str, n: int = 6, times: int = 3) -> bool:
    """Whether any n-gram of words occurs at least `times` times."""
    words = re.findall(r"[a-z0-9']+", reply.lower())
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return bool(counts) and max(counts.values()) >= times


def is_on_topic(prompt: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer meets the criteria of its prompt."""
    if not answer or len(answer.split()) < prompt.get("min_words", 1):
        return False

    def found(pattern: str) -> bool:
        return re.search(pattern, answer, re.IGNORECASE | re.DOTALL) is not None

    return all(any(map(found, group)) for group in prompt["all"]) and not any(map(found, prompt["none"]))


def judge(prompt: Mapping[str, Any], reply: str, ended: bool) -> Verdict:
    """The verdict on one reply to one entry of heldout_prompts.json."""
    return Verdict(ended, has_repeats(reply), is_on_topic(prompt, split_reply(reply)[1]))


def shares(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """The share of replies that ended, repeat, and are on topic."""
    rows = list(verdicts)
    return {k: sum(getattr(v, k) for v in rows) / len(rows) for k in ("ended", "repeats", "on_topic")}
