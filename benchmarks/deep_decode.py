"""Decoding behind a long prompt whose K and V llama.cpp keeps in a file, so that it fills them once. The rest is
side_by_side.py's.

    python benchmarks/deep_decode.py slice.gguf --llama-completion PATH/llama-completion --label "deep, KV q8_0" \\
        -d 16384 [-n 32] [-t 2] [--pairs 7] --ours-args "--kv q8_0" --llama-args "-fa on -ctk q8_0 -ctv q8_0"

llama-bench fills a depth by prefill in every process, which takes a quarter of an hour for 16,384 positions of q8_0.
llama-completion does it once here (kept below STATE, named by the work) and loads the file in every pair.
"""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import platformdirs

from m2lite import Model
from pairs import Bench, Runs, main, parse_arguments
from runs import Json, RunError, Work, run
from side_by_side import BENCH, make_pair, summary

STATE = Path(platformdirs.user_cache_dir("m2lite")) / "benchmarks"
EVAL = re.compile(r"(?<!prompt) eval time =\s*([\d.]+) ms /\s*(\d+) runs")
PROMPT = re.compile(r"prompt eval time =\s*[\d.]+ ms /\s*(\d+) tokens")


class DeepBench(Bench):
    """llama.cpp's side is llama-completion, behind a prompt of as many tokens as the depth."""

    def __init__(self, name: str, args: argparse.Namespace, work: Work) -> None:
        super().__init__(name, args, work)
        if len(work.depths) != 1 or work.prompts or len(work.decodes) != 1 or not work.depths[0]:
            raise RunError("Say one -d above 0 and one -n.")
        asked = repr((self.identity["work"], self.versions["llama.cpp"]))
        self.kept = STATE / hashlib.sha256(asked.encode()).hexdigest()[:12]

    def side(self, side: str, work: Work) -> tuple[list[str], Callable[[str], object]]:
        if side == "ours":
            return super().side(side, work)
        return self._argv(work, work.decodes[0], "--prompt-cache-ro"), partial(parse_completion, work)

    def _argv(self, work: Work, n: int, *others: str) -> list[str]:
        fixed = ["-no-cnv", "--no-escape", "--simple-io", "--temp", "0", "--ignore-eos", "--log-file", "/dev/stdout"]
        files = ["-f", str(self.kept / "prompt.txt"), "--prompt-cache", str(self.kept / "state.bin")]
        sizes = ["-c", str(work.ctx), "-n", str(n), "-t", str(work.threads)]
        return [str(self.program), "-m", str(work.model), *sizes, *files, *fixed, *work.llama_args, *others]

    def collect(self, make_round: Callable[[int], Runs]) -> list[Json]:
        self.fill()
        return super().collect(make_round)

    def fill(self) -> None:
        """Make the prompt and let llama.cpp compute it, if that is not done."""
        if (self.kept / "done").exists():
            return
        self.kept.mkdir(parents=True, exist_ok=True)
        [depth] = self.work.depths
        (self.kept / "prompt.txt").write_text(prompt_of(self.work.model, depth))
        (self.kept / "state.bin").unlink(missing_ok=True)  # of a fill that was cut short
        print(f"llama-completion computes the prompt of {depth:,} tokens, once", flush=True)
        found = run(self._argv(self.work, 1), lambda text: ([], {"prompt": PROMPT.search(text)}))
        prompt = found["about"]["prompt"]
        if prompt is None or not depth - 1 <= int(prompt[1]) <= depth:  # it computes the last token apart
            raise RunError(f"llama-completion read {prompt and prompt[1]} tokens where {depth} were meant.")
        (self.kept / "done").touch()


def parse_completion(work: Work, text: str) -> tuple[list[Json], Json]:
    """(tests, about) from what llama-completion logs; refuses a run that computed its prompt again."""
    found, prompt = EVAL.search(text), PROMPT.search(text)
    if found is None or prompt is None:
        raise RunError(f"llama-completion said no times: {text[-500:]!r}")
    if int(prompt[1]) > 64:
        raise RunError(f"llama-completion computed {prompt[1]} tokens of a prompt that it should have kept.")
    speed = int(found[2]) / (float(found[1]) / 1e3)
    [depth], [n] = work.depths, work.decodes
    test = {"kind": "decode", "n": n, "depth": depth, "samples": [speed], "tokens_per_s": speed}
    return [test], {"kept": "state of the prompt", "runs": int(found[2])}


def prompt_of(path: Path, n: int) -> str:
    """A text of exactly n tokens: words of random letters, of which the last ones are tried out."""
    letters, rng = np.array(list("etaoinshrdlucmfwypvbg")), np.random.default_rng(0)
    with Model.open(path, ctx=64) as model:

        def count(text: str) -> int:
            return len(model.encode_prompt(text))

        words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 9, n)]
        low, high = 0, len(words)
        while low < high:  # the most words that are no more than n tokens
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(" ".join(words[:middle])) <= n else (low, middle - 1)
        text = " ".join(words[:low])
        while (before := count(text)) < n:
            longer = (text + piece for piece in (" e", "e", " .", "."))
            found = next((more for more in longer if before < count(more) <= n), None)
            if found is None:
                raise RunError(f"No text of exactly {n} tokens was found.")
            text = found
    return text


if __name__ == "__main__":
    asked = parse_arguments(__doc__, prompts="0", decodes="32", program="llama-completion")
    main(BENCH, *asked, make_pair, summary, DeepBench)
