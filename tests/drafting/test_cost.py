"""What calls cost, as fitted, against machines whose costs are known; and what is kept of it for the next process."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from m2lite import Model, Sampling
from m2lite.drafting.cost import CallCost, Sizes
from m2lite.drafting.kept import kept_path, load_kept, save_kept
from m2lite.drafting.planner import TRIAL, Planner
from tests.drafting.harness import Loop, drafter_of
from tests.drafting.test_planner import M2, Machine, planner_of, table


class Memory:
    """Reads so many bytes a second and takes so long to compute a row; experts are chosen by lot."""

    def __init__(self, bytes_per_s: float, row_s: float, noise: float = 0.0) -> None:
        self.bytes_per_s, self.row_s, self._noise = bytes_per_s, row_s, noise
        self._random = random.Random(0)

    def call(self, n_rows: int, n_reads: float | None = None) -> float:
        n_reads = M2.reads_by_lot(n_rows) if n_reads is None else n_reads
        return (M2.dense_bytes + n_reads * M2.expert_bytes) / self.bytes_per_s + n_rows * self.row_s

    def show(self, cost: CallCost, sizes: Sequence[int]) -> None:
        for i, n in enumerate(sizes):
            noise = self._random.uniform(1 - self._noise, 1 + self._noise)
            cost.saw(n, 0, round(M2.reads_by_lot(n)), self.call(n) * noise)
            if i % 8 == 7:
                cost.refresh()
        cost.refresh()


def seconds(cost: CallCost, n_rows: int, n_drafts: int = 0) -> float:
    return cost.level * cost.call(n_rows, n_drafts)


@pytest.mark.parametrize("row_s", [0.001, 0.02, 0.1])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_costs_are_found(row_s: float, noise: float) -> None:
    """From many sequences side by side, of which more and more begin, with drafts now and then."""
    memory, cost = Memory(30e9, row_s, noise), CallCost(M2)
    memory.show(cost, [*range(8, 33, 2), *([32, 32, 32, 40, 48] * 20)])
    for n in (16, 32, 48, 64):
        assert seconds(cost, n) == pytest.approx(memory.call(n), rel=0.03 + noise)


@pytest.mark.parametrize("row_s", [0.001, 0.02, 0.1])
def test_one_size_alone_leaves_what_is_expected(row_s: float) -> None:
    memory, cost = Memory(30e9, row_s), CallCost(M2)
    memory.show(cost, [32] * 50)
    assert seconds(cost, 32) == pytest.approx(memory.call(32), rel=0.03)
    assert 0 < cost.call(32, 1) - cost.call(32) < cost.call(32) / 16


def test_a_machine_whose_memory_became_slow() -> None:
    """After a call in which it did something else: what counts are the proportions."""
    cost, slow = CallCost(M2), Memory(3e9, 0.01)
    Memory(30e9, 0.01).show(cost, [30, 32, 40, 64] * 20)
    cost.saw(32, 0, round(M2.reads_by_lot(32)), 1e6)
    slow.show(cost, [30, 32, 40, 64] * 60)
    for n in (32, 40, 64):
        assert seconds(cost, n) == pytest.approx(slow.call(n), rel=0.05)


def test_one_call_that_was_held_up_says_little() -> None:
    cost, memory = CallCost(M2), Memory(30e9, 0.01)
    memory.show(cost, [1, 4] * 30)
    before = seconds(cost, 1), seconds(cost, 1, 3)
    for n in (1, 4):
        cost.saw(n, 0, round(M2.reads_by_lot(n)), 100.0)
    assert seconds(cost, 1) < 1.3 * before[0] and seconds(cost, 1, 3) < 1.3 * before[1]
    assert cost.plain_s == pytest.approx(seconds(cost, 1), rel=1e-3)


def test_drafts_that_share_experts_with_their_token_cost_less() -> None:
    memory, by_lot, sharing = Memory(30e9, 0.001), CallCost(M2), CallCost(M2)
    for cost, part in ((by_lot, 1.0), (sharing, 0.5)):
        for n_drafts in [0, 8] * 40:
            plain = M2.reads_by_lot(16)
            reads = plain + part * (M2.reads_by_lot(16 + n_drafts) - plain)
            cost.saw(16 + n_drafts, n_drafts, round(reads), memory.call(16 + n_drafts, reads))
        cost.refresh()
    assert sharing.call(16, 8) - sharing.call(16) < 0.7 * (by_lot.call(16, 8) - by_lot.call(16))


def test_what_a_module_costs() -> None:
    """Of a draft, and of catching up: seconds in those of a call of one row."""
    planner = planner_of(1)
    Memory(30e9, 0.01).show(planner.cost, [1] * 20)
    for _ in range(60):
        planner.cost.saw_module(2, 1, 0.05)
        planner.cost.saw_module(500, 0, 2.0)
    level = planner.cost.level
    assert level * planner.cost.draft(2, 1) == pytest.approx(0.05, rel=0.01)
    assert level * planner.cost.catch_up(1000) == pytest.approx(4.0, rel=0.03)


def learnt() -> Planner:
    machine = Machine(planner_of(3), table(1.0, 1.4, 1.8, 2.2), 0.05, 0.8)
    machine.run(600)
    return machine.planner


def test_the_next_process_begins_where_the_last_ended(tmp_path: Path) -> None:
    """It needs no trial to know what pays."""
    path, before, after = tmp_path / "deep" / "x.json", learnt(), planner_of(3)
    assert not load_kept(path, after)
    save_kept(path, before)
    path.parent.chmod(0o777)
    assert not load_kept(path, after), "others can write there"
    path.parent.chmod(0o700)
    assert load_kept(path, after)
    machine = Machine(after, table(1.0, 1.4, 1.8, 2.2), 0.05, 0.8)
    machine.run(TRIAL)
    assert after.depth == 0  # what everything is compared with comes first
    before.plan(1, [0] * 4)
    after.plan(1, [0] * 4)
    assert after.depth > 0 and before.depth > 0
    for n in range(8):
        assert after.cost.call(1, n) == pytest.approx(before.cost.call(1, n), rel=0.02)
    assert after.cost.draft(2, 1) == pytest.approx(before.cost.draft(2, 1), rel=0.02)
    assert machine.run(90) < 1.06 * machine.best


def test_what_is_kept_is_believed_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    save_kept(path, learnt())
    good = json.loads(path.read_text())
    fresh = json.dumps(planner_of(3).learnt())
    changes: list[dict[str, object]] = [
        {"version": 2},
        {"estimates": []},
        {"estimates": [[True, 1.0]] * len(good["estimates"])},
        {"estimates": [*good["estimates"][:-1], [1.5, 1]]},  # a chance
        {"kinds": [[0, 1, 1, 1]]},
        {"kinds": [[1, 1e300, 1, 1]]},
        {"kinds": [[1, "1", 1, 1]]},
        {"answers": [10, 0]},
        {"since": [1]},
        {"known": [1, 1, 1, -1]},
    ]
    for change in changes:
        path.write_text(json.dumps(good | change))
        planner = planner_of(3)
        assert not load_kept(path, planner) and json.dumps(planner.learnt()) == fresh, change
    path.write_text(json.dumps(good))
    assert load_kept(path, planner_of(3))
    assert not load_kept(path, planner_of(2))  # of another number of modules
    for data in (b"", b"[]", b"{", path.read_bytes()[:-9], b" " * 70_000, b"\xff"):
        path.write_bytes(data)
        assert not load_kept(path, planner_of(3))
    path.unlink()
    os.mkfifo(path)
    assert not load_kept(path, planner_of(3))
    save_kept(path / "below", learnt())  # where nothing can be written


def test_sizes_of_a_row() -> None:
    sizes = Sizes(100, 10, 2, 8, 2)
    assert sizes.row_bytes == 140 and sizes.reads_by_lot(1) == pytest.approx(4) and sizes.reads_by_lot(99) < 16


def test_a_process_corrects_what_was_kept_of_a_busy_hour(tmp_path: Path) -> None:
    """Calls without drafts took four times as long then, so modules seemed to pay: short processes find out soon."""
    path, planner = tmp_path / "x.json", learnt()
    for kind in planner.cost._kinds.values():
        kind.ratio.value *= 4.0 if kind.rows.value == 1 else 1.0
    save_kept(path, planner)
    taken = []
    for seed in range(6):
        planner = planner_of(3)
        assert load_kept(path, planner)
        machine = Machine(planner, table(1.0, 2.0, 3.0, 4.0), 0.3, 0.8, dice=random.Random(seed))
        taken.append(machine.run(60) / machine.best)
        save_kept(path, planner)
    assert taken[0] > 1.1 and max(taken[3:]) < 1.08, taken


def test_where_it_is_kept(bundled_model: Path, model_files: dict[str, Path]) -> None:
    """One file for a model, its modules, the threads and the way it is loaded; the drafter begins there and adds."""
    found = set()
    for path in (bundled_model, model_files["random"]):
        with Model.open(path, ctx=64) as model:
            mtp = model.runner.mtp
            again = kept_path(model.weights, mtp, 2, "mapped")
            assert again == kept_path(model.weights, mtp, 2, "mapped") and again.parent.name == "drafts"
            found |= {again, kept_path(model.weights, mtp, 1, "mapped"), kept_path(model.weights, mtp, 2, "direct")}
            found.add(kept_path(model.weights, None, 2, "mapped"))
    assert len(found) == 7  # one model has no modules


def test_a_drafter_remembers(bundled_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    with Model.open(bundled_model, ctx=256) as model:
        known = [0] * 4
        for n in range(2):
            drafter = drafter_of(model)
            drafter.remember(path)
            assert drafter._planner._known == known
            drafter.save()
            assert path.exists() == (n > 0)  # nothing was learnt yet
            loop = Loop(model, drafter)
            loop.add([5, 6, 7] * 9, 60, Sampling(0, seed=0), ignore_stop=True)
            loop.run()
            loop.close()
            before = drafter._planner.learnt()
            drafter.save()
            assert json.loads(path.read_text()) == {"version": 1, **before}
            known = before["known"]
            assert sum(known) > 5
