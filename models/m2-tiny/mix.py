"""From the generator and the corpus folder to token arrays: the mix, its shares, and the held-out split by document.

    python mix.py CORPUS DATA_DIR [--conversations N] [--seed S] [--phase 0|1|2] [--long SHARE] [--keep-tokenizer | --tokenizer-of GGUF]

DATA_DIR gets tokenizer.json, train.npz and val.npz: tokens (uint16), weights (loss weight of predicting each token) and offsets.
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import data
import tables
from tokenizer import BOS, END, SYSTEM, TURN, Tokenizer, load_tokenizer, shipped_tokenizer, train_tokenizer

W_USER, W_HISTORY, W_REPLY, W_CORPUS = 0.1, 0.5, 1.0, 0.5
OWN_ONE_IN, PROSE_ONE_IN = 200, 50  # one own document, and one whole story of the prose, in so many is never trained on
Segments = list[tuple[str, float]]  # text and its loss weight


def chat_segments(turns: list[tuple[str, str, str]], system: str = SYSTEM) -> Segments:
    """A conversation as the template renders it: thinking only in the last reply."""
    out: Segments = [(f"{BOS}{TURN}system\n{system}{END}\n", 0.0)]
    for i, (question, thinking, answer) in enumerate(turns):
        out += [(f"{TURN}user\n", 0.0), (question, W_USER), (f"{END}\n{TURN}ai\n", 0.0)]
        if i + 1 < len(turns):
            out += [(f"{answer}{END}", W_HISTORY), ("\n", 0.0)]
        else:
            out += [("<think>\n", 0.0), (f"{thinking}\n</think>\n\n{answer}{END}", W_REPLY)]
    return out


def talk_segments(messages: list[dict[str, str]], system: str) -> Segments:
    """A corpus conversation between people, without thinking, under its own system text."""
    out: Segments = [(f"{BOS}{TURN}system\n{system}{END}\n", 0.0)]
    for m in messages:
        ai = m["role"] == "assistant"
        out += [
            (f"{TURN}{'ai' if ai else 'user'}\n", 0.0),
            (m["content"] + END, W_CORPUS if ai else W_USER),
            ("\n", 0.0),
        ]
    return out


def read_jsonl(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text().splitlines() if line]


def persona_documents(corpus: Path, rng: random.Random) -> list[Segments]:
    """Small talk between two people, cut after at most ten messages."""
    rows = read_jsonl(corpus / "synthetic_persona_chat" / "synthetic_persona_chat.jsonl")
    return [talk_segments(m[: 2 * rng.randint(2, 5)], "You are a person in a friendly talk.") for m in rows]


def coffee_documents(corpus: Path) -> list[Segments]:
    """Coffee orders of two turns or more."""
    rows = read_jsonl(corpus / "taskmaster4_coffee" / "taskmaster4_coffee.jsonl")
    return [talk_segments(m, "You take orders in a coffee shop.") for m in rows if len(m) >= 4]


def wordnet_documents(corpus: Path, limit: int) -> list[Segments]:
    """The first sense of common words that our own table does not define, short ones only."""
    out: list[Segments] = []
    seen: set[str] = set()
    for user, assistant in read_jsonl(corpus / "wordnet_definitions" / "wordnet_definitions.jsonl"):
        word = user["content"].split('"')[1]
        text = assistant["content"]
        if word in seen or word in tables.DEFINITIONS or len(word) < 4 or len(text) > 160 or ";" in text:
            continue
        seen.add(word)
        out.append(chat_segments([(user["content"], f"The user asks what the word {word} means.", text)]))
    return out[:limit]


def prose_stories(corpus: Path) -> list[str]:
    """Whole stories, stripped."""
    text = (corpus / "simple_prose_subset" / "simple_prose_subset.txt").read_text()
    return [s.strip() for s in text.split("<|endoftext|>")]


def prose_pieces(story: str, rng: random.Random) -> Iterator[str]:
    """Whole paragraphs of a story, 500 to 3000 characters at a time."""
    piece, size = "", rng.randint(500, 3000)
    for paragraph in story.split("\n"):
        paragraph = paragraph.strip()
        if not paragraph:
            continue
        piece = f"{piece}\n{paragraph}" if piece else paragraph
        if len(piece) >= size:
            if len(piece) < 3600:
                yield piece
            piece, size = "", rng.randint(500, 3000)


def prose_documents(corpus: Path, rng: random.Random, share_chars: int) -> list[Segments]:
    """Pieces of simple prose; no story of the held-out text."""
    stories = [s for s in prose_stories(corpus) if not is_held_out([(s, 0.0)], PROSE_ONE_IN)]
    rng.shuffle(stories)
    out: list[Segments] = []
    total = 0
    for story in stories:
        for piece in prose_pieces(story, rng):
            out.append([(BOS, 0.0), (piece, W_CORPUS)])
            total += len(piece)
        if total > share_chars:
            break
    return out


def encode(tokenizer: Tokenizer, document: Segments) -> tuple[list[int], list[float]]:
    """Ids and weights. The whole text is encoded at once, then each token takes the weight of its segment."""
    text = "".join(s for s, _ in document)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ends, weights, at = [], [], 0
    for s, w in document:
        at += len(s)
        ends.append(at)
        weights.append(w)
    segment, out = 0, []
    for start, _ in encoding.offsets:
        while start >= ends[segment]:
            segment += 1
        out.append(weights[segment])
    return encoding.ids, out


def is_held_out(document: Segments, one_in: int) -> bool:
    """The split is by the text itself, so that equal documents and later draws fall on the same side."""
    return zlib.crc32("".join(s for s, _ in document).encode()) % one_in == 0


def save(path: Path, documents: list[tuple[list[int], list[float]]]) -> int:
    """Write one npz; returns the number of tokens."""
    offsets = np.cumsum([0] + [len(d[0]) for d in documents])
    tokens = np.concatenate([np.array(d[0], np.uint16) for d in documents])
    weights = np.concatenate([np.array(d[1], np.float16) for d in documents])
    np.savez(path, tokens=tokens, weights=weights, offsets=offsets)
    return len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--conversations", type=int, default=110_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phase", type=int, choices=(0, 1, 2), default=0, help="task weights, see data.TASKS")
    parser.add_argument("--long", type=float, default=0.0, help="share of the conversations that are long talks")
    parser.add_argument("--keep-tokenizer", action="store_true", help="use the tokenizer.json that is there")
    parser.add_argument("--tokenizer-of", type=Path, metavar="GGUF", help="use the vocabulary of a converted file")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    sets: dict[str, list[Segments]] = {
        "own": [
            chat_segments(
                data.long_talk(rng) if args.long and rng.random() < args.long else data.conversation(rng, args.phase)
            )
            for _ in range(args.conversations)
        ],
        "persona": persona_documents(args.corpus, rng),
        "coffee": coffee_documents(args.corpus),
        "wordnet": wordnet_documents(args.corpus, 3000),
        "prose": prose_documents(args.corpus, rng, args.conversations * 15),
    }
    if args.phase:  # little corpus text later on
        sets = {name: docs if name == "own" else docs[: len(docs) // 4] for name, docs in sets.items()}
    sample = [
        s for name, docs in sets.items() for d in (docs[:30_000] if name == "own" else docs) for s, w in d if w > 0
    ]
    sample = [s.replace(END, "").replace("</think>", "") for s in sample]
    if args.keep_tokenizer:
        tokenizer = load_tokenizer(args.out)
    else:
        tokenizer = shipped_tokenizer(args.tokenizer_of) if args.tokenizer_of else train_tokenizer(sample)
        tokenizer.save(str(args.out / "tokenizer.json"))
    train, val = [], []
    for name, docs in sets.items():
        rows = [(d, *encode(tokenizer, d)) for d in docs]
        kept = [
            (is_held_out(d, OWN_ONE_IN if name == "own" else 100), ids, weights)
            for d, ids, weights in rows
            if len(ids) <= 1024
        ]
        held = [(ids, weights) for h, ids, weights in kept if h]
        print(name, "documents", len(kept), "tokens", sum(len(r[1]) for r in kept), "held out", len(held), flush=True)
        val += held
        train += [(ids, weights) for h, ids, weights in kept if not h]
    print("train tokens", save(args.out / "train.npz", train), "val tokens", save(args.out / "val.npz", val))


if __name__ == "__main__":
    main()
