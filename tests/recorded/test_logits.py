"""The bits of logits change with NUMERICS_VERSION and not otherwise: then K and V that were kept stay what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2lite.model.numerics import NUMERICS_VERSION
from m2lite.simd.tuning import VALUES
from tests.recorded.logits import KV, hash_logits, hash_modules
from tests.recorded.models import NAMES, write_models
from tests.recorded.record import LOGITS, read_json

TABLE = read_json(LOGITS)
TODO = (
    "The numbers have changed, and NUMERICS_VERSION is what it was. If they should, raise it in "
    "m2lite/model/numerics.py and run `python -m tests.recorded`; if not, find out what has changed them. "
    "(If test_the_models_are_those_that_were_recorded fails, too, only the models have: see there.)"
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


def test_this_version_is_in_the_table() -> None:
    assert str(NUMERICS_VERSION) in TABLE, "Run `python -m tests.recorded`, which adds it."
    assert list(map(int, TABLE)) == list(range(1, NUMERICS_VERSION + 1))


@pytest.mark.parametrize("kv", KV)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_version(name: str, kv: str, paths: dict[str, Path]) -> None:
    assert hash_logits(paths[name], kv) == TABLE[str(NUMERICS_VERSION)][f"{name} {kv}"], TODO


@pytest.mark.parametrize("kv", KV)
def test_logits_of_modules_are_those_of_the_version(kv: str, paths: dict[str, Path]) -> None:
    recorded = {k: v for k, v in TABLE[str(NUMERICS_VERSION)].items() if k.startswith(f"m2-tiny {kv} module")}
    found = {f"m2-tiny {kv} module {k}": each for k, each in enumerate(hash_modules(paths["m2-tiny"], kv))}
    assert len(recorded) == 3 and found == recorded, TODO


def test_versions_differ_in_something_and_every_hash_is_another() -> None:
    """So a changed type of the cache, format or module has another hash, and no version is the one before it."""
    for hashes in TABLE.values():
        assert len(set(hashes.values())) == len(hashes) == len(NAMES) * len(KV) + 3 * len(KV)
    assert len({tuple(hashes.values()) for hashes in TABLE.values()}) == len(TABLE)


def test_one_bit_of_a_weight_changes_the_hash(paths: dict[str, Path], tmp_path: Path) -> None:
    data = bytearray(paths["Q4_0"].read_bytes())
    data[-1000] ^= 1  # in the last tensor, the head
    path = tmp_path / "changed.gguf"
    path.write_bytes(data)
    assert hash_logits(path, "f16") != TABLE[str(NUMERICS_VERSION)]["Q4_0 f16"]


def test_chunks_and_parallel_regions_do_not_change_the_hash(
    paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As no thread, chunk or vector form does: tests/model/test_bits.py."""
    monkeypatch.setitem(VALUES, "alone_macs", 0)
    monkeypatch.setattr("tests.recorded.logits.CHUNK", 37)
    assert hash_logits(paths["Q4_K"], "f16") == TABLE[str(NUMERICS_VERSION)]["Q4_K f16"]
