"""A batch on several machines: an engine in a Ray actor on each node, and a driver that hands out lines. Knows no file.

Only the driver writes results, so what holds for one machine holds here: a line counts when its result is on disk.
Lines of an engine that is lost are handed out again, and another engine takes its place.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from m2lite.batch.lines import Line
from m2lite.batch.runner import Runner, Tally, Write, facts
from m2lite.decode.batch_rows import Counts
from m2lite.decode.compute import Stopped
from m2lite.decode.engine import Stop
from m2lite.errors import M2liteError, UsageError

_WAIT_S = 0.5  # for a result, before an engine says that there is none
_CONNECT_S, _START_S = 5.0, 900.0  # to reach the cluster, and for every engine to open its model
_MOST_LOSSES = 3  # engines in a row that are lost before any of them has answered
_AHEAD = 2  # lines that an engine has at hand, for each that it answers at once


class Engine:
    """What runs in an actor: a model, and a thread that answers the lines that come."""

    def __init__(self, options: dict[str, Any], n_inflight: int) -> None:
        """`options`: of Model.open."""
        from m2lite.decode.session import Model

        self._model = Model.open(**options)
        self._lines: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Mapping[str, Any], int]] = queue.SimpleQueue()
        self._tally = Tally(0, self._model.config.n_layers)
        self._error: BaseException | None = None
        runner = Runner(self._model, n_inflight, lambda line, key: self._results.put((line, key)), self._tally)
        self._thread = threading.Thread(target=self._run, args=(runner,), daemon=True)
        self._thread.start()

    def _run(self, runner: Runner) -> None:
        try:
            runner.run(self._come(), lambda tally: None)
        except BaseException as error:  # told by `take`
            self._error = error

    def _come(self) -> Iterator[Line | None]:
        while True:
            try:
                yield self._lines.get_nowait()
            except queue.Empty:
                yield None

    def facts(self) -> dict[str, Any]:
        return facts(self._model) | {"n_layers": self._model.config.n_layers}

    def put(self, lines: list[Line]) -> None:
        for line in lines:
            self._lines.put(line)

    def take(self) -> tuple[list[tuple[Mapping[str, Any], int]], Counts]:
        """The results that there are, after a while if there are none; and what was done so far."""
        if self._error is not None:
            raise self._error
        found = list[tuple[Mapping[str, Any], int]]()
        try:
            found.append(self._results.get(timeout=_WAIT_S))
            while True:
                found.append(self._results.get_nowait())
        except queue.Empty:
            return found, self._tally.counts


@dataclass
class _Place:
    """An engine of the cluster, the lines that it has, and the call that waits for its results."""

    node: str | None
    actor: Any
    lines: dict[int, Line] = field(default_factory=dict)
    waits: Any = None
    counts: Counts = field(default_factory=Counts)
    n_lost: int = 0


def share_out(places: Sequence[_Place], n_inflight: int, twice: set[int]) -> dict[int, list[Line]]:
    """What engines without a line get, by their place, when none is left: lines that others have not begun.

    Half of those of whom most are waiting for. Both answer them, and the first answer counts; `twice` are lines for
    which that holds already.
    """
    given = dict[int, list[Line]]()
    for idle, place in enumerate(places):
        if place.lines:
            continue
        waiting = [[line for key, line in list(p.lines.items())[n_inflight:] if key not in twice] for p in places]
        most = max(waiting, key=len)
        if not most:
            break
        given[idle] = most[len(most) // 2 :]
        twice.update(line.key for line in given[idle])
    return given


class Cluster:
    """Engines on the nodes of a Ray cluster."""

    def __init__(self, address: str, options: dict[str, Any], n_inflight: int, n_actors: int | None) -> None:
        """`address` is Ray's, or "local" for a cluster of this machine alone; by default one engine on each node."""
        try:
            import ray
        except ImportError:
            raise UsageError("--ray needs the package ray.", "pip install 'm2lite[ray]'.") from None
        _check_address(address)
        self._ray: Any = ray
        self._options, self._n_inflight = options, n_inflight
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "include_dashboard": False}
        try:
            if address == "local":
                ray.init(num_cpus=n_actors or 1, **quiet)
            else:
                quiet.pop("include_dashboard")
                ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise M2liteError(f"No Ray cluster at {address!r}: {error}.", "Start one with: ray start --head.") from None
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])
        n = n_actors or len(nodes)
        self._places = [self._place(nodes[i % len(nodes)]) for i in range(n)]
        found = self._facts()
        other = next((each for each in found if each != found[0]), None)
        if other is not None:
            self.close()
            raise UsageError(f"The nodes have different models: {found[0]} and {other}.", "Give them the same file.")
        self.n_layers: int = found[0].pop("n_layers")
        self.facts: dict[str, Any] = found[0]

    def _facts(self) -> list[dict[str, Any]]:
        """Of each engine, once it has opened its model."""
        ray = self._ray
        try:
            found: list[dict[str, Any]] = ray.get([p.actor.facts.remote() for p in self._places], timeout=_START_S)
        except ray.exceptions.GetTimeoutError:
            self.close()
            raise M2liteError(
                f"Not all of {self.n_engines} engines have started in {_START_S:g} s.", "Are there cores for them?"
            ) from None
        except ray.exceptions.RayError as error:
            self.close()
            raise M2liteError(f"An engine cannot start: {error}.", "Is the model at this path on each node?") from None
        return found

    @property
    def n_engines(self) -> int:
        return len(self._places)

    def _place(self, node: str | None) -> _Place:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = "DEFAULT" if node is None else NodeAffinitySchedulingStrategy(node, soft=True)
        actor = (
            self._ray.remote(Engine)
            .options(num_cpus=1, max_concurrency=2, scheduling_strategy=strategy)
            .remote(self._options, self._n_inflight)
        )
        return _Place(node, actor)

    def run(self, lines: Iterator[Line], write: Write, tally: Tally, show: Callable[[Tally], None], stop: Stop) -> None:
        """Until no line is left; Stopped where `stop` says so. What is written by then is done."""
        ray, again, twice = self._ray, deque[Line](), set[int]()
        tally.began = time.monotonic()
        while True:
            if stop():
                raise Stopped
            for place in self._places:
                self._feed(place, again, lines)
            for idle, more in share_out(self._places, self._n_inflight, twice).items():
                self._hand(self._places[idle], more)
            waiting = [place.waits for place in self._places if place.waits is not None]
            if not waiting:
                return
            ready, _ = ray.wait(waiting, timeout=_WAIT_S)
            for place in self._places:
                if place.waits in ready:
                    self._collect(place, again, write, tally)
            tally.counts = _sum(place.counts for place in self._places)
            show(tally)

    def _feed(self, place: _Place, again: deque[Line], lines: Iterator[Line]) -> None:
        """As many lines as an engine should have at hand."""
        new = list[Line]()
        while len(place.lines) + len(new) < _AHEAD * self._n_inflight:
            line = again.popleft() if again else next(lines, None)
            if line is None:
                break
            new.append(line)
        self._hand(place, new)

    def _hand(self, place: _Place, new: list[Line]) -> None:
        """An engine gets these lines, and is asked for results as long as it has any."""
        if new:
            place.lines |= {line.key: line for line in new}
            place.actor.put.remote(new)
        if place.lines and place.waits is None:
            place.waits = place.actor.take.remote()

    def _collect(self, place: _Place, again: deque[Line], write: Write, tally: Tally) -> None:
        """The results of an engine; if it is lost, its lines are to be done again by whoever is there."""
        waits, place.waits = place.waits, None
        try:
            found, place.counts = self._ray.get(waits)
        except self._ray.exceptions.RayActorError as error:
            place.n_lost += 1
            if place.n_lost > _MOST_LOSSES:
                raise M2liteError(
                    f"{place.n_lost} engines were lost one after the other: {error}.", "See Ray's log."
                ) from None
            lost, place.lines = place.lines, {}
            again.extend(line for key, line in lost.items() if not any(key in each.lines for each in self._places))
            place.actor = self._place(place.node).actor
            return
        except self._ray.exceptions.RayTaskError as error:
            raise M2liteError(f"An engine failed: {error.cause}.", "See Ray's log.") from None
        for result, key in found:
            place.n_lost = 0
            if key not in place.lines:  # it was handed out again, and another was quicker
                continue
            for each in self._places:
                each.lines.pop(key, None)
            write(result, key)
            tally.n_tokens += _n_tokens(result)
            tally.add(result["error"] is not None)

    def close(self) -> None:
        self._ray.shutdown()


def _check_address(address: str) -> None:
    """Somebody listens there: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # local, auto, or a name that Ray knows
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise M2liteError(f"No Ray cluster at {address!r}: {error}.", "Start one with: ray start --head.") from None


def _n_tokens(result: dict[str, Any]) -> int:
    response = result["response"]
    return int(response["body"]["usage"]["completion_tokens"]) if response else 0


def _sum(counts: Iterator[Counts]) -> Counts:
    total = Counts()
    for each in counts:
        for name, value in vars(each).items():
            setattr(total, name, getattr(total, name) + value)
    return total
