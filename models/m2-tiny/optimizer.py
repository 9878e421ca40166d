"""Muon for matrices, AdamW for the rest. Owns update rules; the schedule is train.py's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MUON_NAMES = ("wq", "wk", "wv", "wo", "w13", "w2", "eh_proj")


def orthogonal(g: Tensor) -> Tensor:
    """The nearest (semi-)orthogonal matrix of each g [B, R, C], by five Newton-Schulz steps in bf16."""
    norm = torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True) + 1e-7
    x = (g / norm).bfloat16()
    tall = x.shape[1] > x.shape[2]
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        gram = torch.bmm(x.transpose(1, 2), x) if tall else torch.bmm(x, x.transpose(1, 2))
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, poly, beta=a) if tall else torch.baddbmm(x, poly, x, beta=a)
    return x


class Optimizer:
    """One step over all parameters that have a gradient; state travels as a dictionary."""

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float) -> None:
        self.muon_lr, self.adam_lr = muon_lr, adam_lr
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.muon = [(n, p) for n, p in named if n.split(".")[-1] in MUON_NAMES]
        self.momentum = {n: torch.zeros_like(p) for n, p in self.muon}
        rest = [p for n, p in named if n.split(".")[-1] not in MUON_NAMES]
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
        self.rest = rest

    @torch.no_grad()
    def step(self, scale: float, momentum: float = 0.95) -> None:
        """Apply gradients with both learning rates times scale, then clear them."""
        for name, p in self.muon:
            if p.grad is None:
                continue
            buffer = self.momentum[name]
            buffer.lerp_(p.grad, 1 - momentum)
            update = p.grad.lerp_(buffer, momentum)
            if p.ndim == 2:
                parts = update[None]
            elif name.endswith("w13"):
                parts = update.view(-1, update.shape[1] // 2, update.shape[2])
            else:
                parts = update
            factor = max(1.0, parts.shape[1] / parts.shape[2]) ** 0.5
            p.mul_(1 - 0.01 * self.muon_lr * scale)
            p.add_(orthogonal(parts).reshape(p.shape), alpha=-self.muon_lr * scale * factor)
            p.grad = None
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self.momentum, "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state["momentum"].items():
            self.momentum[name].copy_(value)
        self.adam.load_state_dict(state["adam"])
