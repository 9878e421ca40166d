"""Greedy text of m2lite beside stock llama.cpp on the same GGUF file. Takes the path of a llama-completion binary.

    python benchmarks/greedy_agreement.py MODEL.gguf PROMPTS.json --llama PATH/llama-completion [-n 64]

PROMPTS.json: a list of objects with "messages". They are rendered with the model's chat template, so both sides
continue the same text. Where the texts part, the script shows how near the two tokens were in our logits:
llama.cpp rounds activations per 32 values too, but adds in another order, so near-ties may fall either way.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from m2lite import Model
from m2lite.sampling.draw import Sampling
from m2lite.text.messages import check_messages
from m2lite.text.template import encode_chat

NEAR_TIE = 0.05  # nats: less than this between two logits is a tie that rounding decides


def llama_text(binary: Path, model: Path, prompt: str, n: int, threads: int) -> str:
    """What llama.cpp writes after `prompt`, greedily; control tokens in the prompt are parsed, none are printed."""
    command = [binary, "-m", model, "-p", prompt, "-n", n, "-t", threads, "--temp", 0, "-no-cnv", "--no-display-prompt"]
    command += ["--no-warmup", "--no-repack", "-c", 1024, "--simple-io"]
    done = subprocess.run([str(c) for c in command], capture_output=True, check=True, stdin=subprocess.DEVNULL)
    return done.stdout.decode(errors="replace")


def first_difference(model: Model, prompt: list[int], ours: list[int], theirs: str) -> tuple[int, float] | None:
    """(tokens that agree, nats between our choice and theirs in our logits); None when all of ours agree."""
    other = model.tokenizer.encode(theirs, control=True)
    for i, token in enumerate(ours):
        if i >= len(other):
            return i, float("inf")
        if token != other[i]:
            logits = model.logits(prompt + ours[:i])[-1]
            return i, float(logits[token] - logits[other[i]])
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("-n", type=int, default=64)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    items = json.loads(args.prompts.read_text())
    conversations = [item["messages"] for item in items][args.first : args.first + args.count]
    n_bad = 0
    with Model.open(args.model, threads=args.threads, draft="off") as model:
        for messages in conversations:
            prompt = messages[-1]["content"]
            ids = encode_chat(model.tokenizer, model.template, messages)
            text = model.template.render(check_messages(messages), None)
            with model.session() as session:
                ours = list(session.generate(ids, max_tokens=args.n, sampling=Sampling(temperature=0.0)))
            theirs = llama_text(args.llama, args.model, text, args.n + 8, args.threads)  # a few spare
            found = first_difference(model, ids, ours, theirs)
            if found is None:
                print(f"{len(ours):4d} tokens, all equal         {prompt!r}")
                continue
            n_equal, gap = found
            verdict = "a near-tie" if gap < NEAR_TIE else "NOT a near-tie"
            n_bad += gap >= NEAR_TIE
            print(f"{len(ours):4d} tokens, {n_equal} equal, then {gap:.4f} nats: {verdict}   {prompt!r}")
    print(f"{len(conversations)} prompts, {n_bad} differences that are no near-ties")
    raise SystemExit(bool(n_bad))


if __name__ == "__main__":
    main()
