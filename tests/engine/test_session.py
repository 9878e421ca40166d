"""Model and Session on tiny files: the row, the cache behind it, stopping, limits."""

from __future__ import annotations

import gc
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinymodel
from m2lite import BadModelError, ContextError, M2liteError, Model, ResourceError, Sampling, UsageError, machine
from m2lite.engine import thread as compute
from m2lite.engine.context import MAX_ROWS, chunk_rows, default_ctx, kv_bytes_per_position
from m2lite.engine.prefix_cache import n_common
from m2lite.engine.runner import Stop
from m2lite.engine.session import Session
from m2lite.model import residency
from m2lite.model.buffers import FEW_ROWS
from tests.budgets import budget_beyond

Opened = Callable[[str], Model]
GREEDY = Sampling(temperature=0, seed=0)
PROMPT = list(b"once upon a time there was a fox who lived in a wood")


def fresh(model: Model, tokens: list[int], n: int, sampling: Sampling) -> list[int]:
    """Computed with nothing in the cache."""
    model.loop.forget()
    with model.session() as session:
        return list(session.generate(tokens, max_tokens=n, sampling=sampling, ignore_stop=True))


def test_only_a_model_that_fits_is_mapped_ahead(model_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(iter(model_files.values()))
    with Model.open(path, ctx=64) as model:
        model.wait_mapped()
        assert model._prefault is not None
        needed = model.gguf.size_bytes + model.kv_bytes
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: needed - 1)
    monkeypatch.setattr(residency, "choose_budget", lambda *_: budget_beyond(1 << 30))
    with Model.open(path, ctx=64) as model:
        model.wait_mapped()
        assert model._prefault is None


def test_script_is_followed(opened: Opened) -> None:
    model = opened("reply")
    with model.session() as session:
        text = model.tokenizer.decode(list(session.generate("say\n")))
        assert text == "hm</think>Fine é"
        assert session.finish_reason == "stop"
        assert session.tokens[-1] == tinymodel.END  # it is part of the row, though not of the answer
        assert session.stats.n_generated == len("hm") + 1 + len("Fine é".encode())


