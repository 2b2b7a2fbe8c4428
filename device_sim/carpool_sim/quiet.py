"""Flower's and Ray's talk goes to a file in the run's folder, and Ctrl-C stops between steps."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

LOG_NAME = "flower.log"

_LOGGERS = ("flwr", "ray", "carpool_server")


@contextmanager
def logs_to(path: Path) -> Iterator[None]:
    """Sends the libraries' log records to ``path`` (appending) instead of the terminal."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    file.setLevel(logging.INFO)
    before = []
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        before.append((logger, logger.handlers[:], logger.propagate))
        logger.handlers, logger.propagate = [file], False
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        file.close()


@contextmanager
def stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Turns the first Ctrl-C (or SIGTERM) into ``stop``; a second one interrupts at once.

    Flower's engine waits for its worker threads when it is interrupted, and they wait for the
    coordinator: asked through ``stop``, the coordinator ends first and everything follows.
    Outside the main thread, where Python allows no handlers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()
        restore()

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
