"""The memory limit of a process around a block of code."""

from __future__ import annotations

import resource
import threading

from launcher.security.memory_limit import bounded_memory


def test_blocks_in_two_threads_leave_the_limit_as_it_was() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    inside, leave = [threading.Event(), threading.Event()], [threading.Event(), threading.Event()]

    def hold(number: int) -> None:
        with bounded_memory(1 << 33):
            inside[number].set()
            leave[number].wait(60)

    threads = [threading.Thread(target=hold, args=(number,)) for number in range(2)]
    threads[0].start()
    assert inside[0].wait(60)
    threads[1].start()
    # Enough time for the second thread to enter if it did not wait for the first.
    inside[1].wait(0.3)
    for thread, event in zip(threads, leave, strict=True):
        event.set()
        thread.join(60)
        assert not thread.is_alive()
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
