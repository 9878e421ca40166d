"""Sampling and greedy decoding with the training code, in batches. For logs and evaluation, not for users."""

from __future__ import annotations

import torch
from torch import Tensor

from model import Model, rms_norm


def pick(logits: Tensor, generator: torch.Generator | None, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Next ids [B]: temperature, then top-k, then top-p; greedy without a generator."""
    if generator is None:
        return logits.argmax(-1)
    values, index = torch.topk(logits / temperature, top_k, dim=-1)
    p = torch.softmax(values, -1)
    before = p.cumsum(-1) - p
    p = torch.where(before < top_p, p, 0.0)
    return index.gather(1, torch.multinomial(p, 1, generator=generator))[:, 0]


@torch.no_grad()
def complete(
    model: Model, prompts: list[list[int]], stop: int, max_new: int = 200, seed: int | None = None,
    temperature: float = 1.0, top_k: int = 40, top_p: float = 0.95,
) -> list[list[int]]:  # fmt: skip
    """Continuations without the prompt; a finished one ends with `stop`."""
    training = model.training
    model.eval()
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    b = len(prompts)
    lengths = torch.tensor([len(p) for p in prompts])
    size = int(lengths.max()) + max_new
    cache = model.new_cache(b, size)
    tokens = torch.zeros(b, int(lengths.max()), dtype=torch.int64)
    for i, p in enumerate(prompts):
        tokens[i, : len(p)] = torch.tensor(p)
    positions = torch.arange(tokens.shape[1]).expand(b, -1)
    hidden = model.step(tokens, positions, cache)[torch.arange(b), lengths - 1]
    out: list[list[int]] = [[] for _ in prompts]
    done = [False] * b
    for i in range(max_new):
        eps = model.config.rms_norm_eps
        logits = torch.nn.functional.linear(
            rms_norm(hidden, model.norm, eps).to(model.dtype), model.head.to(model.dtype)
        )
        nxt = pick(logits.float(), generator, temperature, top_k, top_p)
        for r, t in enumerate(nxt.tolist()):
            if not done[r]:
                out[r].append(t)
                done[r] = t == stop
        if all(done) or i + 1 == max_new:
            break
        hidden = model.step(nxt[:, None], (lengths + i)[:, None], cache)[:, 0]
    model.train(training)
    return out
