"""Judge an exported checkpoint: 40 held-out prompts x 3 seeds by the rubric, and MTP acceptance.

    python evaluate.py HF_DIR DATA_DIR OUT_DIR

OUT_DIR gets samples.md (all replies, unselected) and results.json. Everything in f32 from the rounded weights.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import rubric
from export import load_exported
from generate import complete
from model import Model, Packed
from tokenizer import END, load_tokenizer, render_prompt
from train import Documents, pack

HERE = Path(__file__).parent


@torch.no_grad()
def predictions(model: Model, documents: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Greedy prediction of the token after each position, by the trunk and by each module, over packed documents."""
    packed = Packed(documents)
    embedded, g0 = model.trunk(packed)
    hidden = model.modules_hidden(embedded, g0, packed)
    drafts = [model.logits(g, m.final_norm).argmax(-1).numpy() for g, m in zip(hidden, model.mtp, strict=True)]  # type: ignore[arg-type]
    return model.logits(g0, model.norm).argmax(-1).numpy(), drafts


def teacher_forced(model: Model, val: Documents, n_documents: int = 300) -> list[float]:
    """Share of reply tokens of the validation set where module k, k hidden states behind, says what the trunk says."""
    replies = [i for i in range(val.n) if val.get(i)[1].max() == 1.0][:n_documents]
    _, _, weight = pack(val, replies)
    trunk, drafts = predictions(model, [val.get(i)[0] for i in replies])
    counted = (weight == 1.0).numpy()
    return [float((d == trunk)[counted].mean()) for d in drafts]


def drafted_decoding(model: Model, prompts: list[list[int]], replies: list[list[int]]) -> dict[str, Any]:
    """Replay greedy replies as draft-and-verify steps of three drafts.

    After each step the modules are replayed on the accepted tokens, so a draft after accepted drafts is what the
    teacher-forced recurrence gives: draft j counts when the drafts before it were right.
    """
    proposed, accepted, steps, tokens = np.zeros(3, int), np.zeros(3, int), 0, 0
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = np.array(prompt + reply)
        _, drafts = predictions(model, [ids])
        at = len(prompt)  # the reply's first token comes from the prompt's own pass
        while at < len(ids) - 1:
            steps += 1
            right = 0
            for j in range(min(3, len(ids) - 1 - at)):
                proposed[j] += 1
                if drafts[j][at + j] != ids[at + j + 1]:
                    break
                accepted[j] += 1
                right += 1
            at += right + 1
            tokens += right + 1
    return {
        "steps": steps, "tokens": tokens, "proposed": proposed.tolist(), "accepted": accepted.tolist(),
        "acceptance_when_reached": (accepted / np.maximum(proposed, 1)).round(4).tolist(),
        "tokens_per_step": round(tokens / max(steps, 1), 3),
    }  # fmt: skip


def sample_all(
    model: Model, tokenizer: Tokenizer, prompts: list[dict[str, Any]]
) -> list[tuple[int, int, str, rubric.Verdict]]:
    """(seed, prompt index, reply, verdict) of every prompt and seed at temperature 1.0, top-k 40, top-p 0.95."""
    ids = [tokenizer.encode(render_prompt(p["messages"]), add_special_tokens=False).ids for p in prompts]
    stop, out = tokenizer.token_to_id(END), []
    for seed in rubric.SEEDS:
        for i, reply in enumerate(complete(model, ids, stop, rubric.MAX_TOKENS, seed)):
            ended = bool(reply) and reply[-1] == stop
            text = tokenizer.decode(reply[:-1] if ended else reply, skip_special_tokens=False)
            out.append((seed, i, text, rubric.judge(prompts[i], text, ended)))
    return out


def write_samples(path: Path, prompts: list[dict[str, Any]], rows: list[tuple[int, int, str, rubric.Verdict]]) -> None:
    """All replies as Markdown, in the order of the prompts."""
    lines = [
        "# Replies of m2-tiny to the held-out prompts",
        "",
        "Seeds 1, 2, 3; temperature 1.0, top-k 40, top-p 0.95; unselected.",
        "",
    ]
    for i, prompt in enumerate(prompts):
        lines += [f"## {prompt['id']}. {prompt['messages'][-1]['content']}", ""]
        for seed, _, text, verdict in sorted((r for r in rows if r[1] == i), key=lambda r: r[0]):
            thinking, answer = rubric.split_reply(text)
            marks = ", ".join(
                w
                for w, bad in (
                    ("not ended", not verdict.ended),
                    ("repeats", verdict.repeats),
                    ("off topic", not verdict.on_topic),
                )
                if bad
            )
            body = answer.replace("\n", " / ")
            lines += [f"{seed}. *({thinking})* {body}" + (f" **[{marks}]**" if marks else "")]
        lines.append("")
    path.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_exported(args.checkpoint), load_tokenizer(args.checkpoint)
    prompts = json.loads((HERE / "heldout_prompts.json").read_text())
    args.out.mkdir(parents=True, exist_ok=True)
    rows = sample_all(model, tokenizer, prompts)
    write_samples(args.out / "samples.md", prompts, rows)
    result: dict[str, Any] = {"rubric": rubric.shares(v for *_, v in rows)}
    ids = [tokenizer.encode(render_prompt(p["messages"]), add_special_tokens=False).ids for p in prompts]
    greedy = complete(model, ids, tokenizer.token_to_id(END), rubric.MAX_TOKENS)
    result["greedy"] = drafted_decoding(model, ids, greedy)
    result["greedy_rubric"] = rubric.shares(
        rubric.judge(
            p, tokenizer.decode(r, skip_special_tokens=False).removesuffix(END), r[-1] == tokenizer.token_to_id(END)
        )
        for p, r in zip(prompts, greedy, strict=True)
    )
    result["teacher_forced"] = teacher_forced(model, Documents(args.data / "val.npz"))
    (args.out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
