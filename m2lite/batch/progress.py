"""How far a batch is: a line on a terminal, elsewhere one every half minute, and what it came to. Knows a tally."""

from __future__ import annotations

import io
import time
from itertools import pairwise
from pathlib import Path

from m2lite.batch.runner import Tally
from m2lite.errors import UsageError
from m2lite.storage.durable import atomic_write
from m2lite.system.byte_units import format_bytes
from m2lite.system.streams import STDERR, note

EVERY_S = 30.0
_DRAWN_S = 0.25  # between two looks on a terminal
_POINT_S = 1.0  # between two points of the plot, at first
_MOST_POINTS = 2000


class Show:
    """Tells how far the run is, and notes the speed for a plot."""

    def __init__(self) -> None:
        self._is_terminal = STDERR.is_terminal
        self._shown_at = time.monotonic()
        self._point_s = _POINT_S
        self.points: list[tuple[float, int, int]] = []  # seconds, tokens drawn, answers at once

    def __call__(self, tally: Tally) -> None:
        now = time.monotonic()
        if not self.points or tally.seconds - self.points[-1][0] >= self._point_s:
            self._add_point(tally)
            if len(self.points) > _MOST_POINTS:
                self.points, self._point_s = self.points[::2], 2 * self._point_s
        if now - self._shown_at < (_DRAWN_S if self._is_terminal else EVERY_S):
            return
        self._shown_at = now
        if self._is_terminal:
            STDERR.rewrite(describe(tally))
        else:
            note(describe(tally))

    def _add_point(self, tally: Tally) -> None:
        self.points.append((tally.seconds, tally.counts.n_drawn, tally.counts.n_running))

    def end(self, tally: Tally) -> None:
        """The last point of the plot; the terminal is as it was."""
        self._add_point(tally)
        if self._is_terminal:
            STDERR.rewrite()


def describe(tally: Tally) -> str:
    """`12 done, 1 failed of 500 · 31.2 tok/s · 16 at once · 3.1 experts a token · 12:40 left, until 04:31`."""
    failed = f", {tally.n_failed:,} failed" if tally.n_failed else ""
    parts = [f"{tally.n_done:,} done{failed} of {tally.n_total:,}", f"{tally.tokens_per_s:.1f} tok/s"]
    parts.append(f"{tally.counts.n_running} at once")
    if tally.experts_per_token is not None:
        parts.append(f"{tally.experts_per_token:.1f} experts a token")
    if tally.left_s is not None:
        ends = time.localtime(time.time() + tally.left_s)
        day = "%H:%M" if tally.left_s < 12 * 3600 else "%a %H:%M"
        parts.append(f"{_clock(tally.left_s)} left, until {time.strftime(day, ends)}")
    return " · ".join(parts)


def summary(tally: Tally) -> str:
    counts = tally.counts
    here = tally.n_done + tally.n_failed - tally.n_before
    done = f"{tally.n_done:,} of {tally.n_total:,} lines are done, {tally.n_failed:,} failed"
    if not here:
        return f"{done}; nothing was left to do" if tally.n_done + tally.n_failed >= tally.n_total else done
    lines = [
        done + (f"; {tally.n_before:,} of all these earlier" if tally.n_before else ""),
        f"this run: {here:,} lines in {_clock(tally.seconds)}, {tally.n_tokens:,} tokens of answers, "
        f"{tally.tokens_per_s:.1f} tok/s, up to {counts.n_most_running} at once",
        f"prompts: {counts.n_prompt:,} tokens computed, {counts.n_cached:,} in the prefix cache",
    ]
    if counts.n_preempted:
        again = f"{counts.n_recomputed:,} tokens computed again"
        lines.append(f"{counts.n_preempted:,} answers preempted for want of room, {again}")
    if any(tally.kv_bytes):
        n_written, n_read = map(format_bytes, tally.kv_bytes)
        lines.append(f"prompts on disk (--kv-disk): {n_written} written, {n_read} read")
    if counts.n_drafts:
        lines.append(
            f"drafts: {counts.n_drafts:,} verified, {counts.n_accepted / counts.n_drafts:.0%} right; "
            f"{counts.n_steps:,} calls of the model"
        )
    if tally.experts_per_token is not None:
        lines.append(f"experts read in a layer: {tally.experts_per_token:.2f} for each token that went through it")
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{whole:02}" if minutes >= 60 else f"{minutes}:{whole:02}"


def check_plot(path: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs the package matplotlib.", "pip install 'm2lite[plot]'.")
    if path.suffix != ".png":
        raise UsageError(f"--plot {path}: the name of a picture ends in .png.", "Name it so.")


def plot(points: list[tuple[float, int, int]], path: Path) -> None:
    """Tokens a second and answers at once, over the run's time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    times = [t for t, _, _ in points]
    speeds = [(b[1] - a[1]) / max(b[0] - a[0], 1e-9) for a, b in pairwise(points)]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    axes.step(times[1:], speeds, where="pre", linewidth=1.2, label="tokens/s")
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens/s of all answers")
    axes.set_ylim(bottom=0)
    other = axes.twinx()
    other.step(times, [n for _, _, n in points], where="post", linewidth=0.8, color="0.6", label="answers at once")
    other.set_ylabel("answers at once")
    other.set_ylim(bottom=0)
    figure.legend(loc="upper right")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    atomic_write(path, picture.getbuffer(), mode=0o644)
