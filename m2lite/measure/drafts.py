"""How many of the prediction modules' drafts the model accepts, in real draft-and-verify answers. Prints nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from m2lite.model.cache import KVPool, Timeline
from m2lite.model.forward import Buffers, forward
from m2lite.model.mtp import Mtp, run_module, trunk_state

F32 = npt.NDArray[np.float32]


@dataclass
class Acceptance:
    """Drafts by position: how often draft j was proposed behind right drafts only, and how often it was right."""

    proposed: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    n_steps: int = 0
    n_tokens: int = 0

    @property
    def rates(self) -> list[float]:
        """Share of accepted drafts per position, of those whose predecessors were accepted."""
        return [a / p if p else 0.0 for a, p in zip(self.accepted, self.proposed, strict=True)]

    @property
    def tokens_per_step(self) -> float:
        return self.n_tokens / self.n_steps if self.n_steps else 0.0


class GreedyDrafting:
    """One greedy answer by draft and verify: every step drafts with all modules, the model has the last word.

    `states[k][p]` is g_k of position p for all positions that are settled; the modules are replayed on every settled
    token, so that their KV is what training saw.
    """

    def __init__(self, mtp: Mtp, pool: KVPool, buffers: Buffers) -> None:
        self.mtp, self.pool, self.buffers = mtp, pool, buffers
        self.timeline: Timeline = pool.timeline()
        width = mtp.trunk.config.n_embd
        # Row 0 stands for position -1, whose state is zero.
        self.states = [np.zeros((1, width), np.float32) for _ in range(len(mtp.modules) + 1)]

    def settle(self, tokens: Sequence[int]) -> list[int]:
        """Append tokens to the model's timeline; the greedy choice after each. Rewind before settling other tokens."""
        rows = self.pool.rows([(self.timeline, np.asarray(tokens))])
        logits = forward(self.mtp.trunk, self.pool, self.buffers, rows, outputs="all")
        choices: list[int] = logits.argmax(axis=-1).tolist()
        self.states[0] = np.concatenate([self.states[0], trunk_state(self.mtp, self.buffers, len(tokens))])
        return choices

    def rewind(self, length: int) -> None:
        self.timeline.rewind(length)
        self.states = [s[: length + 1] for s in self.states]

    def replay(self, tokens: Sequence[int], start: int) -> None:
        """Run every module over settled tokens from position `start` on."""
        for k in range(len(self.mtp.modules)):
            rows = self.pool.rows_at(self.timeline, start, np.asarray(tokens))
            previous = self.states[k][start : start + len(tokens)]
            state, _ = run_module(self.mtp, k, self.pool, self.buffers, rows, previous)
            self.states[k + 1] = np.concatenate([self.states[k + 1], state])

    def draft(self, token: int) -> list[int]:
        """One draft per module for what follows `token`, which stands right behind the settled positions."""
        drafts: list[int] = []
        previous, position = self.states[0][-1:], self.timeline.length
        for k in range(len(self.mtp.modules)):
            rows = self.pool.rows_at(self.timeline, position + k, np.asarray([drafts[-1] if drafts else token]))
            previous, logits = run_module(self.mtp, k, self.pool, self.buffers, rows, previous)
            drafts.append(int(logits[0].argmax()))
        return drafts

    def close(self) -> None:
        self.timeline.release()


def draft_acceptance(
    mtp: Mtp,
    pool: KVPool,
    buffers: Buffers,
    prompts: Sequence[Sequence[int]],
    stop_ids: frozenset[int],
    max_tokens: int,
) -> tuple[Acceptance, list[list[int]]]:
    """Answer every prompt greedily by draft and verify; the acceptance, and the answers (end token included)."""
    n_modules = len(mtp.modules)
    found, answers = Acceptance([0] * n_modules, [0] * n_modules), []
    for prompt in prompts:
        loop, answer = GreedyDrafting(mtp, pool, buffers), []
        token = loop.settle(prompt)[-1]
        loop.replay(prompt, 0)
        answer.append(token)
        while token not in stop_ids and len(answer) < max_tokens:
            drafts, start = loop.draft(token), loop.timeline.length
            choices = loop.settle([token, *drafts])
            n_right = next((j for j, d in enumerate(drafts) if d != choices[j]), n_modules)
            new = choices[: n_right + 1]
            end = next((i for i, t in enumerate(new) if t in stop_ids), len(new) - 1)
            new = new[: min(end + 1, max_tokens - len(answer))]
            _count(found, n_right, len(new))
            loop.rewind(start + len(new))
            loop.replay([token, *new[:-1]], start)
            answer += new
            token = new[-1]
        answers.append(answer)
        loop.close()
    return found, answers


def _count(found: Acceptance, n_right: int, n_tokens: int) -> None:
    """A step that settled n_tokens; drafts beyond the end of the answer count neither way."""
    found.n_steps += 1
    found.n_tokens += n_tokens
    for j in range(min(n_right + 1, len(found.proposed), n_tokens)):
        found.proposed[j] += 1
        found.accepted[j] += j < n_right