def test_prefill_equals_single_steps(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("random")
    whole = model.logits(PROMPT)
    assert whole.shape == (len(PROMPT), model.config.n_vocab)
    monkeypatch.setattr(model, "n_rows", 1)
    assert np.array_equal(model.logits(PROMPT), whole)
    with model.session() as session:  # and what follows a prompt that is in the cache
        list(session.generate(PROMPT[:30], max_tokens=1, ignore_stop=True))
    assert np.array_equal(model.logits(PROMPT, 20), whole[20:])


def test_a_second_prompt_continues(opened: Opened) -> None:
    model = opened("random")
    with model.session() as session:
        first = list(session.generate(PROMPT, max_tokens=5, sampling=GREEDY, ignore_stop=True))
        more = list(session.generate(b"and then", max_tokens=5, sampling=GREEDY, ignore_stop=True))
        n_cached = session.n_cached
    assert more == fresh(model, [*PROMPT, *first, *b"and then"], 5, GREEDY)
    assert n_cached == len(PROMPT) + 5 + len(b"and then") + 4  # the last token needs no position yet


def test_common_prefix_is_reused(opened: Opened) -> None:
    model = opened("random")
    other = [*PROMPT[:20], *b"another end"]
    with model.session() as session:
        list(session.generate(PROMPT, max_tokens=5, sampling=GREEDY, ignore_stop=True))
        session.set_tokens(other)
        assert session.n_cached == 20
        answer = list(session.generate((), max_tokens=5, sampling=GREEDY, ignore_stop=True))
        assert session.stats.n_reused == 20
        assert answer == fresh(model, other, 5, GREEDY)
        # the same row again: its last token is evaluated once more, for the logits
        session.set_tokens(other)
        assert list(session.generate((), max_tokens=5, sampling=GREEDY, ignore_stop=True)) == answer
        assert session.stats.n_reused == len(other) - 1


def test_rewind_equals_fresh(opened: Opened) -> None:
    model = opened("random")
    with model.session() as session:
        list(session.generate(PROMPT, max_tokens=30, sampling=GREEDY, ignore_stop=True))
        session.rewind(10)
        assert list(session.generate((), max_tokens=8, sampling=GREEDY, ignore_stop=True)) == fresh(
            model, PROMPT[:10], 8, GREEDY
        )


def test_leaving_the_loop_keeps_what_was_yielded(opened: Opened) -> None:
    model = opened("random")
    with model.session() as session:
        got = []
        for token in session.generate(PROMPT, sampling=GREEDY, ignore_stop=True):
            got.append(token)
            if len(got) == 3:
                break
        assert session.finish_reason == "interrupted"
        assert session.tokens == [*PROMPT, *got]
        assert (
            list(session.generate((), max_tokens=3, sampling=GREEDY, ignore_stop=True))
            == fresh(model, PROMPT, 6, GREEDY)[3:]
        )


def test_sessions_do_not_disturb_each_other(opened: Opened) -> None:
    model = opened("random")
    others = list(b"quite another beginning")
    expected = [fresh(model, PROMPT, 10, GREEDY), fresh(model, others, 10, GREEDY)]
    with model.session() as a, model.session() as b:
        both = zip(
            a.generate(PROMPT, max_tokens=10, sampling=GREEDY, ignore_stop=True),
            b.generate(others, max_tokens=10, sampling=GREEDY, ignore_stop=True),
            strict=True,
        )
        assert [list(x) for x in zip(*both, strict=True)] == expected


@pytest.mark.parametrize(("n_rows", "n_of_prompt"), [(1, 3 * 9), (512, 7)])
@pytest.mark.parametrize("n_asked", [0, 1, 2, 5, 6, 7, 8, 9, 20, 26, 27, 36])
def test_stop_between_products_and_calls(
    opened: Opened, monkeypatch: pytest.MonkeyPatch, n_rows: int, n_of_prompt: int, n_asked: int
) -> None:
    """Asked before each call and each of two layers, and in those of many rows twice more: before products."""
    model = opened("endless")
    prompt = list(b"say:\nsay\n")
    assert len(prompt) == 9 > FEW_ROWS
    monkeypatch.setattr(model, "n_rows", n_rows)
    with model.session() as session:
        calls = 0

        def stop() -> bool:
            nonlocal calls
            calls += 1
            return calls > n_asked

        answer = list(session.generate(prompt, sampling=GREEDY, stop=stop))
        assert session.finish_reason == "interrupted"
        assert calls == n_asked + 1  # heard at once
        assert len(answer) == (0 if n_asked < n_of_prompt else 1 + (n_asked - n_of_prompt) // 3)
        # nothing is lost: going on gives what would have come
        rest = list(session.generate((), max_tokens=4, sampling=GREEDY, ignore_stop=True))
        assert answer + rest == fresh(model, prompt, len(answer) + 4, GREEDY)


def test_an_error_takes_no_id_with_it(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that were drawn before an error within the same job are handed out before it."""
    model = opened("random")
    expected = fresh(model, PROMPT, 6, GREEDY)
    real = model.runner.evaluate_rows

    def damaged(parts: Any, *args: Any) -> object:
        if parts[0][0].length >= len(PROMPT) + 5:
            raise M2liteError("NaN or infinity in the logits.")
        return real(parts, *args)

    monkeypatch.setattr(model.runner, "evaluate_rows", damaged)
    monkeypatch.setattr("m2lite.engine.loop.BURST_S", 60.0)
    answer: list[int] = []
    with model.session() as session, pytest.raises(M2liteError):
        for token in session.generate(PROMPT, max_tokens=20, sampling=GREEDY, ignore_stop=True):
            answer.append(token)
    assert answer == expected


def test_an_abandoned_call_leaves_nothing_behind(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a wait, as in a script without signal handling: the call ends later, unseen."""
    model = opened("random")
    with model.session() as session:
        list(session.generate(PROMPT, max_tokens=3, sampling=GREEDY, ignore_stop=True))
        real, n_steps = compute.Job.result, model.loop.counts.n_steps

        def interrupted(job: compute.Job[object], stop: Stop | None = None) -> object:
            value = real(job, stop)
            if model.loop.counts.n_steps > n_steps:
                raise KeyboardInterrupt
            return value

        monkeypatch.setattr(compute.Job, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(session.generate((), max_tokens=3, sampling=GREEDY, ignore_stop=True))
        monkeypatch.undo()
        answer = list(session.generate((), max_tokens=3, sampling=GREEDY, ignore_stop=True))
        assert answer == fresh(model, PROMPT, 6, GREEDY)[3:]


def test_progress(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("random")
    monkeypatch.setattr(model, "n_rows", 20)
    heard: list[tuple[int, int]] = []
    with model.session() as session:
        for _ in session.generate(PROMPT, max_tokens=3, progress=lambda *done: heard.append(done)):
            pass
    n = len(PROMPT)
    assert heard == [(20, n), (40, n), (n, n)]


def test_statistics(opened: Opened) -> None:
    with opened("random").session() as session:
        list(session.generate(PROMPT, max_tokens=10, sampling=Sampling(seed=1), ignore_stop=True))
        stats = session.stats
    assert (stats.n_prompt, stats.n_reused, stats.n_generated) == (len(PROMPT), 0, 10)
    assert stats.first_token_s is not None and stats.first_token_s == stats.prompt_s > 0
    assert stats.tokens_per_s == 9 / stats.decode_s
    assert stats.prompt_tokens_per_s == len(PROMPT) / stats.prompt_s


@pytest.mark.parametrize("n_prompt", [255, 256])
def test_context_is_used_up(model_files: dict[str, Path], n_prompt: int) -> None:
    """A prompt as long as the context leaves room for one token: it needs no position of its own."""
    with Model.open(model_files["random"], ctx=256) as model, model.session() as session:
        answer = list(session.generate([65] * n_prompt, ignore_stop=True))
        assert len(answer) == 257 - n_prompt
        assert session.finish_reason == "length"
        assert session.n_free == 0


def test_context_error(model_files: dict[str, Path]) -> None:
    with Model.open(model_files["random"], ctx=256) as model, model.session() as session:
        list(session.generate([65] * 200, max_tokens=1))
        with pytest.raises(ContextError, match=r"needs 56 tokens; 55 are free of 256\. .*allows 4,096") as caught:
            session.generate([66] * 56)
        assert (caught.value.needed, caught.value.free, caught.value.limit) == (56, 55, 256)
        assert session.tokens[:200] == [65] * 200 and len(session.tokens) == 201  # nothing was taken
        with pytest.raises(ContextError):
            session.set_tokens([1] * 257)
        with pytest.raises(ContextError):
            model.logits([1] * 257)


def test_bad_calls(opened: Opened, model_files: dict[str, Path]) -> None:
    model = opened("random")
    with model.session() as session, pytest.raises(UsageError, match="empty"):
        session.generate("")
    with pytest.raises(UsageError, match=r"context of 9,999 was asked for; the model allows 1 to 4,096"):
        Model.open(model_files["random"], ctx=9999)
    with model.session() as session, pytest.raises(Exception, match="99999"):
        list(session.generate([99_999], max_tokens=1))


def test_default_context(opened: Opened, monkeypatch: pytest.MonkeyPatch, model_files: dict[str, Path]) -> None:
    config = opened("random").config
    per_position = 2 * 2 * 2 * 32 * 2
    assert kv_bytes_per_position(config, "f16") == per_position
    assert default_ctx(config, per_position) == 4096  # the model's limit
    monkeypatch.setattr(machine, "free_memory_bytes", lambda: 4 * 1000 * per_position)
    assert default_ctx(config, per_position) == 960  # whole pages of a quarter
    assert default_ctx(config, kv_bytes_per_position(config, "q8_0")) == 1000 * 64 // 34 // 64 * 64
    assert kv_bytes_per_position(config, "f16", 3) * config.n_layers == per_position * (config.n_layers + 3)
    with pytest.raises(ResourceError, match=r"4,096 needs 1.00 MiB of KV cache; 1,000 KiB of"):
        monkeypatch.setattr(machine, "free_memory_bytes", lambda: 1000 * 1024)
        monkeypatch.setattr("m2lite.engine.context.kv_bytes_per_position", lambda *_: 256)
        Model.open(model_files["random"], ctx=4096)


def test_the_type_of_kv_reaches_the_pool(model_files: dict[str, Path]) -> None:
    with (
        Model.open(model_files["random"], ctx=640) as wide,
        Model.open(model_files["random"], ctx=640, kv="q8_0") as half,
    ):
        assert (wide.kv, half.kv) == ("f16", "q8_0") == (wide.runner.pool.kv, half.runner.pool.kv)
        for model in (wide, half):
            assert model.kv_bytes == model.runner.pool.n_bytes
        assert half.kv_bytes * 64 == wide.kv_bytes * 34
    with pytest.raises(UsageError, match="KV type 'int4' does not exist"):
        Model.open(model_files["random"], kv="int4")


def test_pages_come_back(model_files: dict[str, Path]) -> None:
    """Closed and forgotten sessions give their pages to the next: the pool holds one context."""
    with Model.open(model_files["random"], ctx=128) as model:
        for n in range(6):
            session = model.session()
            list(session.generate([65] * 120, max_tokens=1))
            if n % 2:
                session.close()
            del session
            gc.collect()


def test_logits_of_several_threads(opened: Opened) -> None:
    """Callers may be many; the compute thread is one."""
    model = opened("random")
    expected = model.logits(PROMPT)
    got: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: got.append(model.logits(PROMPT))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 and all(np.array_equal(g, expected) for g in got)


def test_compute_thread_hands_errors_over() -> None:
    with pytest.raises(ZeroDivisionError):
        compute.compute_thread().run(lambda: 1 // 0)
    assert compute.compute_thread().run(threading.current_thread).name == "m2lite-compute"
    ends = threading.Event()
    job = compute.compute_thread().submit(ends.wait)
    assert compute.is_busy()
    ends.set()
    job.result()


def test_small_functions(opened: Opened) -> None:
    assert n_common([1, 2, 3], [1, 2, 4]) == 2
    assert n_common([], [1]) == 0
    assert n_common([1, 2], [1, 2, 3]) == 2
    config = opened("random").config
    assert chunk_rows(config) == MAX_ROWS
    assert chunk_rows(replace(config, n_embd=1 << 20)) == int(50e9 / (config.n_q << 20))
    assert isinstance(opened("random").session(), Session)


@pytest.mark.parametrize("load", ["mmap", "direct"])
@pytest.mark.parametrize("change", ["cut", "written"])
def test_a_file_that_changes_while_it_is_open(bundled_model: Path, tmp_path: Path, load: str, change: str) -> None:
    """Told in words before a page of it is touched; a file put in its place is no change."""
    path = tmp_path / "model.gguf"
    shutil.copy(bundled_model, path)
    with Model.open(path, ctx=256, load=load, heat=False) as model, model.session() as session:
        other = tmp_path / "other"
        other.write_bytes(b"x" * 100)
        answer = session.generate("Once upon a time", max_tokens=40, sampling=Sampling(seed=1), ignore_stop=True)
        first = [next(answer) for _ in range(3)]
        if change == "cut":
            os.truncate(path, 1_000_000)
        else:
            with path.open("r+b") as file:
                file.write(b"GGUF")
        with pytest.raises(BadModelError, match="model file changed on disk"):
            for token in answer:
                first.append(token)
        assert session.tokens[-len(first) :] == first


def test_a_file_that_is_replaced_while_it_is_open(bundled_model: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other"
    shutil.copy(bundled_model, path)
    other.write_bytes(b"x" * 100)
    with Model.open(path, ctx=256) as model:
        before = fresh(model, [1, 2, 3], 5, Sampling(seed=1))
        other.replace(path)
        assert fresh(model, [1, 2, 3], 5, Sampling(seed=1)) == before
