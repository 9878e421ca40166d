"""The same ids, whatever changes speed or place: promise 1, from the doors down. A new factor or value is one row.

Each case takes one value of every factor and must give the ids of the plainest run. One case for every value of every
factor, and cases drawn at random from all values together. Logits bit for bit, also of other vector forms, are held in
tests/model/test_bits.py; what follows from a rewind, a fork or a mate in tests/model and tests/engine.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import tinymodel
from m2lite import Model, Sampling
from m2lite.batch.lines import line_stream
from m2lite.dialogue.conversation import Conversation
from m2lite.engine.batch import Batch
from m2lite.engine.request import Request
from m2lite.model import residency
from m2lite.simd import jit
from m2lite.simd.tuning import DEFAULTS, PARAMETERS, VALUES
from m2lite.storage import syscalls
from m2lite.text.template import encode_chat
from tests.budgets import budget_beyond
from tests.conftest import Run

N_TOKENS = 20
MODELS = ("m2-tiny", "Q4_0", "Q4_K", "Q6_K", "Q8_0")
KV = ("f16", "q8_0")
SAMPLINGS = {"greedy": Sampling(0, seed=5), "drawn": Sampling(1.0, seed=5)}
# The first value of each is the plainest.
FACTORS: dict[str, tuple[Any, ...]] = {
    "door": ("session", "conversation", "python", "generate", "batch 1", "batch 4", "batch 8", "batch command"),
    "threads": (1, 2, 4),
    "regions": ("as they pay", "everywhere"),  # of threads: models as small as these would do without
    "tuning": ("default", "least", "most"),  # of what differs between machines
    "chunk": (512, 1, 7, 64),
    "draft": (("off", None), ("ngram", 3), ("mtp", 1), ("mtp", 3), ("auto", None)),
    "amx": (False, True),  # where there is none, the same
    "load": ("mapped", "direct", "paged"),  # the latter two with room for few experts
    "prefix": ("computed", "in memory", "from disk"),
}
# Values that act on the same code at once.
TOGETHER: list[tuple[str, dict[str, Any]]] = [
    ("f16", {"door": "batch 8", "load": "direct"}),
    ("f16", {"door": "batch 4", "load": "paged", "draft": ("ngram", 3)}),
    ("f16", {"door": "batch 8", "draft": ("mtp", 1), "chunk": 64}),
    ("q8_0", {"threads": 2, "chunk": 64, "draft": ("mtp", 3)}),
    ("f16", {"threads": 1, "chunk": 1, "draft": ("auto", None)}),
]
STORY = "Tell me a story about a fox, an owl and the river. "
QUESTIONS = [
    STORY * 6 + "Who are you?", "Hello", STORY + "Make it short.", "What is 2 + 3?", STORY, "Thank you",
    "one two three " * 9 + "one", "Tell me a story.",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: str
    kv: str
    door: Any
    threads: Any
    regions: Any
    tuning: Any
    chunk: Any
    draft: Any
    amx: Any
    load: Any
    prefix: Any

    def __str__(self) -> str:
        plain = {name: values[0] for name, values in FACTORS.items()}
        changed = [f"{name} {getattr(self, name)}" for name in FACTORS if getattr(self, name) != plain[name]]
        return ", ".join([self.model, self.kv, *changed])

    @property
    def can_be(self) -> bool:
        """Random models have no prediction modules; a command sets no chunk; a prefix on disk needs a session."""
        is_command = self.door in ("generate", "batch command")
        return (
            (self.draft[0] != "mtp" or self.model == "m2-tiny")
            and (not is_command or (self.chunk == 512 and self.load != "paged"))
            and (self.prefix == "computed" or self.door in ("session", "conversation", "python"))
            and (self.load == "mapped" or syscalls.AVAILABLE)
        )


def plainest(model: str, kv: str) -> Case:
    return Case(model, kv, **{name: values[0] for name, values in FACTORS.items()})


def cases() -> list[Case]:
    """Each value of each factor alone, then several at once."""
    found = []
    for name, values in FACTORS.items():
        found += [replace(plainest("m2-tiny", "f16"), **{name: value}) for value in values[1:]]
    found += [replace(plainest("m2-tiny", kv), **values) for kv, values in TOGETHER]
    dice = random.Random(25)
    for model in MODELS:
        for kv in KV:
            drawn = (Case(model, kv, **{n: dice.choice(v) for n, v in FACTORS.items()}) for _ in range(1000))
            found += [case for case in drawn if case.can_be][:3]
    return list(dict.fromkeys(found))


CASES = cases()


@pytest.fixture(scope="module")
def paths(bundled_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"m2-tiny": bundled_model} | {
        name: tinymodel.write_model(
            folder / f"{name}.gguf", seed=3, shape=tinymodel.WIDE, formats={"dense": name, "experts": name}, embedded=20
        )
        for name in MODELS[1:]
    }


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    VALUES.update({row.name: row.default for row in PARAMETERS.values()})
    jit.start(2)


def messages(n: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTIONS[n]}]


def name_of(n: int) -> str:
    return f"q{n}"


Said = list[tuple[list[int], str]]  # of each question: ids, and thinking and answer as text


def converse(model: Model, n: int, sampling: Sampling, stream: int | None) -> tuple[list[int], str]:
    with model.session() as session:
        return _reply(session, n, sampling, stream)


def _reply(session: Any, n: int, sampling: Sampling, stream: int | None) -> tuple[list[int], str]:
    conversation = Conversation(session)
    list(conversation.reply_to(messages(n), stream, sampling=sampling, max_tokens=N_TOKENS))
    return conversation.answer.tokens, text_of(conversation.answer.reply.thinking, conversation.answer.reply.content)


def text_of(thinking: str | None, content: str | None) -> str:
    return f"{thinking or None}|{content}"


@pytest.fixture(scope="module")
def expected(paths: dict[str, Path]) -> Any:
    """By model, type of the cache and sampling: what the plainest run says to each question."""

    @cache
    def get(name: str, kv: str, sampling: str, in_chat: bool) -> Said:
        with Model.open(paths[name], kv=kv, draft="off", threads=1, ctx=1024, amx=False) as model:
            return [
                converse(model, n, SAMPLINGS[sampling], None if in_chat else line_stream(name_of(n)))
                for n in range(1 if in_chat else len(QUESTIONS))
            ]

    return get


def test_the_matrix_holds_every_value_and_its_ids_vary(expected: Any) -> None:
    for name, values in FACTORS.items():
        assert {getattr(case, name) for case in CASES} == set(values)
    assert all(case.can_be for case in CASES)
    for model in MODELS:
        ids = {sampling: expected(model, "f16", sampling, False) for sampling in SAMPLINGS}
        assert ids["greedy"] != ids["drawn"]
        for said in ids.values():
            assert len({token for tokens, _ in said for token in tokens}) > 15
            assert len({tuple(tokens) for tokens, _ in said}) > 4


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_ids(
    case: Case,
    paths: dict[str, Path],
    expected: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run_inline: Run,
) -> None:
    for name, value in parameters(case).items():
        monkeypatch.setitem(DEFAULTS, name, value)  # a model that is opened begins with them
    if case.load != "mapped" and case.door not in ("generate", "batch command"):
        monkeypatch.setattr(residency, "choose_budget", lambda *_: budget_beyond(2 << 30))
    for sampling in SAMPLINGS:
        said = expected(case.model, case.kv, sampling, case.door == "generate")
        if case.door in ("generate", "batch command"):
            ask = by_generate if case.door == "generate" else by_batch_command
            found, plain = ask(case, paths[case.model], SAMPLINGS[sampling], run_inline, tmp_path), said
        else:
            found = in_process(case, paths[case.model], SAMPLINGS[sampling])
            plain = said[: len(found)]
        if case.door == "batch command":  # a line holds no ids
            assert [text for _, text in found] == [text for _, text in plain], sampling
        else:
            assert [ids for ids, _ in found] == [ids for ids, _ in plain], sampling


def parameters(case: Case) -> dict[str, int]:
    """Of what differs between machines, other values than the defaults."""
    pick = min if case.tuning == "least" else max
    values = {row.name: row.default if case.tuning == "default" else pick(row.values) for row in PARAMETERS.values()}
    return values | ({"alone_macs": 0} if case.regions == "everywhere" else {})


def in_process(case: Case, path: Path, sampling: Sampling) -> Said:
    if case.prefix == "from disk":
        with open_model(case, path) as model, model.session() as session:
            model.use_disk()
            session.set_tokens(encode_chat(model.tokenizer, model.template, messages(0)))
            list(session.generate((), max_tokens=1, sampling=sampling))
            model.loop.save(session.tokens)
    with open_model(case, path) as model:
        if case.door.startswith("batch"):
            return by_batch(model, int(case.door.split()[1]), sampling)
        if case.prefix == "in memory":  # of another answer to the same prompt
            _reply(model.session(), 0, Sampling(1.0, seed=99), 1)
        with model.session() as session:
            row = encode_chat(model.tokenizer, model.template, messages(0))
            if case.prefix == "from disk":
                model.use_disk()
            if case.door == "python":
                done = model.generate(row, max_tokens=N_TOKENS, sampling=sampling, rng_stream=line_stream(name_of(0)))
                session.stats = done.stats
                found = [(done.tokens, "")]
            elif case.door == "conversation":
                found = [_reply(session, 0, sampling, line_stream(name_of(0)))]
            else:
                session.set_tokens(row)
                options: Any = {"max_tokens": N_TOKENS, "sampling": sampling, "rng_stream": line_stream(name_of(0))}
                found = [(list(session.generate((), **options)), "")]
            assert case.prefix == "computed" or session.stats.n_reused >= 48
            return found


def open_model(case: Case, path: Path) -> Model:
    mode, n_drafts = case.draft
    load = {"mapped": "auto", "direct": "direct", "paged": "mmap"}[case.load]
    model = Model.open(
        path, kv=case.kv, threads=case.threads, draft=mode, draft_tokens=n_drafts, load=load, ctx=1024, sequences=8,
        heat=False, amx=case.amx,
    )  # fmt: skip
    model.n_rows = min(model.n_rows, case.chunk)
    stream = model.runner.stream
    assert (stream is not None) == (case.load != "mapped")
    if stream is not None:
        stream.resize(6 * int(stream.ledger.sizes[0]))
        assert model.runner.residency is not None
        model.runner.residency.fit = lambda: None  # type: ignore[method-assign]  # it would give it more
    return model


def by_batch(model: Model, n_inflight: int, sampling: Sampling) -> Said:
    requests = [
        Request(
            key=name_of(n), prompt=encode_chat(model.tokenizer, model.template, messages(n)),
            rng_stream=line_stream(name_of(n)), sampling=sampling, max_tokens=N_TOKENS,
        )
        for n in range(len(QUESTIONS))
    ]  # fmt: skip
    done = {end.request.key: end.completion for end in Batch(model, n_inflight).run(requests)}
    found: Said = []
    for n in range(len(QUESTIONS)):
        answer = done[name_of(n)]
        assert answer is not None
        found.append((answer.tokens, text_of(answer.reply.thinking, answer.reply.content)))
    return found


def options_of(case: Case, sampling: Sampling) -> Sequence[str]:
    mode, n_drafts = case.draft
    options = ["--threads", str(case.threads), "--kv", case.kv, "--draft", mode, "--seed", str(sampling.seed)]
    options += ["--amx", "on" if case.amx else "off"]
    options += ["--temp", str(sampling.temperature), "-n", str(N_TOKENS), "--ctx", "1024"]
    options += ["--draft-tokens", str(n_drafts)] if n_drafts else []
    return options + (["--load", case.load] if case.load == "direct" else [])


def by_generate(case: Case, path: Path, sampling: Sampling, run: Run, _: Path) -> Said:
    done = run("generate", path, "-p", QUESTIONS[0], "--json", *options_of(case, sampling))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return [(found["tokens"], text_of(found["thinking"], found["text"]))]


def by_batch_command(case: Case, path: Path, sampling: Sampling, run: Run, folder: Path) -> Said:
    source, out = folder / f"{sampling.temperature}.jsonl", folder / f"{sampling.temperature}-out.jsonl"
    lines = [{"custom_id": name_of(n), "prompt": question} for n, question in enumerate(QUESTIONS)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("batch", source, "-o", out, "--model", path, *options_of(case, sampling))
    assert done.returncode == 0, done.stderr
    found = {line["custom_id"]: line for line in map(json.loads, out.read_text().splitlines())}
    said = [found[name_of(n)]["response"]["body"]["choices"][0]["message"] for n in range(len(QUESTIONS))]
    return [([], text_of(message.get("reasoning_content"), message["content"])) for message in said]
