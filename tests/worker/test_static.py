"""What an agent does when the journal tells that another machine has failed or is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launcher.plan.run_dir import RunDir
from launcher.runs import journal
from launcher.runs.journal import FailureRecord, NodeEnded, NodeLost
from launcher.worker import static as module
from launcher.worker.static import Peers

FAILED = NodeEnded(node=1, first_failure=FailureRecord(3, "ValueError", "it failed"))


@pytest.mark.parametrize(
    "event, reason", [(FAILED, "rank 3: it failed"), (NodeLost(node=1, text="b was lost: no route"), "b was lost: no route")]
)
def test_ranks_are_killed_until_they_have_ended_once_another_machine_cannot_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: journal.Event, reason: str
) -> None:
    run, killed = RunDir(tmp_path), list[int]()
    run.attempt(1).mkdir(parents=True)
    peers = Peers(run, 1, 0, killed.append)
    journal.append(run, 1, NodeEnded(node=2))
    journal.append(run, 1, event)
    # Their own errors say more: they get a moment to fail by themselves.
    peers.look()
    assert (peers.num_ended, killed, peers.reason) == (2, [], "")
    monkeypatch.setattr(module, "_OWN_ERRORS_S", 0.0)
    peers.look()
    peers.look()
    assert (killed, peers.reason) == ([signal.SIGKILL] * 2, f"remote process exited: {reason}")
    journal.append(run, 1, NodeEnded(node=0))
    peers.look()
    assert (peers.num_ended, len(killed)) == (2, 2)
