"""The backend for machines that all run the same command. Each command starts its own machine's agent.

`train` and `resume` are in launcher.cli.every_node. Methods that need no meeting work on any machine that sees the run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import clock
from launcher.clusters import detached_process, local, network
from launcher.clusters.backends import Cluster
from launcher.clusters.static_meeting import AGENT_END, Meeting, MeetingMessage
from launcher.errors import LauncherError, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.journal import read_node

if TYPE_CHECKING:
    from launcher.plan.launch_plan import LaunchPlan

REPEAT = "repeat the command on every machine to continue"
_END_DEADLINE_S = 60.0
_AGENT = "launcher.worker.static"
_LOOK_S = 0.2
# A line that is written to a pipe at once (PIPE_BUF); the text of a failure may be longer.
_MAX_TEXT = 1000


class StaticCluster(Cluster):
    """Machines that all run the same command; see `Cluster`. `process` is the agent that this command started."""

    drill_remedy = "start a short run, and kill the command on one machine, or send it TERM"

    def __init__(self, meeting: Meeting | None = None) -> None:
        self._meeting = meeting
        self.process: NodeProcess | None = None

    def check(self, plan: LaunchPlan) -> None:
        """Reject what this machine cannot run, since the others are like it; with a meeting, wait for the other machines.

        Raises:
            SubmitError, ConfigError: also for machines that are missing or were started differently.
        """
        from launcher.hardware import device

        local.require_gpus(plan, device())
        if self._meeting is not None:
            self._meeting.await_everyone()

    def preview(self, plan: LaunchPlan) -> str | None:
        count = plan.topology.nodes
        return f"machines   {count}, each of which runs this command with an index of its own (NODE_RANK)\n"

    def submit(self, run: RunDir, attempt: int, plan_path: Path) -> None:
        """Wait for the other machines, name the attempt's nodes, and start this machine's agent.

        Raises:
            SubmitError: if it is not called by its own machine's command, for example for a run that another user's command would
            start.
        """
        meeting = self._meeting
        if meeting is None:
            remedy = "run the command on every machine, with NODE_RANK set"
            raise SubmitError("a run of cluster=static is started by its own machines", where=str(run.root), remedy=remedy)
        endpoint, names = meeting.endpoint or network.LOOPBACK, meeting.await_everyone()
        record = replace(
            run_store.read_attempt(run, attempt),
            nodes=names,
            address=endpoint.address,
            interface=endpoint.interface,
            port=network.free_port(endpoint.address),
            begun_at=clock.now(),
        )
        run_store.write_attempt(run, attempt, record)
        self.process = NodeProcess(run, attempt, plan_path, 0, names[0], meeting.report)
        meeting.begin(attempt, names, self.process.tell)
        if not detached_process.await_status(run, attempt, self.process.poll):
            message = f"the agent of {names[0]} did not start"
            run_store.update_status(run, state="failed", attempt=attempt, message=message)
            raise SubmitError(message, where=str(agent_log(run, attempt, 0)), remedy="read its end there")

    def submission_details(self, run: RunDir, attempt: int) -> list[tuple[str, str]]:
        return [("machines", ", ".join(run_store.read_attempt(run, attempt).nodes))]

    def explain_lost(self, run: RunDir) -> str:
        end = None if self.process is None else self.process.end
        reason = end.text if end is not None and end.is_lost else "the agent of node 0 ended without recording a result"
        return f"{reason}; {REPEAT}{run_store.describe_storage_problem(run)}"

    def await_end(self, run: RunDir) -> None:
        if self.process is not None:
            self.process.wait(_END_DEADLINE_S)

    def cancel(self, run: RunDir, save: bool = True) -> None:
        """Write the request that every agent watches for; a second request, or one without `save`, kills the ranks."""
        detached_process.request_cancel(run, self.status(run), save)


def agent_log(run: RunDir, attempt: int, node: int) -> Path:
    """Return the log of a machine's agent; node 0's log has the name that all backends use."""
    return run.agent_log(attempt) if node == 0 else run.attempt(attempt) / f"agent-{node:05d}.log"


class NodeProcess:
    """The agent of machine `node`, which ends with this process; that machine's command starts and watches it.

    `end` is how the agent's ranks have ended, or the agent itself if it left no record; None before. `report` receives it once.
    """

    def __init__(
        self, run: RunDir, attempt: int, plan_path: Path, node: int, name: str, report: Callable[[MeetingMessage], None]
    ) -> None:
        """Start the agent from the run's code; its output goes to its log in the attempt's folder."""
        arguments, log = [str(plan_path), str(attempt), str(node)], agent_log(run, attempt, node)
        variables = {network.NODE_NAME_VARIABLE: name}
        # Ctrl-C reaches only this process, which decides what it means.
        self._process = detached_process.start_module(run, _AGENT, arguments, log, variables, subprocess.PIPE)
        self.end: MeetingMessage | None = None

        def watch() -> None:
            while self.end is None:
                code, record = self._process.poll(), None
                # Storage may fail for a while.
                with suppress(OSError, LauncherError):
                    record = read_node(run, attempt, node)
                if record is not None:
                    failure = record.first_failure
                    self.end = MeetingMessage(AGENT_END, "" if failure is None else failure.line, node)
                elif code is not None:
                    names = {-number: number.name for number in signal.Signals}
                    how = f"was killed by {names[code]}" if code in names else f"ended with exit code {code} and left no record"
                    self.end = MeetingMessage(AGENT_END, f"the agent of {name} {how}", node, is_lost=True)
                else:
                    time.sleep(_LOOK_S)
            report(self.end)

        threading.Thread(target=watch, name="agent", daemon=True).start()

    def tell(self, end: MeetingMessage) -> None:
        """Tell the agent how that of another machine has ended."""
        line = json.dumps(asdict(replace(end, text=end.text[:_MAX_TEXT]))).encode() + b"\n"
        assert self._process.stdin is not None
        with suppress(OSError):
            os.write(self._process.stdin.fileno(), line)

    def poll(self) -> int | None:
        """Return the exit code, None while the agent runs."""
        return self._process.poll()

    def wait(self, deadline_s: float) -> None:
        """Wait for the agent to end; kill it after `deadline_s` seconds."""
        try:
            self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send_signal(self, number: int) -> None:
        """Send a signal; do nothing if the agent has ended."""
        self._process.send_signal(number)
