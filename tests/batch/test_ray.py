"""A batch on a Ray cluster of this machine: two engines, one of which may be lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import psutil
import pytest

from m2lite.batch import cluster
from m2lite.batch.lines import Line
from m2lite.errors import UsageError
from tests.children import PATIENCE_S
from tests.conftest import Run

pytest.importorskip("ray", reason="ray has no wheel for this Python")
pytestmark = pytest.mark.slow


def write(path: Path, n: int, n_tokens: int) -> Path:
    lines = [
        {"custom_id": f"q{i}", "prompt": f"Tell me a story, number {i}.", "max_tokens": n_tokens} for i in range(n)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line["response"]["body"]["choices"] for line in lines}
    assert len(found) == len(lines)
    return found


def engines(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Processes that run an engine for a driver that has a Ray of its own."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            if "ray::RayEngine" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def start(command: list[str], env: dict[str, str], stdout: IO[str] | None = None) -> subprocess.Popen[str]:
    """m2lite, whose stderr can be read."""
    return subprocess.Popen(
        [sys.executable, "-m", "m2lite", *command], env=env, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


def wait_until(process: subprocess.Popen[str], is_so: Callable[[], bool]) -> None:
    """Fails where the process ends before, or after two minutes."""
    deadline = time.monotonic() + PATIENCE_S
    while not is_so():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_engines_one_is_killed(
    run_m2lite: Run, command_env: dict[str, str], tmp_path: Path, bundled_model: Path
) -> None:
    """The answers are those of one process, whoever gave them, and those of the engine that was killed come, too."""
    source = write(tmp_path / "in.jsonl", 40, 150)
    options = ["--model", str(bundled_model), "--inflight", "4", "--threads", "1"]
    assert run_m2lite("batch", source, "-o", tmp_path / "alone.jsonl", *options).returncode == 0
    out = tmp_path / "out.jsonl"
    command = ["batch", str(source), "-o", str(out), *options, "--ray", "local", "--ray-actors", "2"]
    process = start(command, command_env)
    try:
        wait_until(process, lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
        found = engines(process)
        assert len(found) == 2
        os.kill(found[0].pid, signal.SIGKILL)
        _, told = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert "2 engines on Ray's nodes" in told and "40 of 40 lines are done, 0 failed" in told
    assert answers(out) == answers(tmp_path / "alone.jsonl")
    done = run_m2lite(*command[:-4])  # goes on without Ray: the manifest is the same
    assert done.returncode == 0 and "nothing was left to do" in done.stderr


def test_an_engine_is_lost_while_it_opens_its_model(
    run_m2lite: Run, command_env: dict[str, str], tmp_path: Path, bundled_model: Path
) -> None:
    """The other one begins, and a new one is started beside it."""
    source, out = write(tmp_path / "in.jsonl", 20, 50), tmp_path / "out.jsonl"
    options = ["--model", str(bundled_model), "--inflight", "4", "--threads", "1"]
    command = ["batch", str(source), "-o", str(out), *options, "--ray", "local", "--ray-actors", "2"]
    process = start(command, command_env)
    try:
        wait_until(process, lambda: len(engines(process)) > 0)
        os.kill(engines(process)[0].pid, signal.SIGKILL)
        _, told = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, told
    assert "its 0 lines go to others" in told and "20 of 20 lines are done, 0 failed" in told
    assert run_m2lite("batch", source, "-o", tmp_path / "alone.jsonl", *options).returncode == 0
    assert answers(out) == answers(tmp_path / "alone.jsonl")


def test_idle_engines_share_what_others_have_not_begun() -> None:
    def place(first: int, n: int) -> Any:
        lines = [Line(i, f"q{i}", None) for i in range(first, first + n)]
        return cluster._Place("node", "address", None, lines={line.key: line for line in lines})

    def names(given: dict[int, list[Line]]) -> dict[int, list[str]]:
        return {i: [line.custom_id for line in lines] for i, lines in given.items()}

    places = [place(0, 10), place(20, 5), place(30, 0), place(40, 0)]
    first = cluster.share_out(places, 4)
    assert names(first) == {2: ["q7", "q8", "q9"], 3: ["q5", "q6"]}
    for i, lines in first.items():
        places[i].lines = {line.key: line for line in lines}
    assert cluster.share_out(places, 4) == {}  # nobody is idle
    places[2].lines = {}  # lost: what it had is shared again
    assert names(cluster.share_out(places, 4)) == {2: ["q8", "q9"]}
    assert cluster.share_out([place(0, 4), place(9, 0)], 4) == {}  # they have been begun


def test_lines_that_come_back_are_handed_out_first() -> None:
    supply = cluster._Supply(iter(Line(i, f"q{i}", None) for i in range(2)))
    first = supply.take()
    assert first is not None and first.custom_id == "q0" and not supply.is_empty
    supply.give_back([first])
    names = [line.custom_id for line in iter(supply.take, None)]
    assert names == ["q0", "q1"] and supply.is_empty
    supply.give_back([])
    assert supply.is_empty
    supply.give_back([first])
    assert not supply.is_empty and supply.take() is first and supply.take() is None and supply.is_empty


def test_a_node_is_lost(run_m2lite: Run, command_env: dict[str, str], tmp_path: Path, bundled_model: Path) -> None:
    """Of two nodes with a core each: there is no room for a new engine, and the other one does all that is left.

    Ray prints to stdout that the node is gone: not among the results.
    """
    from ray.cluster_utils import Cluster

    source = write(tmp_path / "in.jsonl", 150, 300)
    options = ["--model", str(bundled_model), "--inflight", "4", "--threads", "1"]
    assert run_m2lite("batch", source, "-o", tmp_path / "alone.jsonl", *options).returncode == 0
    out = tmp_path / "out.jsonl"
    config = {"health_check_period_ms": 300, "health_check_timeout_ms": 300, "health_check_failure_threshold": 2}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "_system_config": config})
    process = None
    try:
        other = nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        command = ["batch", str(source), "-o", "-", *options, "--ray", nodes.address]
        with out.open("w") as file:
            process = start(command, command_env, stdout=file)
        wait_until(process, lambda: out.read_bytes().count(b"\n") >= 2)
        process.send_signal(signal.SIGSTOP)  # however fast the engines are, they get no more to do meanwhile
        nodes.remove_node(other, allow_graceful=False)
        process.send_signal(signal.SIGCONT)
        _, told = process.communicate(timeout=PATIENCE_S)
    finally:
        if process is not None:
            process.kill()
        nodes.shutdown()
    assert process.returncode == 0, told
    assert "2 engines on Ray's nodes" in told and "150 of 150 lines are done, 0 failed" in told
    assert "an engine was lost" in told and "marked dead" in told
    assert answers(out) == answers(tmp_path / "alone.jsonl")


def test_an_engine_cannot_open_the_model(run_m2lite: Run, tmp_path: Path) -> None:
    """What it says is what one on this machine says, and where."""
    source, missing = write(tmp_path / "in.jsonl", 1, 5), tmp_path / "missing.gguf"
    done = run_m2lite("batch", source, "-o", tmp_path / "out.jsonl", "--model", missing, "--ray", "local")
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "The engine on " in lines[0] and f"cannot start: {missing} does not exist." in lines[0]
    assert not (tmp_path / "out.jsonl").exists()


def test_engines_that_would_answer_differently() -> None:
    one = {"model_identity": "a", "ctx": 4096, "m2lite": "1.0"}
    cluster._check_alike({"10.0.0.1": one, "10.0.0.2": dict(one)})
    for change, told in (
        ({"ctx": 2048}, r"10\.0\.0\.1 and 10\.0\.0\.2 differ: ctx 4096 and 2048\. Say --ctx"),
        ({"model_identity": "b"}, "model_identity a and b. Give them the same file"),
        ({"m2lite": "1.1"}, "m2lite 1.0 and 1.1. Install the same version"),
    ):
        with pytest.raises(UsageError, match=told):
            cluster._check_alike({"10.0.0.1": one, "10.0.0.2": one | change})


def test_no_cluster(run_m2lite: Run, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", 1, 5)
    done = run_m2lite("batch", source, "-o", tmp_path / "out.jsonl", "--ray", "127.0.0.1:1")
    assert done.returncode == 1 and "No Ray cluster at '127.0.0.1:1'" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out.jsonl").exists()
