"""The kept corpus and the seeds through every target, without a fuzzer; every reader of the product has a target."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2lite.batch.results import status
from m2lite.errors import M2liteError
from tests.fuzz import mutate
from tests.fuzz.seeds import SEEDS
from tests.fuzz.targets import TARGETS
from tests.test_imports import PACKAGE, python_files

CORPUS = Path(__file__).parent / "corpus"
_MOST_BYTES = 2 << 20  # of all that is kept

# What takes bytes or text apart. `open` is one where it reads ("rb").
_READS = {
    "json.loads", "json.load", "parse_json", "parse_object", "tomllib.loads", "tomllib.load", "np.load",
    "np.frombuffer", "os.pread", "os.preadv", "read_bytes", "read_text", "unpack", "unpack_from", "readline",
}  # fmt: skip
# Every file that does: its targets, or in words why there is nothing to fuzz.
READERS: dict[str, tuple[str, ...] | str] = {
    "batch/lines.py": ("batch",),
    "batch/results.py": ("results", "manifest"),
    "chat/commands.py": "a file of the user's that goes into a message as text",
    "chat/editor.py": "what the user saved in an editor, which is text",
    "chat/store.py": ("chat",),
    "chat/tools.py": ("tools",),
    "commands/generate.py": ("request",),
    "sampling/json_schema.py": ("schema",),
    "sampling/tool_values.py": ("tools", "request"),
    "engine/kv_disk.py": "our own memory",
    "engine/prefix_cache.py": "our own memory",
    "drafting/kept.py": ("drafts",),
    "engine/tuned.py": ("tuning",),
    "machine.py": "what the kernel tells",
    "formats/table.py": "weights: any bytes are some",
    "measure/importance.py": "our own memory",
    "model/cache.py": "our own memory",
    "model/layers.py": "our own memory",
    "model/routing.py": "any bytes are some: what names no expert counts for none",
    "quant/decode.py": "weights: any bytes are some",
    "quant/imatrix.py": ("imatrix",),
    "quant/job.py": "bytes that are only hashed and compared",
    "quant/journal.py": ("journal",),
    "quant/pieces.py": ("pieces",),
    "quant/safetensors.py": ("safetensors",),
    "quant/texts.py": ("config", "tokenizer", "texts"),
    "serve/answering.py": "arguments that we wrote as JSON a moment ago",
    "serve/bodies.py": ("served", "messages", "responses", "completions"),
    "serve/messages.py": "arguments that we wrote as JSON a moment ago",
    "serve/scripted.py": "what a tester wrote: no user has it",
    "serve/warm.py": ("served",),
    "serve/web_page.py": "files of the package",
    "commands/serve.py": "a file of the user's whose lines are compared",
    "settings.py": ("settings",),
    "storage/gguf_header.py": ("gguf", "model", "sidecar", "imatrix"),
    "storage/gguf_reader.py": ("gguf", "model", "sidecar", "imatrix"),
    "storage/heat.py": ("heat",),
    "storage/hub.py": "200 bytes of a name, compared",
    "storage/durable.py": "what the kernel tells of locks",
    "storage/line_log.py": ("journal", "chat", "results"),
    "storage/pages.py": ("page",),
    "storage/part_file.py": "what we wrote a moment ago",
    "storage/reads.py": "weights by their places, which the header's reader checked",
    "storage/units.py": "our own memory",
    "system/inputs.py": "any bytes are some: what takes them apart is in this table",
    "system/json_text.py": ("json_text",),
    "system/outputs.py": "the first bytes of a file, compared",
    "system/streams.py": "bytes as they come",
    "text/jinja.py": ("template",),
    "text/messages.py": ("request", "batch", "chat"),
    "text/values.py": ("calls", "reply"),
}


def inputs(name: str) -> list[bytes]:
    return [*SEEDS[name](), *(path.read_bytes() for path in sorted((CORPUS / name).glob("*")))]


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_is_read_or_refused(name: str) -> None:
    for data in inputs(name):
        TARGETS[name](data)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_good(name: str) -> None:
    """A target that refuses all that it is given finds nothing."""
    for data in SEEDS[name]()[:1]:
        TARGETS[name].__wrapped__(data)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"template"}))
def test_a_few_changes(name: str) -> None:
    """The fuzzer's own changes, always the same ones; a template costs a process."""
    rng, data = random.Random(7), SEEDS[name]()
    keep = mutate.mutate_json if name in mutate.JSON else mutate.mutate_sized if name in mutate.SIZED else None
    for _ in range(30):
        changed = bytearray(rng.choice(data))
        if keep is not None and rng.randrange(3):
            changed = bytearray(keep(bytes(changed), rng) or changed)
        else:
            for _ in range(rng.choice([1, 1, 4])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            changed = changed[: rng.choice([len(changed), rng.randrange(len(changed))])]
        TARGETS[name](bytes(changed))


def test_every_target_has_seeds_and_a_small_corpus() -> None:
    assert set(TARGETS) == set(SEEDS)
    kept = list(CORPUS.glob("*/*"))
    assert {path.parent.name for path in kept} <= set(TARGETS)
    assert sum(path.stat().st_size for path in kept) < _MOST_BYTES


def reads(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        is_binary = name == "open" and any(isinstance(a, ast.Constant) and a.value == "rb" for a in node.args)
        if is_binary or name in _READS or f"{owner}.{name}" in _READS:
            yield name


def test_every_reader_has_a_target() -> None:
    found = {
        str(path.relative_to(PACKAGE))
        for path in python_files()
        if not {"kernels", "simd"} & set(path.parts) and any(reads(path))
    }
    assert found == set(READERS), "say in READERS which target reads it, or why none does"
    named = {name for targets in READERS.values() if isinstance(targets, tuple) for name in targets}
    assert named | {"json_text"} == set(TARGETS)


def test_a_target_lets_only_our_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(M2liteError):
        status(tmp_path / "none")
    for name in ("results", "heat", "chat"):
        TARGETS[name](b"")
