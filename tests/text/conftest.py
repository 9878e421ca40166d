"""Small vocabularies, trained here, in real GGUF files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from m2lite.storage.gguf_reader import GGUFFile, open_gguf
from m2lite.text import bpe
from m2lite.text import tokenizer as m2

TEXT = (
    "Once upon a time there was a small model that spoke in short clean sentences. It's what they'd do: think, say.\n"
    "The tool's reply said 12345 and 67 times <parameter name= ]]~~[[ and nothing else!\n\n  Indented   text, naïve.\n"
    "Привет, мир. 你好，世界。 ¿Qué tal? HelloWorld camelCase URLs https://example.org/a/b?c=d\t\r\n"
)
ADDED = [  # (token, type), as in MiniMax-M2
    *(
        (token, 3)
        for token in ("]!p~[", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "]~b]", "[e~[", "]!d~[", "]~!b[")
    ),
    *((token, 4) for token in ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")),
]
N_UNUSED = 3

Keys = dict[str, Any]
OpenKeys = Callable[[Keys], GGUFFile]


@pytest.fixture(scope="session")
def open_keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenKeys]:
    """Writes metadata (name after `tokenizer.` -> value; None leaves a key out) into a file and opens it."""
    opened: list[GGUFFile] = []

    def write(keys: Keys) -> GGUFFile:
        path = tmp_path_factory.mktemp("gguf") / "model.gguf"
        write_keys(path, keys)
        opened.append(open_gguf(path))
        return opened[-1]

    yield write
    for file in opened:
        file.close()


def write_keys(path: Path, keys: Keys, arrays: Mapping[str, tuple[list[int], str]] | None = None) -> None:
    """`keys` by their names after `tokenizer.`; `arrays` by full name, with the type of their items."""
    writer = gguf.GGUFWriter(path, "minimax-m2")
    for name, (items, item_type) in (arrays or {}).items():
        writer.add_key_value(name, items, gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType[item_type])
    kinds = {bool: gguf.GGUFValueType.BOOL, str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32}
    for name, value in keys.items():
        if value is not None:
            kind = kinds.get(type(value), gguf.GGUFValueType.ARRAY)  # a list, or bytes for an array of UINT8
            if value == -1 and kind is gguf.GGUFValueType.UINT32:
                kind = gguf.GGUFValueType.INT32
            writer.add_key_value(f"tokenizer.{name}", value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def special_ids(tokens: list[str]) -> Keys:
    return {
        "ggml.bos_token_id": tokens.index("]~!b["),
        "ggml.eos_token_id": tokens.index("[e~["),
        "ggml.unknown_token_id": tokens.index("]!d~["),
        "ggml.padding_token_id": tokens.index("]!p~["),
    }


@pytest.fixture(scope="session")
def bpe_reference() -> Tokenizer:
    """A byte-level BPE of some 500 tokens, as its trainer leaves it."""
    reference = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(bpe.PATTERNS["minimax-m2"]), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    reference.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    reference.train_from_iterator([TEXT] * 3, trainer)
    return reference


@pytest.fixture(scope="session")
def bpe_keys(bpe_reference: Tokenizer) -> Keys:
    model = json.loads(bpe_reference.to_str())["model"]
    base = sorted(model["vocab"], key=model["vocab"].get)
    tokens = [*base, *(token for token, _ in ADDED), *(f"[PAD{n}]" for n in range(N_UNUSED))]
    return {
        "ggml.model": "gpt2",
        "ggml.pre": "minimax-m2",
        "ggml.tokens": tokens,
        "ggml.token_type": [1] * len(base) + [kind for _, kind in ADDED] + [5] * N_UNUSED,
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.add_bos_token": False,
        **special_ids(tokens),
    }


@pytest.fixture(scope="session")
def spm_reference() -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE of 500 pieces with byte fallback, as its trainer leaves it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines() * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="session")
def spm_keys(spm_reference: sentencepiece.SentencePieceProcessor) -> Keys:
    pieces = range(spm_reference.get_piece_size())
    base = [spm_reference.id_to_piece(i) for i in pieces]
    kinds = [
        2 if spm_reference.is_unknown(i) else 3 if spm_reference.is_control(i) else 6 if spm_reference.is_byte(i) else 1
        for i in pieces
    ]
    tokens = [*base, *(token for token, _ in ADDED), "[PAD0]"]
    return {
        "ggml.model": "llama",
        "ggml.tokens": tokens,
        "ggml.token_type": kinds + [kind for _, kind in ADDED] + [5],
        "ggml.scores": [*(spm_reference.get_score(i) for i in pieces), *([0.0] * (len(ADDED) + 1))],
        "ggml.add_bos_token": False,
        **special_ids(tokens),
    }


@pytest.fixture(scope="session")
def tokenizer(open_keys: OpenKeys, bpe_keys: Keys) -> m2.Tokenizer:
    return m2.load_tokenizer(open_keys(bpe_keys))


@pytest.fixture(scope="session")
def spm_tokenizer(open_keys: OpenKeys, spm_keys: Keys) -> m2.Tokenizer:
    return m2.load_tokenizer(open_keys(spm_keys))


@pytest.fixture(params=["bpe", "spm"])
def any_tokenizer(request: pytest.FixtureRequest) -> m2.Tokenizer:
    """Each kind of vocabulary in turn."""
    name = {"bpe": "tokenizer", "spm": "spm_tokenizer"}[request.param]
    found = request.getfixturevalue(name)
    assert isinstance(found, m2.Tokenizer)
    return found
