"""Plain text for measuring: held-out text for perplexity, and text from the training side for importance matrices.

    python heldout.py CORPUS OUT_DIR

OUT_DIR gets heldout.txt and calibration.txt: generated questions with their answers (no thinking, no template markup) and pieces
of public-domain prose, shuffled, half of the characters each. Knows no tokens: any tool that reads plain text can use them.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import data
from mix import OWN_ONE_IN, PROSE_ONE_IN, chat_segments, is_held_out, prose_pieces, prose_stories, read_jsonl

TEXTS = {  # held out from training, seed, characters of each half
    "heldout.txt": (True, 9, 100_000),
    "calibration.txt": (False, 1, 300_000),  # seed 1 draws the conversations that `mix.py --seed 1 --long 0` draws
}


def own_texts(rng: random.Random, held_out: bool, n_chars: int) -> list[str]:
    """Generated conversations on one side of the split, each text once."""
    texts: dict[str, None] = {}
    total = 0
    while total < n_chars:
        turns = data.conversation(rng)
        text = "\n".join(f"{question}\n{answer}" for question, _, answer in turns)
        if text not in texts and is_held_out(chat_segments(turns), OWN_ONE_IN) == held_out:
            texts[text] = None
            total += len(text)
    return list(texts)


def public_domain(corpus: Path) -> list[str]:
    """The stories without the picture books (CC BY) and the tales of FairytaleQA (Apache-2.0)."""
    credits = (corpus / "simple_prose_subset" / "ATTRIBUTION.tsv").read_text().splitlines()
    titles = {line.split("\t")[0].strip() for line in credits}
    rows = read_jsonl(corpus / "fairytale_qa" / "fairytale_qa.jsonl")
    tales = data.fold(" ".join(dict.fromkeys(m["content"] for row in rows for m in row)))
    stories = [s for s in prose_stories(corpus) if s.split("\n")[0].strip() not in titles]

    def middle(story: str) -> str:
        folded = data.fold(story)
        return folded[len(folded) // 2 :][:60]

    return [s for s in stories if middle(s) not in tales]


def prose_texts(corpus: Path, rng: random.Random, held_out: bool, n_chars: int) -> list[str]:
    """Pieces of whole stories on one side of the split."""
    stories = [s for s in public_domain(corpus) if is_held_out([(s, 0.0)], PROSE_ONE_IN) == held_out]
    pieces = [piece for story in stories for piece in prose_pieces(story, rng)]
    rng.shuffle(pieces)
    total = 0
    for n, piece in enumerate(pieces):
        total += len(piece)
        if total > n_chars:
            return pieces[: n + 1]
    return pieces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (held_out, seed, n_chars) in TEXTS.items():
        rng = random.Random(seed)
        own = own_texts(rng, held_out, n_chars)
        prose = prose_texts(args.corpus, rng, held_out, n_chars)
        texts = own + prose
        rng.shuffle(texts)
        text = "\n\n".join(texts) + "\n"
        (args.out / name).write_text(text, encoding="utf-8")
        print(name, "conversations", len(own), "pieces of prose", len(prose), "bytes", len(text.encode()))


if __name__ == "__main__":
    main()
