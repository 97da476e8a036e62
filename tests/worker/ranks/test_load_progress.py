"""What counts as progress of ranks that load the model, here and on other nodes."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from launcher.worker.ranks import watchdog
from launcher.worker.ranks.heartbeat import Beat
from launcher.worker.ranks.watchdog import LoadProgress, SharedProgress, count_bytes

NOW = 100_000.0
FORK = multiprocessing.get_context("fork")


def rank(pid: int) -> Beat:
    """A rank that joined long ago and has not started to train."""
    return Beat(500, pid, 0, "joined", 0, NOW - 500, False)


def test_reading_and_touching_memory_are_progress(tmp_path: Path) -> None:
    progress, here = LoadProgress(), rank(os.getpid())
    assert progress.update({0: here}, NOW)[0].at == NOW
    assert progress.update({0: here}, NOW + 1)[0].at == NOW, "nothing was read since"
    (tmp_path / "weights").write_bytes(bytes(2 << 20))
    (tmp_path / "weights").read_bytes()
    assert progress.update({0: here}, NOW + 2)[0].at == NOW + 2
    trained = dataclasses.replace(here, trained=True)
    assert progress.update({0: trained}, NOW + 3) == {0: trained}
    assert count_bytes(2**22 + 1) == 0


def test_a_head_node_that_is_gone_says_nothing_of_the_other_ranks_until_it_answers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import TCPStore

    monkeypatch.setattr(watchdog, "_RETRY_S", 0.1)
    store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    port = store.port
    shared, until = SharedProgress(TCPStore("127.0.0.1", port, None, False), 0.01), time.monotonic() + 60
    began = shared.changed_at
    while shared.changed_at == began:
        shared.report()
        assert time.monotonic() < until
    del store
    while shared.changed_at < math.inf:
        assert time.monotonic() < until
        time.sleep(0.01)
    again = TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    while shared.changed_at == math.inf:
        assert time.monotonic() < until, "the nodes tell each other of their progress again"
        time.sleep(0.01)
    assert again.check(["load_progress"])
    shared.stop()
