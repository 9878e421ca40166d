"""Signals as a flag, in a process of their own where they would end it."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from m2lite.signals import StopFlag, exit_on_terminate, stop_on_signals

pytestmark = pytest.mark.slow  # not in the fast ring: it starts processes, or searches long


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
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        exit_on_terminate()
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGHUP)
        assert left.value.code == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
