"""JSON beside the weights is read within bounds: memory, not time, is what is measured."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from m2lite.errors import BadModelError
from m2lite.quant.journal import Journal, Ticket
from m2lite.quant.safetensors import SafetensorsFile
from m2lite.quant.texts import BOUNDS, SETTINGS, load_json
from m2lite.quant.vocabulary import vocabulary_keys

MIB = 1 << 20


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that Python took while it ran and was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(BadModelError):
            run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_config_of_120_mb_costs_nothing(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.write(b'{"a": [' + b"[],")
        file.truncate(120 * 10**6)
    assert peak_bytes(lambda: load_json(tmp_path, "config.json")) < MIB
    with pytest.raises(
        BadModelError, match=r"has 120,000,000 bytes, more than the 4,194,304 that such a file may have"
    ):
        load_json(tmp_path, "config.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_settings_of_millions_of_items_cost_little(tmp_path: Path, name: str) -> None:
    """Within the bound on bytes: a list in every third byte would take 30 times as much."""
    (tmp_path / name).write_bytes(b'{"a": [' + b"[]," * (SETTINGS.n_bytes // 3 - 10) + b"1]}")
    assert peak_bytes(lambda: load_json(tmp_path, name)) < 8 * SETTINGS.n_bytes
    with pytest.raises(BadModelError, match="more than 65,536 items"):
        load_json(tmp_path, name)


@pytest.mark.parametrize("name", BOUNDS)
def test_larger_files_have_bounds_of_their_own(tmp_path: Path, name: str) -> None:
    bounds = BOUNDS[name]
    with (tmp_path / name).open("wb") as file:
        file.truncate(bounds.n_bytes + 1)
    assert peak_bytes(lambda: load_json(tmp_path, name)) < MIB
    (tmp_path / name).write_bytes(b'{"a": [' + b"1," * bounds.n_items + b"1]}")
    with pytest.raises(BadModelError, match=f"more than {bounds.n_items:,} items"):
        load_json(tmp_path, name)


def test_a_safetensors_header_is_bounded_and_its_duplicates_are_found_at_once(tmp_path: Path) -> None:
    """100,000 names, the last twice: to compare each with each would take ten minutes."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f"t{i}" for i in range(100_000)]
    text = ("{" + ",".join(f'"{name}":{entry}' for name in [*names, names[-1]]) + "}").encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(BadModelError, match="the key 't99999' is given twice"):
        SafetensorsFile(path)
    text = b'{"a":[' + b"[]," * 3_000_000 + b"1]}"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    assert peak_bytes(lambda: SafetensorsFile(path)) < 8 * len(text)
    with pytest.raises(BadModelError, match="more than 4,194,304 items"):
        SafetensorsFile(path)


def test_what_json_can_spell_and_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    for text, words in (
        (b'{"hidden_size": 64, "hidden_size": 128}', "the key 'hidden_size' is given twice"),
        (b'{"model_name": "\\ud800"}', "half of a character"),
        (b'{"rope_theta": NaN}', "NaN is no JSON"),
        (b'{"rope_theta": 1e999}', "out of range"),
        (b"\xff\xfe{}", "no UTF-8"),
        (b"[" * 1000, "more than 100 levels deep"),
        (b"[]", "an array where an object is expected"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
    ):
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(BadModelError, match=words) as caught:
            load_json(tmp_path, "config.json")
        assert "ownload" not in str(caught.value)


def test_a_vocabulary_of_the_size_of_m2s_fits(tmp_path: Path) -> None:
    """Its bounds are far from what it needs: 200,000 tokens and as many merges, as pairs."""
    vocab = {f"t{i}": i for i in range(200_000)}
    merges = [["a", "b"]] * 200_000
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "WordLevel", "vocab": vocab, "merges": merges}})
    )
    with pytest.raises(BadModelError, match="model is not byte-level BPE"):
        vocabulary_keys(tmp_path, 200_064)


def test_lines_of_a_journal_are_read_within_bounds(tmp_path: Path) -> None:
    ticket = Ticket("plan", (), 0, {}, ("m.gguf",))
    path = tmp_path / "m.gguf.journal"
    for line in (
        b"[" * 10_000,
        b'{"tensor": "a", "off": 1, "nbytes": 2, "xxh64": "\\ud800"}',
        b'{"tensor": 1, "tensor": 2}',
    ):
        path.write_bytes(ticket.line().encode() + b"\n" + line + b"\n")
        with Journal(path) as journal:
            assert journal.resume(ticket) and not journal.entries
