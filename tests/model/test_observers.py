"""Forward's observers: they see the input of every matrix once a call, and who is chosen, and change nothing."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest

from m2lite.kernels import fast, reference
from m2lite.kernels.reference import array_at
from m2lite.model.observer import Observer
from m2lite.model.weights import Matrix
from tests.model.engine import F32, Engine

N = 40
TOKENS = [int(i) for i in np.random.default_rng(4).integers(0, 256, N)]


class Recorder(Observer):
    """Copies of all inputs: address of the matrix and expert (None where there is no stack) -> rows."""

    def __init__(self) -> None:
        self.seen: dict[tuple[int, int | None], F32] = {}
        self.ids: list[tuple[int, np.ndarray]] = []

    def chosen(self, layer: int, start: int, ids: np.ndarray) -> None:
        self.ids.append((layer, ids.copy()))

    def dense(self, matrices: tuple[Matrix, ...], x: int, n_in: int, n: int) -> None:
        for m in matrices:
            self._see(m, None, array_at(x, np.float32, (n, n_in)))

    def experts(
        self, stacks: tuple[Matrix, ...], x: int, n_in: int, rows: int, active: int, starts: int, n_groups: int
    ) -> None:
        pairs = array_at(starts, np.int32, (n_groups + 1,))
        index = array_at(rows + 4 * int(pairs[0]), np.int32, (int(pairs[-1] - pairs[0]),))
        inputs, pairs = array_at(x, np.float32, (int(index.max()) + 1, n_in)), pairs - pairs[0]
        for m in stacks:
            for g, e in enumerate(array_at(active, np.int32, (n_groups,)).tolist()):
                self._see(m, e, inputs[index[pairs[g] : pairs[g + 1]]])

    def _see(self, m: Matrix, expert: int | None, x: F32) -> None:
        assert x.shape[1] == m.n_in and (m.address, expert) not in self.seen
        self.seen[m.address, expert] = x.copy()


def record(path: Path, kernels: ModuleType = fast, generic: bool = False) -> tuple[Engine, F32, Recorder]:
    engine = Engine(path, kernels=kernels, generic=generic)
    recorder = Recorder()
    return engine, engine.logits(TOKENS, observer=recorder), recorder


def by_name(engine: Engine, recorder: Recorder) -> dict[tuple[str, int | None], F32]:
    names = {engine.gguf.address(name): name for name in engine.gguf.tensors}
    return {(names[address], expert): x for (address, expert), x in recorder.seen.items()}


@pytest.mark.parametrize("kernels", [fast, reference])
def test_observers_change_no_bit(model_files: dict[str, Path], kernels: ModuleType) -> None:
    expected = Engine(model_files["random"], kernels=kernels).logits(TOKENS)
    _, logits, recorder = record(model_files["random"], kernels)
    assert logits.tobytes() == expected.tobytes() and recorder.seen


def test_every_matrix_is_seen_and_nothing_else(model_files: dict[str, Path]) -> None:
    engine, _, recorder = record(model_files["random"])
    c, found = engine.config, by_name(*record(model_files["random"])[::2])
    dense = {name for name, expert in found if expert is None}
    stacks = {name for name, expert in found if expert is not None}
    matrices = {name for name, info in engine.gguf.tensors.items() if len(info.shape) == 2}
    assert dense == matrices - {"token_embd.weight"}  # its rows are copied
    assert stacks == {name for name, info in engine.gguf.tensors.items() if len(info.shape) == 3}
    for name in dense:
        assert len(found[name, None]) == N
    for name in stacks:
        assert sum(len(x) for (n, _), x in found.items() if n == name) == N * c.n_experts_used
    assert len(recorder.seen) == len(found)


def plain_inputs(engine: Engine) -> dict[tuple[str, int | None], np.ndarray]:
    """The inputs of every matrix by the paper, in float64 from the unpacked weights."""
    c = engine.config
    w = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64)
        for t in gguf.GGUFReader(engine.gguf.path).tensors
    }
    seen: dict[tuple[str, int | None], np.ndarray] = {}

    def times(x: np.ndarray, name: str, expert: int | None = None) -> np.ndarray:
        seen[name, expert] = x
        return x @ (w[name] if expert is None else w[name][expert]).T

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + c.rms_eps) * w[name]

    half = c.rotary_dim // 2
    angles = np.arange(N)[:, None, None] * c.rope_theta ** (-np.arange(half) / half)

    def heads(x: np.ndarray, rotated: bool) -> np.ndarray:
        x = x.reshape(N, -1, c.head_dim).copy()
        if rotated:
            a, b = x[..., :half].copy(), x[..., half : 2 * half].copy()
            x[..., :half] = a * np.cos(angles) - b * np.sin(angles)
            x[..., half : 2 * half] = b * np.cos(angles) + a * np.sin(angles)
        return x

    x = w["token_embd.weight"][TOKENS]
    for i in range(c.n_layers):
        p = f"blk.{i}."
        h = norm(x, p + "attn_norm.weight")
        q = heads(norm(times(h, p + "attn_q.weight"), p + "attn_q_norm.weight"), True)
        k = heads(norm(times(h, p + "attn_k.weight"), p + "attn_k_norm.weight"), True)
        v = heads(times(h, p + "attn_v.weight"), False)
        group = c.n_heads // c.n_kv_heads
        k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / c.head_dim**0.5
        scores[:, np.triu(np.ones((N, N), bool), 1)] = -np.inf
        p_attend = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p_attend /= p_attend.sum(axis=-1, keepdims=True)
        x = x + times(np.einsum("hqk,khd->qhd", p_attend, v).reshape(N, -1), p + "attn_output.weight")
        h = norm(x, p + "ffn_norm.weight")
        s = 1 / (1 + np.exp(-times(h, p + "ffn_gate_inp.weight")))
        chosen = np.argsort(-(s + w[p + "exp_probs_b.bias"]), axis=-1)[:, : c.n_experts_used]
        total = np.take_along_axis(s, chosen, axis=-1).sum(axis=-1)
        x = x.copy()
        for e in sorted(set(chosen.reshape(-1).tolist())):
            rows = np.flatnonzero((chosen == e).any(axis=-1))
            gate, up = times(h[rows], p + "ffn_gate_exps.weight", e), times(h[rows], p + "ffn_up_exps.weight", e)
            down = times(gate / (1 + np.exp(-gate)) * up, p + "ffn_down_exps.weight", e)
            x[rows] += (s[rows, e] / total[rows])[:, None] * down
    times(norm(x, "output_norm.weight"), "output.weight")
    return seen


def test_the_chosen_are_those_that_multiply(model_files: dict[str, Path]) -> None:
    """Of each layer once, in its order, ascending in each row, and each goes through the experts that it names."""
    engine, _, recorder = record(model_files["random"])
    c, found = engine.config, by_name(engine, recorder)
    assert [layer for layer, _ in recorder.ids] == list(range(c.n_layers))
    for layer, ids in recorder.ids:
        assert ids.shape == (N, c.n_experts_used) and (np.diff(ids, axis=1) > 0).all()
        for e in range(c.n_experts):
            n = len(found.get((f"blk.{layer}.ffn_down_exps.weight", e), ()))
            assert n == (ids == e).sum()


def test_few_rows_are_seen_as_many_are(model_files: dict[str, Path]) -> None:
    """One row goes through a layer in one call, unless somebody looks: the same logits and the same choice."""
    engine = Engine(model_files["random"])
    (_, expected), *_ = record(model_files["random"])[2].ids
    recorder, timeline = Recorder(), engine.pool.timeline()
    engine.run(timeline, TOKENS[:-1])
    plain = engine.run(timeline, TOKENS[-1:])
    timeline.rewind(N - 1)
    seen = engine.run_rows([(timeline, TOKENS[-1:])], observer=recorder)
    assert seen.tobytes() == plain.tobytes()
    assert np.array_equal(recorder.ids[0][1], expected[-1:])


def test_what_is_seen_is_what_the_paper_multiplies(model_files: dict[str, Path]) -> None:
    """With activations in float32; K and V are kept in f16, whose rounding (2**-11) is what the tolerance is for."""
    engine, _, recorder = record(model_files["random"], generic=True)
    found, expected = by_name(engine, recorder), plain_inputs(engine)
    assert found.keys() == expected.keys()
    for key, x in found.items():
        assert x.shape == expected[key].shape, key
        assert np.abs(x - expected[key]).max() <= 2e-3 * np.abs(expected[key]).max(), key
