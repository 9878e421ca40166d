"""Training in three stages: trunk (with one MTP module), mtp-frozen (three modules, trunk fixed), joint (everything).

    python train.py DATA_DIR OUT_DIR --stage trunk|mtp-frozen|joint --minutes N [--shape tiny|wide] [--modules 0] [--resume]

Time is CPU time of this process, so that being stopped costs nothing. A checkpoint is written every --save-minutes, on SIGTERM
and at the end, by atomic rename. Stage s starts from the finished checkpoint of the stage before.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np
import torch
from torch import Tensor

import model as m2
from generate import complete
from model import SHAPES, HeadLoss, Model, Packed
from optimizer import Optimizer
from tokenizer import END, load_tokenizer, render_prompt

STAGES = {  # start from, modules, muon lr, adam lr, decay from this share of the time on
    "trunk": (None, 1, 0.02, 0.004, 0.5),
    "mtp-frozen": ("trunk", 3, 0.012, 0.002, 0.3),
    "joint": ("mtp-frozen", 3, 0.005, 0.001, 0.1),
}


class Documents:
    """Token arrays of one split, served in a shuffled order that depends only on the epoch."""

    def __init__(self, path: Path) -> None:
        arrays = np.load(path)
        self.tokens, self.weights, self.offsets = (
            arrays["tokens"],
            arrays["weights"].astype(np.float32),
            arrays["offsets"],
        )
        self.n = len(self.offsets) - 1
        self.order = np.arange(self.n)
        self.epoch = -1

    def get(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        a, b = self.offsets[i], self.offsets[i + 1]
        return self.tokens[a:b], self.weights[a:b]

    def batch(self, cursor: int, n_tokens: int) -> tuple[list[int], int]:
        """Documents from the cursor on until n_tokens are reached, and the new cursor."""
        picked, total = [], 0
        while total < n_tokens:
            epoch, i = divmod(cursor, self.n)
            if epoch != self.epoch:
                self.order, self.epoch = np.random.default_rng(epoch).permutation(self.n), epoch
            picked.append(int(self.order[i]))
            total += int(self.offsets[self.order[i] + 1] - self.offsets[self.order[i]])
            cursor += 1
        return picked, cursor


def pack(documents: Documents, picked: list[int]) -> tuple[Packed, Tensor, Tensor]:
    """The batch, its next tokens, and the loss weight of each prediction (zero at a document's last token)."""
    rows = [documents.get(i) for i in picked]
    packed = Packed([t for t, _ in rows])
    target = torch.cat([packed.tokens[1:], packed.tokens[:1]])
    weight = torch.from_numpy(np.concatenate([np.append(w[1:], np.float32(0)) for _, w in rows]))
    return packed, target, weight


def losses(model: Model, packed: Packed, target: Tensor, weight: Tensor, frozen: bool, n_mtp: int) -> list[Tensor]:
    """Weighted mean loss of the trunk and of each module, over the positions that have a weight."""
    rows = weight.nonzero()[:, 0]
    target, weight = target[rows], weight[rows] / weight.sum()
    head = model.head.detach() if frozen else model.head

    def loss(hidden: Tensor, norm: Tensor) -> Tensor:
        h = m2.rms_norm(hidden[rows], norm, model.config.rms_norm_eps).to(model.dtype)
        return HeadLoss.apply(h, head, target, weight)

    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        embedded, g0 = model.trunk(packed)
        first = loss(g0, model.norm) if not frozen else torch.zeros(())
    out = [first]
    if n_mtp:
        for module, hidden in zip(model.mtp, model.modules_hidden(embedded, g0, packed), strict=True):
            out.append(loss(hidden, module.final_norm))  # type: ignore[arg-type]
    return out


@torch.no_grad()
def validate(model: Model, documents: Documents) -> list[float]:
    """Held-out loss per predicted token of replies (weight 1 only), for the trunk and each module."""
    model.eval()
    total, count = np.zeros(1 + len(model.mtp)), 0.0
    replies = [i for i in range(documents.n) if documents.get(i)[1].max() == 1.0][:600]
    for a in range(0, len(replies), 60):
        packed, target, weight = pack(documents, replies[a : a + 60])
        weight = (weight == 1.0).float()
        n = float(weight.sum())
        total += n * np.array([float(x) for x in losses(model, packed, target, weight, False, len(model.mtp))])
        count += n
    model.train()
    return [round(float(x), 4) for x in total / count]


def save(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def build(stage: str, shape: str, n_mtp: int, out: Path) -> Model:
    """The model of a stage, with the weights of the stage before."""
    before = STAGES[stage][0]
    model = Model(SHAPES[shape], n_mtp=n_mtp)
    if before is None:
        return model
    state = torch.load(out / f"{before}.pt", weights_only=True)["model"]
    if before == "trunk":  # modules 2 and 3 begin as copies of module 1
        for k in (1, 2):
            state |= {n.replace("mtp.0.", f"mtp.{k}."): v.clone() for n, v in state.items() if n.startswith("mtp.0.")}
    model.load_state_dict(state)
    return model


def lr_scale(progress: float, decay_from: float, step: int) -> float:
    """Warm-up over 30 steps, constant, then linear to zero."""
    return min(1.0, (step + 1) / 30) * min(1.0, max(0.0, (1 - progress) / (1 - decay_from)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--modules", type=int, choices=(0,), help="train without prediction modules (trunk stage only)")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    if not args.no_compile:
        torch._dynamo.config.recompile_limit = 64
        m2.rms_norm = torch.compile(m2.rms_norm, dynamic=True)
        m2.rotate = torch.compile(m2.rotate, dynamic=True)
    args.out.mkdir(parents=True, exist_ok=True)
    _, n_mtp, muon_lr, adam_lr, decay_from = STAGES[args.stage]
    if args.modules is not None:
        assert args.stage == "trunk", "only the trunk can be trained without modules"
        n_mtp = args.modules
    frozen = args.stage == "mtp-frozen"
    train, val = Documents(args.data / "train.npz"), Documents(args.data / "val.npz")
    tokenizer = load_tokenizer(args.data)
    stop = tokenizer.token_to_id(END)
    prompts = json.loads((Path(__file__).parent / "heldout_prompts.json").read_text())
    shown = [render_prompt(p["messages"]) for p in prompts[::5]]
    path = args.out / f"{args.stage}.pt"

    model = build(args.stage, args.shape, n_mtp, args.out)
    trainable: torch.nn.Module = model.mtp if frozen else model
    for p in model.parameters():
        p.requires_grad_(not frozen)
    for p in trainable.parameters():
        p.requires_grad_(True)
    optimizer = Optimizer(trainable, muon_lr, adam_lr)
    step, cursor, used, seen = 0, 0, 0.0, 0
    if args.resume and path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, cursor, used, seen = state["step"], state["cursor"], state["used"], state["seen"]
    elif args.stage != "trunk":
        cursor = 1_000_003 * list(STAGES).index(args.stage)  # another part of the data order
    budget = args.minutes * 60
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopping.append(number))
    model.train()
    if frozen:
        for layer in model.layers:
            layer.eval()
    layers: list[m2.Layer] = [m.layer for m in model.mtp] if frozen else model.all_layers()  # type: ignore[misc]
    base, saved, sampled, mean = time.process_time() - used, used, used, None

    def checkpoint() -> None:
        save(path, {"shape": args.shape, "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "cursor": cursor,
                    "used": used, "seen": seen})  # fmt: skip

    while used < budget and not stopping:
        progress = used / budget
        picked, cursor = train.batch(cursor, args.batch_tokens)
        packed, target, weight = pack(train, picked)
        with_mtp = args.stage != "trunk" or step % 2 == 0  # in the trunk stage the module sees every other batch
        parts = losses(model, packed, target, weight, frozen, n_mtp if with_mtp else 0)
        mtp_mean = sum(parts[1:]) / max(1, len(parts[1:]))  # 0 without modules
        if frozen:
            total = mtp_mean
        else:
            total = parts[0] + (0.3 if args.stage == "joint" or progress < 0.6 else 0.1) * mtp_mean
        total.backward()
        optimizer.step(lr_scale(progress, decay_from, step))
        speed = 0.003 * min(1.0, 2 * (1 - progress)) * (1.0 if args.stage != "joint" else 0.1)
        worst = max(layer.balance(speed) for layer in layers)
        step, seen, used = step + 1, seen + packed.n, time.process_time() - base
        values = np.array([float(p.detach()) for p in parts])
        mean = values if mean is None else mean
        mean[: len(values)] = 0.95 * mean[: len(values)] + 0.05 * values
        if step % 20 == 0:
            text = " ".join(f"{v:.3f}" for v in mean)
            print(f"step {step} min {used / 60:.1f} tokens {seen / 1e6:.2f}M loss {text} load {worst:.2f} "
                  f"tok/s {seen / max(used, 1e-9):.0f} {time.strftime('%H:%M:%S')}", flush=True)  # fmt: skip
        if used - saved > args.save_minutes * 60:
            saved = used
            checkpoint()
            print("held-out reply loss", validate(model, val), flush=True)
        if used - sampled > 600 and not frozen:
            sampled = used
            ids = [tokenizer.encode(s, add_special_tokens=False).ids for s in shown]
            for prompt, reply in zip(prompts[::5], complete(model, ids, stop, seed=step), strict=True):
                print("  >", prompt["messages"][-1]["content"], "\n   ", repr(tokenizer.decode(reply, skip_special_tokens=False)), flush=True)  # fmt: skip
            model.train()
    checkpoint()
    print("done" if not stopping else "stopped", "held-out reply loss", validate(model, val), flush=True)


if __name__ == "__main__":
    main()
