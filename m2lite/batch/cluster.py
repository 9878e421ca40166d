"""A batch on several machines: an engine in a Ray actor on each node, and a driver that hands out lines. Knows no file.

Only the driver writes results, so what holds for one machine holds here: a line counts when its result is on disk.
Lines of an engine that is lost are handed out again, and another engine takes its place.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from m2lite import __version__
from m2lite.batch.lines import Line
from m2lite.batch.runner import Runner, Tally, Write
from m2lite.engine.runner import Stop
from m2lite.engine.scheduler import Counts
from m2lite.engine.thread import Stopped
from m2lite.errors import M2liteError, UsageError

_WAIT_S = 0.5  # for a result, before an engine says that there is none
_CONNECT_S, _START_S = 5.0, 900.0  # to reach the cluster, and for every engine to open its model
_MOST_LOSSES = 3  # engines in a row that are lost before any of them has answered
_AHEAD = 2  # lines that an engine has at hand, for each that it answers at once


class RayEngine:
    """What runs in an actor: a model, and a thread that answers the lines that come."""

    def __init__(self, options: dict[str, Any], n_inflight: int) -> None:
        """`options`: of Model.open."""
        from m2lite.api import Model

        self._lines: queue.SimpleQueue[Line] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Mapping[str, Any], int]] = queue.SimpleQueue()
        self._error: BaseException | None = None
        try:
            model = Model.open(**options)
        except Exception as error:  # told by `facts`: of what is raised here, Ray would hand on a text
            self._error = error
            return
        self._runner = Runner(model, n_inflight)
        self._tally = Tally(0, self._runner.n_layers)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        def write(line: Mapping[str, Any], key: int) -> None:
            self._results.put((line, key))

        try:
            self._runner.run(self._come(), write, self._tally, lambda tally: None)
        except BaseException as error:  # told by `take`
            self._error = error

    def _come(self) -> Iterator[Line | None]:
        while True:
            try:
                yield self._lines.get_nowait()
            except queue.Empty:
                yield None

    def facts(self) -> dict[str, Any]:
        """As the runner's, once the model is open."""
        if self._error is not None:
            raise self._error
        return self._runner.facts | {"n_layers": self._runner.n_layers}

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

    node: str  # Ray's name of it
    address: str
    actor: Any
    starts: Any = None  # the call that tells that its model is open, until it has
    lines: dict[int, Line] = field(default_factory=dict)
    waits: Any = None
    counts: Counts = field(default_factory=Counts)
    n_lost: int = 0  # one after the other, without a result


class _Supply:
    """Lines to hand out: those that came back first."""

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines, self._back = lines, deque[Line]()
        self.is_empty = False  # known when one was asked for that is not there

    def take(self) -> Line | None:
        line = self._back.popleft() if self._back else next(self._lines, None)
        self.is_empty = line is None
        return line

    def give_back(self, lines: Iterable[Line]) -> None:
        self._back.extend(lines)
        self.is_empty = self.is_empty and not self._back


