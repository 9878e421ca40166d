"""Experiments that m2lite makes on itself: which values of the table (simd/tuning.py) make it faster here.

Two settings take turns on the same tokens, in one process. A value is kept if all of the exact interval of the ratios'
median lies above 1 by more than the noise, which is what a setting shows against itself. Knows no file.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from time import monotonic, sleep

from m2lite import machine
from m2lite.bench import Test, read_plain, time_run
from m2lite.engine.model import Engine
from m2lite.engine.ratios import Ratio, is_won, may_win, noise_of, summary
from m2lite.engine.runner import Stop
from m2lite.engine.tuned import Change, Tuning
from m2lite.errors import UsageError
from m2lite.simd import tuning
from m2lite.simd.crowd import Used, busy_cores, processor_seconds
from m2lite.system.byte_units import format_speed

Values = Mapping[str, int]
Note = Callable[[str], None]

N_PAIRS = (5, 15, 45)  # one after the other, as long as a value may win and has not
_DECODE_S, _PROMPT_S = 0.2, 0.3  # of a run
_MOST_DECODE, _LEAST_PROMPT, _MOST_PROMPT = 256, 64, 512  # tokens
_WINDOW_S, _PATIENCE_S = 0.5, 60.0  # in which others must be quiet; for which that is waited for


class Ended(Exception):
    """Why no more is measured."""


def shown_ratio(ratio: Ratio) -> str:
    low, median, high = ratio
    return f"{median:.3f} [{low:.3f}, {high:.3f}]"


def shown_ratios(found: Mapping[str, Ratio]) -> str:
    return ", ".join(f"{work} {shown_ratio(ratio)}" for work, ratio in found.items())


class Experiments:
    """Runs of a model in pairs. `has_threads`: the number of threads is given, and is no parameter."""

    def __init__(self, model: Engine, note: Note, stop: Stop, seconds: float, has_threads: bool) -> None:
        self.model, self.note, self.stop, self.has_threads = model, note, stop, has_threads
        self._session = model.session()
        self._end = monotonic() + seconds
        self._n_pairs = 0
        self.tests: dict[str, Test] = {}
        self.noise: dict[str, float] = {}

    def begin(self, values: Values) -> None:
        """What is timed, and how well; `values` are in force."""
        for kind, work, n, seconds, most in (
            ("decode", "decode", 4, _DECODE_S, min(_MOST_DECODE, self.model.ctx - 2)),
            ("prefill", "prompt", _LEAST_PROMPT, _PROMPT_S, min(_MOST_PROMPT, self.model.ctx - 2)),
        ):
            test = Test(kind, min(n, most), 0)
            self._time(test, values, 0)
            each = self._time(test, values, 0) / test.n
            self.tests[work] = Test(kind, max(test.n, min(most, int(seconds / each))), 0)
            self.noise[work] = noise_of(self._ratios(work, values, values, N_PAIRS[-1]))
        shown = ", ".join(f"{work} of {t.n} tokens {self.noise[work]:.1%}" for work, t in self.tests.items())
        self.note(f"noise of a setting against itself, {N_PAIRS[-1]} pairs: {shown}")

    def compare(self, works: Iterable[str], before: Values, after: Values) -> dict[str, Ratio]:
        """How many times as fast as `before` is `after`: above 1, it is faster."""
        ratios, found = {work: list[float]() for work in works}, dict[str, Ratio]()
        for n in N_PAIRS:
            for work, each in ratios.items():
                each += self._ratios(work, before, after, n - len(each))
            found = {work: summary(each) for work, each in ratios.items()}
            if not may_win(found, self.noise) or (n > N_PAIRS[0] and is_won(found, self.noise)):
                break
        return found

    def gains(self, after: Values) -> dict[str, Ratio]:
        """Against the defaults."""
        return {work: summary(self._ratios(work, tuning.DEFAULTS, after, N_PAIRS[-1])) for work in self.tests}

    def use(self, values: Values) -> None:
        other_tiles = values["first_cache"] != tuning.VALUES["first_cache"]
        tuning.use(values)
        if other_tiles:
            self.model.runner.use_tiles()
        if not self.has_threads:
            self.model.runner.n_threads = tuning.n_threads(machine.n_usable_cores())

    def _ratios(self, work: str, before: Values, after: Values, n: int) -> list[float]:
        """Time before over time after, of n pairs that nobody disturbed."""
        found = list[float]()
        while len(found) < n:
            if monotonic() > self._end:
                raise Ended("the time is over")
            self._n_pairs += 1
            seed, seconds, pair = self._n_pairs, dict[int, float](), (before, after)
            began, used = monotonic(), processor_seconds()
            for i in (0, 1) if seed % 2 else (1, 0):
                seconds[i] = self._time(self.tests[work], pair[i], seed)
            if _others(began, used) is None:
                found.append(seconds[0] / seconds[1])
            elif (busy := wait_for_quiet(self.stop)) is not None:
                raise Ended(f"other programs use {busy:.1f} cores")
        return found

    def _time(self, test: Test, values: Values, seed: int) -> float:
        self.use(values)
        seconds = time_run(self._session, test, seed, seed, self.stop)
        if seconds is None:
            raise Ended("interrupted")
        return seconds


def _others(began: float, used: Used | None) -> float | None:
    """Cores that others have used since, where so many are not left to our threads; else None."""
    now = processor_seconds()
    return None if used is None or now is None else busy_cores(used, now, monotonic() - began)


def wait_for_quiet(stop: Stop) -> float | None:
    """None once other programs let us measure, or `stop` says so; the cores that they use if they stay busy."""
    given_up = monotonic() + _PATIENCE_S
    while not stop():
        began, used = monotonic(), processor_seconds()
        sleep(_WINDOW_S)
        busy = _others(began, used)
        if busy is None or monotonic() > given_up:
            return busy
    return None


def run_tune(
    model: Engine, known: Tuning, *, minutes: float, has_threads: bool, note: Note, stop: Stop,
    keep: Callable[[Tuning], None],
) -> Tuning:  # fmt: skip
    """Try the values of every parameter, beginning with those that are `known`; `keep` what is found at once."""
    if model.runner.stream is not None:
        raise UsageError(
            f"{model.path} does not fit into memory: the disk would be measured.", "Name a smaller model, or none."
        )
    if (busy := wait_for_quiet(stop)) is not None:
        raise UsageError(
            f"Other programs use {busy:.1f} of {machine.n_usable_cores()} cores: nothing can be measured.",
            "Try again when they have ended.",
        )
    model.wait_mapped(stop)
    speed = read_plain(model.n_threads)
    if known.changes and not known.is_of(speed):
        note(f"what is kept was found with memory of {format_speed(known.read_bytes_per_s)}: not used")
        known = Tuning()
    changes, gains = {change.name: change for change in known.changes}, dict[str, Ratio]()

    def found() -> Tuning:
        return Tuning(list(changes.values()), gains, speed, datetime.now(UTC).isoformat(timespec="seconds"))

    experiments = Experiments(model, note, stop, 60 * minutes, has_threads)
    try:
        experiments.begin(tuning.DEFAULTS | known.values)
        for row in tuning.PARAMETERS.values():
            if row.name == "threads_percent" and has_threads:
                continue
            best = list[Change]()
            try:
                _try_values(experiments, row, tuning.DEFAULTS | found().values, best)
            finally:
                for change in best:
                    note(f"{change.name} is {change.value:,} from now on")
                    changes.pop(change.name, None)
                    if change.value != tuning.DEFAULTS[change.name]:
                        changes[change.name] = change
                if best:
                    keep(found())
        if changes:
            gains |= experiments.gains(tuning.DEFAULTS | found().values)
            note(f"all together, against the defaults: {shown_ratios(gains)}")
            if not is_won(gains, experiments.noise):
                note("together they win nothing beyond the noise: the defaults are used")
                changes, gains = {}, {}
        keep(found())
    except Ended as why:
        note(f"not all was tried: {why}")
    experiments.use(tuning.DEFAULTS | found().values)
    return found()


def _try_values(experiments: Experiments, row: tuning.Parameter, before: Values, best: list[Change]) -> None:
    """`best` is what changes for the best value so far that wins against the one in force; empty if none does."""
    for values in _candidates(row, before):
        ratios = experiments.compare(row.works, before, {**before, **values})
        is_better = is_won(ratios, experiments.noise)
        shown = ", ".join(f"{name} {before[name]:,} -> {value:,}" for name, value in values.items())
        experiments.note(f"{shown}: {shown_ratios(ratios)}: {'wins' if is_better else 'no win'}")
        if is_better and (not best or _score(ratios) > _score(best[0].ratios)):
            best[:] = [Change(name, value, ratios) for name, value in values.items()]


def _candidates(row: tuning.Parameter, before: Values) -> Iterator[dict[str, int]]:
    """What may take the place of the values in force; of those that come to the same, one."""

    def acts(value: int) -> int:
        return tuning.share_of(machine.n_usable_cores(), value) if row.name == "threads_percent" else value

    tried = {acts(before[row.name])}
    for value in row.values:
        if acts(value) not in tried:
            tried.add(acts(value))
            yield {row.name: value}
            for name, others in row.beside.items():
                yield from ({row.name: value, name: other} for other in others if other != before[name])


def _score(ratios: Mapping[str, Ratio]) -> float:
    return statistics.geometric_mean([median for _, median, _ in ratios.values()])


def format_tuning(found: Tuning) -> list[str]:
    """For people: what differs from the defaults, and what that gains."""
    if not found.changes:
        return ["nothing that was tried is faster than the defaults"]
    lines = []
    for change in found.changes:
        row = tuning.PARAMETERS[change.name]
        lines.append(f"{row.name} {row.default:,} -> {change.value:,} ({row.about}): {shown_ratios(change.ratios)}")
    return [*lines, *([f"all together: {shown_ratios(found.gains)}"] if found.gains else [])]
