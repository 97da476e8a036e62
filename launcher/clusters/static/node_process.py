"""The process of a machine's agent; that machine's command starts and watches it."""

from __future__ import annotations

import signal
import subprocess
from contextlib import suppress
from pathlib import Path

from launcher.clusters import detached_process, network
from launcher.clusters.static import nodes
from launcher.plan.run_dir import RunDir
from launcher.run_records import node_file

_MODULE = "launcher.worker.static.agent"


class NodeProcess:
    """The agent of machine `node`, which ends with this process."""

    def __init__(self, process: subprocess.Popen[bytes], run: RunDir, attempt: int, node: int, name: str) -> None:
        self._process = process
        self._run, self._attempt, self._node, self._name = run, attempt, node, name

    @classmethod
    def start(cls, run: RunDir, attempt: int, plan_path: Path, node: int, name: str) -> NodeProcess:
        """Start the agent from the run's code; its output goes to its log in the attempt's folder."""
        # Ctrl-C reaches only this process, which decides what it means.
        process = detached_process.start_module(
            run,
            _MODULE,
            [str(plan_path), str(attempt), str(node)],
            nodes.agent_log(run, attempt, node),
            {network.NODE_NAME_VARIABLE: name},
        )
        return cls(process, run, attempt, node, name)

    def poll(self) -> int | None:
        """Return the exit code, None while the agent runs. If it left no record, record its end for the other machines."""
        code = self._process.poll()
        if code is not None:
            self._record(code)
        return code

    def wait(self, deadline_s: float) -> None:
        """Wait for the agent to end; kill it after `deadline_s` seconds."""
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self.poll()

    def send_signal(self, number: int) -> None:
        """Send a signal unless the agent has ended."""
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _record(self, code: int) -> None:
        if node_file(self._run, self._attempt, self._node).is_file() or not self._run.attempt(self._attempt).is_dir():
            return
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code} and left no record"
        with suppress(OSError):
            if not nodes.lost_file(self._run, self._attempt, self._node).is_file():
                nodes.write_lost(self._run, self._attempt, self._node, f"the agent of {self._name} {how}")


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
