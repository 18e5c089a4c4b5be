from __future__ import annotations

import os
import signal
import threading

import pytest

from flexifed import stopping
from flexifed.stopping import stop_requests, uninterrupted


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_a_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop()
        send(number)
        assert stop()
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ONE_PRESS_S", 0.0)
    with stop_requests():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_signal_that_a_wrapper_forwards_does_not_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ONE_PRESS_S", 60.0)
    with stop_requests() as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)
        assert stop()


def test_a_second_sigterm_does_not_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "_ONE_PRESS_S", 0.0)
    with stop_requests() as stop:
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop()


def test_signals_are_ignored_where_they_would_leave_processes_behind() -> None:
    with uninterrupted():
        send(signal.SIGINT)
        send(signal.SIGTERM)


def test_outside_of_the_main_thread_no_stop_is_requested() -> None:
    answers: list[bool] = []

    def in_thread() -> None:
        with stop_requests() as stop:
            answers.append(stop())

    thread = threading.Thread(target=in_thread)
    thread.start()
    thread.join()
    assert answers == [False]
