"""Work that may hang, bounded in time: aside, on a thread; or a command, which leaves no process behind. Knows no tool.

A thread that hangs in the system cannot be stopped: it is left alone, and ends with m2lite at the latest.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from m2lite.engine.runner import Stop

_POLL_S = 0.1  # between two looks at whether to stop
_GRACE_S = 2.0  # for the thread to end by itself once it is to stop
_MOST_AFTER = 1 << 20  # bytes that are still read when the command has ended: what a pipe holds
_ROUNDS = 10  # of looking for processes that are left: one may have begun another meanwhile
# Processes that a command began inherit this variable, in whatever session or group they are.
_MARK = "_M2LITE_COMMAND"


class TooLong(Exception):
    """The work is not done, and may go on: a phrase that says why nobody waits for it."""


def aside(work: Callable[[Stop], str], seconds: float, stop: Stop) -> str:
    """What `work` gives back, on a thread of its own; what it gets says when it is to stop.

    TooLong if it does not, `_GRACE_S` after its time is over or `stop` said so.
    """
    done: queue.SimpleQueue[tuple[str, BaseException | None]] = queue.SimpleQueue()
    is_left = threading.Event()

    def run() -> None:
        try:
            done.put((work(lambda: is_left.is_set() or stop()), None))
        except BaseException as error:
            done.put(("", error))

    thread = threading.Thread(target=run, name="m2lite-tool", daemon=True)
    thread.start()
    ends, is_stopped = time.monotonic() + seconds + _GRACE_S, False
    try:
        while True:
            if stop() and not is_stopped:
                ends, is_stopped = min(ends, time.monotonic() + _GRACE_S), True
            try:
                text, error = done.get(timeout=_POLL_S)
            except queue.Empty:
                if time.monotonic() >= ends:
                    raise TooLong("stopped by the user" if is_stopped else f"not done after {seconds:g} s") from None
                continue
            if error is not None:
                raise error
            return text
    except BaseException:  # Ctrl-C twice too: what was begun is ended
        is_left.set()
        thread.join(_GRACE_S)
        raise


def run_command(command: list[str], directory: Path, seconds: float, most: int, stop: Stop) -> tuple[bytes, int, str]:
    """The first `most` bytes of what the command prints, errors included, how many there were, and how it ended if
    not well.

    No process that it began is left, but those that hid their origin. OSError if it cannot be begun.
    """
    with none_left() as env:
        process = subprocess.Popen(
            command, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True, env=env,
        )  # fmt: skip
        assert process.stdout is not None
        ends = time.monotonic() + seconds
        try:
            head, n_bytes, why = _listen(process, process.stdout.fileno(), ends, most, stop)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the system, where no signal reaches it
                process.wait(_GRACE_S)
    if why == "time":
        why = f"stopped after {seconds:g} s"
    elif not why and process.returncode:
        why = f"exit code {process.returncode}"
    return head, n_bytes, why


def _listen(process: subprocess.Popen[bytes], fd: int, ends: float, most: int, stop: Stop) -> tuple[bytes, int, str]:
    """Read until the process has ended; a child that goes on in the background may hold the pipe for ever."""
    head, n_bytes, left = bytearray(), 0, _MOST_AFTER
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while True:
            if stop():
                return bytes(head), n_bytes, "stopped by the user"
            if time.monotonic() >= ends:
                return bytes(head), n_bytes, "time"
            has_ended = process.poll() is not None
            if not selector.get_map():  # it has closed its output
                if has_ended:
                    return bytes(head), n_bytes, ""
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
            elif selector.select(0 if has_ended else _POLL_S):
                data = os.read(fd, 1 << 16)
                n_bytes += len(data)
                head += data[: max(0, most - len(head))]
                left -= len(data) if has_ended else 0
                if left <= 0:
                    return bytes(head), n_bytes, ""
                if not data:
                    selector.unregister(fd)
            elif has_ended:
                return bytes(head), n_bytes, ""


@contextlib.contextmanager
def none_left() -> Iterator[dict[str, str]]:
    """An environment for processes. None that is begun with it is left at the end, nor any that those began."""
    mark = f"{os.environ.get(_MARK, '')}:{secrets.token_hex(16)}"
    try:
        yield os.environ | {_MARK: mark}
    finally:
        _kill_marked(mark)


def _kill_marked(mark: str) -> None:
    """End every process that has the mark in its environment."""
    import psutil

    for _ in range(_ROUNDS):
        found = 0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if mark in process.environ().get(_MARK, ""):
                    process.kill()
                    found += 1
        if not found:
            return
