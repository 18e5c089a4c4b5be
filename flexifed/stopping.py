"""Ctrl-C and SIGTERM as stop requests, so that work stops at a point where nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_ONE_PRESS_S = 0.5  # a wrapper such as `uv run` may forward a signal that the terminal has already sent to this process


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """In this block, the first Ctrl-C or SIGTERM is only recorded; a later Ctrl-C raises KeyboardInterrupt.

    Yields:
        A function that tells whether a stop was requested. Outside of the main thread, where Python handles no signals,
        it always returns False.
    """
    requested: float | None = None

    def handle(signum: int, frame: Any) -> None:
        """Record the first signal; interrupt at a later Ctrl-C."""
        nonlocal requested
        now = time.monotonic()
        if requested is None:
            requested = now
        elif signum == signal.SIGINT and now - requested > _ONE_PRESS_S:
            raise KeyboardInterrupt

    with _signals_handled_by(handle):
        yield lambda: requested is not None


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """In this block, SIGTERM raises KeyboardInterrupt, even if Ray's own handler turns it into SystemExit."""

    def handle(signum: int, frame: Any) -> None:
        """Do what Python does at Ctrl-C."""
        raise KeyboardInterrupt

    try:
        with _signals_handled_by(handle, signal.SIGTERM):
            yield
    except SystemExit as exiting:
        if exiting.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from exiting


@contextmanager
def uninterrupted() -> Iterator[None]:
    """In this block, Ctrl-C and SIGTERM are ignored: for steps that would leave processes behind if interrupted."""
    with _signals_handled_by(signal.SIG_IGN):
        yield


@contextmanager
def _signals_handled_by(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """In this block, `handler` handles these signals; if none are given, Ctrl-C and SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler_before in previous.items():
            signal.signal(number, handler_before)