def share_out(places: Sequence[_Place], n_inflight: int) -> dict[int, list[Line]]:
    """What engines without a line get, by their place, when none is left: lines that others have not begun.

    Half of those of whom most are waiting for. Both answer them, the first answer counts, and no third gets them.
    """
    held = Counter(key for place in places for key in place.lines)
    given = dict[int, list[Line]]()
    for idle, place in enumerate(places):
        if place.lines:
            continue
        waiting = [[line for key, line in list(p.lines.items())[n_inflight:] if held[key] == 1] for p in places]
        most = max(waiting, key=len)
        if not most:
            break
        given[idle] = most[len(most) // 2 :]
        held.update(line.key for line in given[idle])
    return given


class Cluster:
    """Engines on the nodes of a Ray cluster."""

    def __init__(
        self, address: str, options: dict[str, Any], n_inflight: int, n_actors: int | None, tell: Callable[[str], None]
    ) -> None:
        """`address` is Ray's, or "local" for a cluster of this machine alone; by default one engine on each node.

        `tell` is called when an engine is lost.
        """
        self._ray = _connect(address, n_actors)
        self._options, self._n_inflight, self._tell = options, n_inflight, tell
        nodes = sorted((node["NodeID"], node["NodeManagerAddress"]) for node in self._ray.nodes() if node["Alive"])
        self._places = [self._place(*nodes[i % len(nodes)]) for i in range(n_actors or len(nodes))]
        self._lost = list[Counts]()  # what engines had done that are no more
        self._alone_since: float | None = None
        try:
            self._first, self._found = self._start_all()
        except BaseException:
            self.close()
            raise
        self.n_layers: int = self._found["n_layers"]
        self.facts = {name: value for name, value in self._found.items() if name != "n_layers"}

    def _start_all(self) -> tuple[str, dict[str, Any]]:
        """An engine's address, and what all say of their models once they are open.

        One that is lost meanwhile is replaced by `run`.
        """
        found = dict[str, dict[str, Any]]()
        deadline, lost = time.monotonic() + _START_S, ""
        for place in self._places:
            try:
                found[place.address] = self._ray.get(place.starts, timeout=max(0.0, deadline - time.monotonic()))
            except self._ray.exceptions.GetTimeoutError:
                raise M2liteError(
                    f"Not all of {self.n_engines} engines have started in {_START_S:g} s.", "Are there cores for them?"
                ) from None
            except self._ray.exceptions.RayTaskError as error:
                raise _failed(place, "cannot start", error.cause) from None
            except self._ray.exceptions.RayActorError as error:
                lost = str(error)
            else:
                place.starts = None
        if not found:
            raise M2liteError(f"No engine has started: {lost}.", "See Ray's log.")
        _check_alike({"this machine": {"m2lite": __version__}} | found)
        _check_alike(found)
        return next(iter(found.items()))

    @property
    def n_engines(self) -> int:
        return len(self._places)

    def _place(self, node: str, address: str) -> _Place:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = (
            self._ray.remote(RayEngine)
            .options(num_cpus=1, max_concurrency=2, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True))
            .remote(self._options, self._n_inflight)
        )
        return _Place(node, address, actor, actor.facts.remote())

    def run(self, lines: Iterator[Line], write: Write, tally: Tally, show: Callable[[Tally], None], stop: Stop) -> None:
        """Until no line is left; Stopped where `stop` says so. What is written by then is done."""
        supply = _Supply(lines)
        tally.began = time.monotonic()
        while True:
            if stop():
                raise Stopped
            ready = [place for place in self._places if place.starts is None]
            for place in ready:
                self._feed(place, supply)
            for idle, more in share_out(ready, self._n_inflight).items():
                self._hand(ready[idle], more)
            if supply.is_empty and not any(place.lines for place in ready):
                return
            self._check_that_any(ready)
            calls = {call: place for place in self._places for call in (place.starts, place.waits) if call is not None}
            answered, _ = self._ray.wait(list(calls), timeout=_WAIT_S)
            for call in answered:
                self._take(calls[call], call, supply, write, tally)
            n_most = tally.counts.n_most_running
            tally.counts = _sum([*self._lost, *(place.counts for place in self._places)])
            tally.counts.n_most_running = max(n_most, tally.counts.n_most_running)
            show(tally)

    def _feed(self, place: _Place, supply: _Supply) -> None:
        """As many lines as an engine should have at hand."""
        new = list[Line]()
        while len(place.lines) + len(new) < _AHEAD * self._n_inflight:
            line = supply.take()
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

    def _check_that_any(self, ready: list[_Place]) -> None:
        now = time.monotonic()
        if ready:
            self._alone_since = None
        elif self._alone_since is None:
            self._alone_since = now
        elif now - self._alone_since > _START_S:
            raise M2liteError(f"All engines are lost, and none has started in {_START_S:g} s.", "See Ray's log.")

    def _take(self, place: _Place, call: Any, supply: _Supply, write: Write, tally: Tally) -> None:
        """What an engine answered to a call: that it has started, or results."""
        exceptions, are_results = self._ray.exceptions, call == place.waits
        try:
            answer = self._ray.get(call)
        except exceptions.RayActorError as error:
            self._replace(place, supply, str(error))
            return
        except exceptions.RayTaskError as error:
            raise _failed(place, "failed" if are_results else "cannot start", error.cause) from None
        if are_results:
            place.waits = None
            self._collect(place, answer, write, tally)
            return
        place.starts = None
        _check_alike({f"{self._first} at the start": self._found, place.address: answer})

    def _collect(
        self, place: _Place, answer: tuple[list[tuple[Mapping[str, Any], int]], Counts], write: Write, tally: Tally
    ) -> None:
        found, place.counts = answer
        for result, key in found:
            place.n_lost = 0
            if key not in place.lines:  # it was handed out again, and another was quicker
                continue
            for each in self._places:
                each.lines.pop(key, None)
            write(result, key)
            tally.add(result)

    def _replace(self, place: _Place, supply: _Supply, why: str) -> None:
        """An engine is lost: its lines go to others now, and to the one that takes its place once that has started."""
        lost, place.lines, place.waits = place.lines, {}, None
        supply.give_back(line for key, line in lost.items() if not any(key in each.lines for each in self._places))
        place.counts.n_running = place.counts.n_most_running = 0
        self._lost.append(place.counts)
        place.counts, place.n_lost = Counts(), place.n_lost + 1
        if place.n_lost <= _MOST_LOSSES:
            n = len(lost)
            self._tell(f"an engine was lost ({place.address}), its {n:,} lines go to others; a new one is started")
            new = self._place(place.node, place.address)
            place.actor, place.starts = new.actor, new.starts
        elif len(self._places) > 1:
            self._tell(f"{place.n_lost} engines of {place.address} were lost one after the other; the others go on")
            self._places.remove(place)
        else:
            raise M2liteError(f"{place.n_lost} engines were lost one after the other: {why}.", "See Ray's log.")

    def close(self) -> None:
        self._ray.shutdown()


