from __future__ import annotations

import os
import signal
import threading

import pytest

from flexifed import stopping
from flexifed.stopping import stop_requests, uninterrupted


def press(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop()
        press(number)
        assert stop()
    assert signal.getsignal(number) == before


def test_ctrl_c_again_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ONE_PRESS_S", 0.0)
    with stop_requests():
        press(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            press(signal.SIGINT)


def test_what_a_wrapper_passes_on_is_the_same_press(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ONE_PRESS_S", 60.0)
    with stop_requests() as stop:
        press(signal.SIGINT)
        press(signal.SIGINT)
        assert stop()


def test_terminating_again_does_not_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ONE_PRESS_S", 0.0)
    with stop_requests() as stop:
        press(signal.SIGTERM)
        press(signal.SIGTERM)
        assert stop()


def test_signals_are_passed_over_where_they_would_leave_processes_behind() -> None:
    with uninterrupted():
        press(signal.SIGINT)
        press(signal.SIGTERM)


def test_outside_of_the_main_thread_nobody_asks() -> None:
    heard: list[bool] = []

    def elsewhere() -> None:
        with stop_requests() as stop:
            heard.append(stop())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert heard == [False]
