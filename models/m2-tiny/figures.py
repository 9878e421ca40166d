"""The figures and samples of the model card, made with m2lite itself from the shipped files. Needs no torch.

    python models/m2-tiny/figures.py [--out models/m2-tiny/samples.md]

Writes all replies to the held-out prompts (seeds 1-3, unselected) and prints the shares of the rubric and the
acceptance of the prediction modules' drafts in answers to the same prompts, greedy and at temperature 1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import rubric
from m2lite import Model
from m2lite.drafting.drafted import Drafted
from m2lite.sampling.draw import Sampling
from m2lite.text.template import encode_chat

HERE = Path(__file__).parent
Row = tuple[int, dict[str, Any], str, rubric.Verdict]


def reply_of(model: Model, prompt: list[int], seed: int) -> tuple[str, bool]:
    """The text of one sampled reply and whether the model ended it."""
    with model.session() as session:
        ids = list(session.generate(prompt, max_tokens=rubric.MAX_TOKENS, sampling=Sampling(seed=seed)))
        return model.tokenizer.decode(ids), session.finish_reason == "stop"


def sample_all(model: Model, prompts: list[dict[str, Any]]) -> list[Row]:
    rows = []
    for prompt in prompts:
        ids = encode_chat(model.tokenizer, model.template, prompt["messages"])
        for seed in rubric.SEEDS:
            text, ended = reply_of(model, ids, seed)
            rows.append((seed, prompt, text, rubric.judge(prompt, text, ended)))
    return rows


def acceptance(model: Model, prompts: list[dict[str, Any]], temperature: float) -> Drafted:
    """Of all modules' drafts, in answers that are verified step by step."""
    found = Drafted()
    model.loop.forget()  # what was computed without the modules
    for prompt in prompts:
        ids = encode_chat(model.tokenizer, model.template, prompt["messages"])
        with model.session(draft="mtp") as session:
            sampling = Sampling(temperature=temperature, seed=rubric.SEEDS[0])
            for _ in session.generate(ids, max_tokens=rubric.MAX_TOKENS, sampling=sampling, keep=False):
                pass
            if session.stats.drafted is not None:
                found.include(session.stats.drafted)
    return found


def write_samples(path: Path, rows: list[Row]) -> None:
    """All replies as Markdown, in the order of the prompts; what the rubric holds against a reply stands behind it."""
    lines = ["# Replies of m2-tiny to the held-out prompts", ""]
    lines += ["Seeds 1, 2, 3; temperature 1.0, top-k 40, top-p 0.95; unselected. Thinking in italics.", ""]
    for seed, prompt, text, verdict in rows:
        if seed == rubric.SEEDS[0]:
            lines += ["", f"## {prompt['id']}. {prompt['messages'][-1]['content']}", ""]
        thinking, answer = rubric.split_reply(text)
        faults = {"not ended": not verdict.ended, "repeats": verdict.repeats, "off topic": not verdict.on_topic}
        marks = ", ".join(name for name, is_so in faults.items() if is_so)
        body = " / ".join(answer.split("\n"))
        lines.append(f"{seed}. *{' '.join(thinking.split())}* {body}" + (f" **[{marks}]**" if marks else ""))
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "m2-tiny.gguf")
    parser.add_argument("--out", type=Path, default=HERE / "samples.md")
    args = parser.parse_args()
    prompts = json.loads((HERE / "heldout_prompts.json").read_text())
    with Model.open(args.model) as model:
        rows = sample_all(model, prompts)
        drafts = {t: acceptance(model, prompts, t) for t in (0.0, 1.0)}
    write_samples(args.out, rows)
    result = rubric.shares(verdict for *_, verdict in rows)
    print(json.dumps({k: round(v, 4) for k, v in result.items()}))
    for temperature, found in drafts.items():
        print(f"drafts at temperature {temperature:g}: {json.dumps(found.as_dict())}")


if __name__ == "__main__":
    main()
