"""What an agent watches for while its ranks run: a cancel request, and failed machines of the attempt."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from launcher import run_records
from launcher.clusters.static import nodes
from launcher.errors import LauncherError
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.worker.signals import CANCEL

_LOOK_S = 0.5
_CANCEL_GAP_S = 0.3
# How long the ranks may take to fail by themselves once another machine has failed: their own errors say more.
_FAILED_S, _LOST_S = 30.0, 10.0


class Peers:
    """Watches the run directory from a thread, and writes this machine's heartbeat to it.

    Once the ranks cannot go on, `kill_ranks` is called repeatedly until `stop`; `why_ended` then returns why. `heartbeats` is the
    watch over all machines of the attempt.
    """

    def __init__(self, run: RunDir, attempt: int, record: Attempt, node: int, kill_ranks: Callable[[int], None]) -> None:
        self._run, self._attempt, self._record, self._node = run, attempt, record, node
        self._kill_ranks = kill_ranks
        self.heartbeats = nodes.HeartbeatWatch(run, attempt, record)
        self._num_cancels = 0
        self._reason = ""
        self._failed_at: dict[int, float] = {}
        self._written_at = -1e9
        self._watches_peers = True
        self._ended = threading.Event()

    def start(self) -> Peers:
        self._write_alive()
        threading.Thread(target=self._watch, name="peers", daemon=True).start()
        return self

    def ranks_have_ended(self) -> None:
        """Stop killing ranks; the heartbeat continues."""
        self._watches_peers = False

    def stop(self) -> None:
        self._ended.set()

    def why_ended(self) -> str:
        """Return why the ranks were killed; empty if they were not."""
        return self._reason

    def _watch(self) -> None:
        while not self._ended.wait(_LOOK_S):
            if time.monotonic() - self._written_at > nodes.INTERVAL_S:
                self._write_alive()
            # Storage may fail for a while; no machine is judged by unreadable files.
            with suppress(OSError, LauncherError):
                self._look_for_cancel()
                if self._watches_peers and len(self._record.nodes) > 1:
                    self._look_at_peers()
            if self._reason and self._watches_peers:
                self._kill_ranks(signal.SIGKILL)

    def _write_alive(self) -> None:
        with suppress(OSError):
            nodes.write_alive(self._run, self._attempt, self._node, self._record.nodes[self._node])
            self._written_at = time.monotonic()

    def _look_for_cancel(self) -> None:
        """Turn a cancel request into the signals that a person would send to this process."""
        request = run_records.read_cancel(self._run, self._attempt)
        wanted = 0 if request is None else 1 if request.save else 2
        while self._num_cancels < wanted:
            # Two identical signals that are pending at the same time are delivered as one.
            while self._num_cancels and CANCEL in signal.sigpending():
                time.sleep(_CANCEL_GAP_S)
            os.kill(os.getpid(), CANCEL)
            self._num_cancels += 1

    def _look_at_peers(self) -> None:
        if time.monotonic() - self._written_at > 2 * nodes.INTERVAL_S + _LOOK_S:
            # Storage did not accept this machine's own heartbeat, so the other machines may not be able to write theirs.
            return
        states = self.heartbeats.look()
        now = time.monotonic()
        for node, state in enumerate(states):
            if node == self._node:
                continue
            reason, patience_s = state.lost, _LOST_S
            if state.ended:
                record, patience_s = run_records.read_node(self._run, self._attempt, node), _FAILED_S
                failure = None if record is None else record.first_failure
                reason = f"{state.name}: {failure.line}" if failure is not None else ""
            if not reason:
                self._failed_at.pop(node, None)
                continue
            # Worded so that failure_record.PEER_LOST matches: the failure of this machine's ranks is a consequence.
            if now - self._failed_at.setdefault(node, now) > patience_s:
                self._reason = self._reason or f"remote process exited: {reason}"