def _connect(address: str, n_actors: int | None) -> Any:
    """The package ray, connected."""
    try:
        import ray
    except ImportError:
        raise UsageError("--ray needs the package ray.", "pip install 'm2lite[ray]'.") from None
    _check_address(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address == "local":
            ray.init("local", num_cpus=n_actors or 1, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise M2liteError(f"No Ray cluster at {address!r}: {error}.", "Start one with: ray start --head.") from None
    return ray


def _failed(place: _Place, how: str, cause: Exception) -> M2liteError:
    """What an engine raised, with the machine's address and the cause's own exit code."""
    error = (
        cause if isinstance(cause, M2liteError) else M2liteError(f"{type(cause).__name__}: {cause}.", "See Ray's log.")
    )
    return error.located(f"The engine on {place.address} {how}")


_REMEDIES = {
    "ctx": "Say --ctx.",
    "m2lite": "Install the same version on all.",
    "template_date": "Set SOURCE_DATE_EPOCH to the same second on all.",
}  # other facts follow from the file


def _check_alike(found: Mapping[str, Mapping[str, Any]]) -> None:
    """What the engines say, by their addresses: they must answer alike. A UsageError says in what they do not."""
    (one, first), *others = found.items()
    for other, facts_of_other in others:
        names = [name for name in first if first[name] != facts_of_other.get(name)]
        if names:
            what = ", ".join(f"{name} {first[name]} and {facts_of_other.get(name)}" for name in names)
            todo = next((_REMEDIES[name] for name in names if name in _REMEDIES), "Give them the same file.")
            raise UsageError(f"The engines on {one} and {other} differ: {what}.", todo)


def _check_address(address: str) -> None:
    """Somebody listens there: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:  # local, auto, or a name that Ray knows
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise M2liteError(f"No Ray cluster at {address!r}: {error}.", "Start one with: ray start --head.") from None


def _sum(counts: Iterable[Counts]) -> Counts:
    total = Counts()
    for each in counts:
        for name, value in vars(each).items():
            setattr(total, name, getattr(total, name) + value)
    return total
