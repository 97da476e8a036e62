"""A second Ctrl-C does not interrupt the cleanup that the first one started."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from launcher.clusters.node_command import uninterrupted


@pytest.fixture
def another_thread() -> Iterator[None]:
    """A second thread that the kernel may deliver a signal to, like the threads that read a command's output."""
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
def test_signals_take_effect_after_the_cleaning_up() -> None:
    cleaned: list[int] = []

    def clean() -> None:
        with uninterrupted():
            for number in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
                cleaned.append(number)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        clean()
    assert cleaned == [0, 1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_cleaning_up_in_another_thread_is_carried_out() -> None:
    cleaned = []

    def clean() -> None:
        with uninterrupted():
            cleaned.append(1)

    thread = threading.Thread(target=clean)
    thread.start()
    thread.join()
    assert cleaned == [1]
