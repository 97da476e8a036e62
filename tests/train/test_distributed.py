"""What ranks exchange, and which other processes can reach it."""

from __future__ import annotations

import socket
from datetime import timedelta
from pathlib import Path

import pytest
from forked_ranks import RankServer

from launcher.distributed import open_store

pytestmark = pytest.mark.rest


def test_ranks_share_results_and_failures_without_pickles(rank_server: RankServer, tmp_path: Path) -> None:
    first, second = rank_server.values("train_ranks:share_without_pickles", [[], []], tmp_path)
    assert first == second
    damaged = ["DamagedCheckpoint", [["é is damaged", "x", "1", "repair it"]]]
    assert first == [
        [{"rank": 0, "text": ""}, {"rank": 1, "text": "a"}],
        ["é", 0],
        damaged,
        ["CheckpointError", [["not read", "/gone/away", "No such file or directory", ""]]],
        ["CheckpointError", [["not computed", "rank 0", "ZeroDivisionError: division by zero", ""]]],
        "a rank gave a value that is not JSON: rank 0: TypeError: Object of type set is not JSON serializable",
        ["CheckpointError", [["not written", "rank 1, /disk", "Input/output error", ""]]],
        damaged,
    ]


def test_a_store_is_reached_at_its_address_alone() -> None:
    store = open_store("127.0.0.1", 0, is_server=True)
    member = open_store("127.0.0.1", store.port, is_server=False, timeout=timedelta(seconds=30))
    member.set("key", "value")
    assert store.get("key") == b"value"
    # 127.0.0.2 is also this machine, so a server bound to all interfaces would answer here.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port), timeout=10).close()
    with pytest.raises(OSError, match="in use"):
        open_store("127.0.0.1", store.port, is_server=True)
