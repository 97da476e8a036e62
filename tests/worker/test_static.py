"""What an agent does when its command tells it that the agent of another machine has ended."""

from __future__ import annotations

import io
import json
import signal
import sys
import time
from dataclasses import asdict

import pytest

from launcher.clusters.static_meeting import AGENT_END, MeetingMessage
from launcher.worker import static as module
from launcher.worker.static import Peers


@pytest.mark.parametrize("is_lost", [True, False])
def test_ranks_are_killed_until_they_have_ended_once_another_machine_cannot_go_on(
    monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    monkeypatch.setattr(module, "_LOST_S" if is_lost else "_FAILED_S", 0.3)
    monkeypatch.setattr(module, "_KILL_EVERY_S", 0.05)
    ends = [MeetingMessage(AGENT_END, "", 2), MeetingMessage(AGENT_END, "rank 1: it failed", 1, is_lost=is_lost)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(asdict(end)) + "\n" for end in ends)))
    killed: list[int] = []
    peers = Peers(killed.append).start()
    until = time.monotonic() + 20
    while len(killed) < 2 and time.monotonic() < until:
        # Their own errors say more: they get a moment to fail by themselves.
        assert bool(killed) == bool(peers.reason) or not killed
        time.sleep(0.01)
    assert set(killed) == {signal.SIGKILL}
    assert peers.reason == "remote process exited: rank 1: it failed"
    assert peers.ends == {end.node: end for end in ends}
    peers.ranks_ended.set()
    time.sleep(0.2)
    count = len(killed)
    time.sleep(0.2)
    assert len(killed) == count


def test_ranks_that_end_by_themselves_are_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LOST_S", 0.2)
    line = json.dumps(asdict(MeetingMessage(AGENT_END, "b was lost", 1, is_lost=True)))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{line}\n"))
    killed: list[int] = []
    peers = Peers(killed.append)
    peers.ranks_ended.set()
    peers.start()
    time.sleep(0.4)
    assert (killed, peers.reason) == ([], "")
