"""Ctrl-C and SIGTERM as a request, so that work can stop where nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_ONE_PRESS_S = 0.5  # a wrapper such as `uv run` may pass on what the terminal has sent already


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Within this block the first Ctrl-C, or SIGTERM, is only noted; Ctrl-C after that raises KeyboardInterrupt.

    Yields:
        Whether there was one. Outside of the main thread, where Python takes no signals, there never is.
    """
    first: float | None = None

    def hear(signum: int, frame: Any) -> None:
        """Note the first signal; a later Ctrl-C stops at once."""
        nonlocal first
        now = time.monotonic()
        if first is None:
            first = now
        elif signum == signal.SIGINT and now - first > _ONE_PRESS_S:
            raise KeyboardInterrupt

    with _handled_by(hear):
        yield lambda: first is not None


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Within this block SIGTERM raises KeyboardInterrupt, also where Ray has made an exit of it."""

    def hear(signum: int, frame: Any) -> None:
        """As Python does at Ctrl-C."""
        raise KeyboardInterrupt

    try:
        with _handled_by(hear, signal.SIGTERM):
            yield
    except SystemExit as exiting:
        if exiting.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from exiting


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within this block Ctrl-C and SIGTERM are passed over: for what leaves processes behind if it is cut short."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextmanager
def _handled_by(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Ctrl-C and SIGTERM, or these signals, go to a handler."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers or (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
