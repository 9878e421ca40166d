"""Vocabularies that lie: refused with exit code 4, naming the key and the token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from m2lite.errors import BadModelError
from m2lite.text.tokenizer import load_tokenizer

Keys = dict[str, Any]


def replaced(name: str, index: int, value: Any) -> Callable[[Keys], Keys]:
    def change(keys: Keys) -> Keys:
        items = list(keys[name])
        items[index] = value
        return keys | {name: items}

    return change


def both(*changes: Callable[[Keys], Keys]) -> Callable[[Keys], Keys]:
    def change(keys: Keys) -> Keys:
        for step in changes:
            keys = step(keys)
        return keys

    return change


def put(name: str, value: Any) -> Callable[[Keys], Keys]:
    return lambda keys: keys | {name: value}


def no_own_end(keys: Keys) -> Keys:
    """M2's own end of a turn is no token here."""
    return replaced("ggml.tokens", keys["ggml.tokens"].index("[e~["), "[end]")(keys)


COMMON = {
    "no model": (put("ggml.model", None), "'tokenizer.ggml.model' is missing"),
    "foreign model": (put("ggml.model", "bert"), "'tokenizer.ggml.model' is 'bert', supported: gpt2, llama"),
    "model is a number": (put("ggml.model", 3), "'tokenizer.ggml.model' is 3"),
    "no tokens": (put("ggml.tokens", None), "'tokenizer.ggml.tokens' is missing"),
    "tokens are numbers": (put("ggml.tokens", [1, 2]), "'tokenizer.ggml.tokens' is an array of INT32"),
    "token is no UTF-8": (replaced("ggml.tokens", 270, b"\xff"), "'tokenizer.ggml.tokens': string 270"),
    "no types": (put("ggml.token_type", None), "'tokenizer.ggml.token_type' is missing"),
    "types of one byte": (lambda keys: put("ggml.token_type", bytes(keys["ggml.token_type"]))(keys), "UINT8"),
    "types too few": (lambda keys: put("ggml.token_type", keys["ggml.token_type"][:-1])(keys), "token_type' has"),
    "type unknown": (replaced("ggml.token_type", 7, 9), "token 7 .* has type 9"),
    "added twice": (
        both(replaced("ggml.tokens", 280, "<think>"), replaced("ggml.token_type", 280, 4)),
        "both '<think>'",
    ),
    "added of one character": (both(replaced("ggml.tokens", -5, "x"), replaced("ggml.token_type", -5, 3)), "is 'x'"),
    "no end": (both(put("ggml.eos_token_id", None), no_own_end), "'tokenizer.ggml.eos_token_id' is missing"),
    "end out of range": (
        both(put("ggml.eos_token_id", 10**6), no_own_end),
        "'tokenizer.ggml.eos_token_id' is 1000000, expected a token id",
    ),
    "begin out of range": (
        both(put("ggml.bos_token_id", 2**32 - 1), put("ggml.add_bos_token", True)),
        "'tokenizer.ggml.bos_token_id' is 4294967295",
    ),
    "begin is a word": (put("ggml.bos_token_id", 300), "names token 300 .* an ordinary token"),
    "flag is a number": (put("ggml.add_bos_token", 1), "add_bos_token' is 1, expected true or false"),
}
BPE = {
    "no pattern": (put("ggml.pre", None), "'tokenizer.ggml.pre' is missing, supported: minimax-m2, gpt-4o, gpt-2"),
    "foreign pattern": (put("ggml.pre", "llama-bpe"), "'tokenizer.ggml.pre' is 'llama-bpe'"),
    "space prefix": (put("ggml.add_space_prefix", True), "add_space_prefix' is true"),
    "no merges": (put("ggml.merges", None), "'tokenizer.ggml.merges' is missing"),
    "merges are numbers": (put("ggml.merges", [1]), "merges' is an array of INT32"),
    "merge of a stranger": (replaced("ggml.merges", 3, "zz q"), "merge 3 of .* 'zz q' refers to 'zz'"),
    "merge into a stranger": (replaced("ggml.merges", 3, "z Q"), "refers to 'zQ'"),
    "merge of one": (replaced("ggml.merges", 3, "a"), "merge 3 "),
    "merge of three": (replaced("ggml.merges", 3, "a b c"), "merge 3 "),
    "merge into an added token": (replaced("ggml.merges", 3, "[e ~["), "merge 3 "),
    "token twice": (replaced("ggml.tokens", 350, "a"), "both 'a'"),
    "token is empty": (replaced("ggml.tokens", 350, ""), "token 350 '' is no byte-level token"),
    "token with a space": (replaced("ggml.tokens", 350, "a b"), "token 350 'a b' is no byte-level token"),
    "byte token": (replaced("ggml.token_type", 0, 6), "token 0 .* has type 6"),
    "a byte is missing": (replaced("ggml.token_type", 65, 5), "no token for 1 of the 243 bytes"),
}
SPM = {
    "no scores": (put("ggml.scores", None), "'tokenizer.ggml.scores' is missing"),
    "scores of one byte": (lambda keys: put("ggml.scores", bytes(len(keys["ggml.tokens"])))(keys), "UINT8"),
    "scores too few": (lambda keys: put("ggml.scores", keys["ggml.scores"][:-1])(keys), "scores' has"),
    "score is no number": (replaced("ggml.scores", 300, float("nan")), "token 300 has score nan"),
    "a byte is missing": (replaced("ggml.token_type", 10, 5), "255 byte tokens, expected 256"),
    "byte misspelt": (replaced("ggml.tokens", 10, "<0xZZ>"), "byte token 10 is '<0xZZ>'"),
    "piece twice": (replaced("ggml.tokens", 300, "<0x00>"), "inconsistent"),
    "piece is empty": (replaced("ggml.tokens", 300, ""), "inconsistent"),
    "text is normalised": (put("ggml.precompiled_charsmap", b"abc"), "precompiled_charsmap' asks"),
    "spaces are removed": (put("ggml.remove_extra_whitespaces", True), "remove_extra_whitespaces' asks"),
}


def check(open_keys: Any, keys: Keys, change: Callable[[Keys], Keys], match: str) -> None:
    with pytest.raises(BadModelError, match=match) as caught:
        load_tokenizer(open_keys(change(keys)))
    assert caught.value.exit_code == 4
    assert "model.gguf: " in str(caught.value)


@pytest.mark.parametrize("case", {**COMMON, **BPE})
def test_bpe(open_keys: Any, bpe_keys: Keys, case: str) -> None:
    check(open_keys, bpe_keys, *{**COMMON, **BPE}[case])


@pytest.mark.parametrize("case", {**COMMON, **SPM})
def test_spm(open_keys: Any, spm_keys: Keys, case: str) -> None:
    check(open_keys, spm_keys, *{**COMMON, **SPM}[case])
