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


def byte_level(model: models.BPE, train_on: tuple[Iterable[str], trainers.BpeTrainer] | None = None) -> Tokenizer:
    """A byte-level tokenizer with M2's pre-tokenizer; the added tokens take the last ids."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(O200K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if train_on:
        tokenizer.train_from_iterator(*train_on)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    tokenizer.add_tokens([AddedToken(s, special=False, normalized=False) for s in ADDED])
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return tokenizer


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A new vocabulary of the texts."""
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL) - len(ADDED),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return byte_level(models.BPE(), (texts, trainer))


def shipped_tokenizer(gguf_file: Path) -> Tokenizer:
    """The tokenizer of a converted file, so that a retraining shares its vocabulary."""
    from gguf import GGUFReader

    fields = GGUFReader(gguf_file).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    base = tokens[: -len(SPECIAL + ADDED)]
    bpe = models.BPE({t: i for i, t in enumerate(base)}, [tuple(m.split(" ")) for m in merges])
    tokenizer = byte_level(bpe)
    assert [tokenizer.id_to_token(i) for i in range(VOCAB_SIZE)] == tokens
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
