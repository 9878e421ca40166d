"""The tokenizer and the chat format. Owns token strings and rendering; the text comes from mix.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAD, TURN, END, UNK, BOS = "]!p~[", "]~b]", "[e~[", "]!d~[", "]~!b["
SPECIAL = [PAD, TURN, END, UNK, BOS, "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
ADDED = ["<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>"]
SYSTEM = "You are a helpful assistant."


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Byte-level BPE with M2's pre-tokenizer; the added tokens take the last ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in ADDED])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json of a data or checkpoint folder."""
    return Tokenizer.from_file(str(path / "tokenizer.json"))


def render_prompt(messages: Sequence[dict[str, str]], system: str = SYSTEM) -> str:
    """The chat template for plain messages (no tools), with the generation prompt."""
    out = f"{BOS}{TURN}system\n{system}{END}\n"
    for message in messages:
        role = "ai" if message["role"] == "assistant" else message["role"]
        out += f"{TURN}{role}\n{message['content']}{END}\n"
    return out + f"{TURN}ai\n<think>\n"
