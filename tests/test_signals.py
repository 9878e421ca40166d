"""Signals as a flag, in a process of their own where they would end it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from m2lite.signals import StopFlag, exit_on_terminate, leave_afterwards, stop_on_signals
from tests.children import default_signals, ignored_signals

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    with default_signals():
        yield


def test_first_signal_sets_the_flag() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert (stop(), stop.exit_code) == (False, 0)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop(), stop.exit_code, stop.terminated) == (True, 130, False)
    assert signal.getsignal(signal.SIGINT) is before


def test_second_signal_raises() -> None:
    with stop_on_signals(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_termination_wins() -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.exit_code, stop.terminated) == (143, True)


def test_other_threads_have_no_signals() -> None:
    flags: list[StopFlag] = []

    def run() -> None:
        with stop_on_signals() as stop:
            flags.append(stop)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not flags[0]()


def test_exit_on_terminate() -> None:
    exit_on_terminate()
    with pytest.raises(SystemExit) as left:
        os.kill(os.getpid(), signal.SIGHUP)
    assert left.value.code == 143


def test_what_was_ignored_stays_so() -> None:
    """As nohup and a shell's & leave it; SIGTERM counts always."""
    with ignored_signals(signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        exit_on_terminate()
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.exit_code == 143
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)


def test_an_event_loop_is_asked_and_nothing_raised_in_it() -> None:
    asked: list[bool] = []
    with pytest.raises(SystemExit) as left, leave_afterwards(lambda: asked.append(True)) as is_asked:
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [True] and is_asked()
        raise EOFError  # what the loop ends with
    assert left.value.code == 143
    with leave_afterwards(lambda: None) as is_asked:
        assert not is_asked()
