"""Waiting for somebody else's server, and only so long."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as OutOfTime
from threading import Thread
from typing import TypeVar

from guardedit.errors import TrackingError

T = TypeVar("T")


def is_server(uri: str | None) -> bool:
    """Whether MLflow is reached over a network, and not in a file."""
    return uri is not None and uri.startswith(("http://", "https://"))


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` gives, or raises; TrackingError where that takes longer. It then goes on, and ends with the process.

    Each request to a server has its own time limit; a server that answers thirty of them slowly would still hold a
    command up for minutes.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised where somebody waits for it
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return found.result(seconds)
    except OutOfTime as error:
        if found.done():
            raise
        raise TrackingError(f"MLflow did not finish within {seconds:g} s") from error
