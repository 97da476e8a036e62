"""One node: `python -m launcher.worker.agent PLAN ATTEMPT` starts a rank per GPU and reports how they end.

torch's elastic agent does the work: rendezvous, restarts, and which rank failed first. What is added here are
signals that ask the ranks to save before they stop, and the record of the attempt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from launcher import run_store
from launcher.errors import CheckpointError, ConfigError, DataError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.signals import CANCEL, PREEMPT

# Passed on to the ranks as a wish to save and stop. Ctrl-C is a person's.
_FORWARDED = {signal.SIGINT: CANCEL, CANCEL: CANCEL, signal.SIGTERM: CANCEL, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}
_TRACEBACK_LINES = 40
_EXPECTED = {kind.__name__ for kind in (ConfigError, DataError, CheckpointError, RunError)}


def main(plan_path: str, attempt: int) -> int:
    """Run one attempt; returns the exit code and leaves exit.json and status.json behind."""
    plan = LaunchPlan.load(plan_path)
    run = RunDir(Path(plan.run_dir))
    started = time.time()
    stopper = _Stopper(plan.config.cluster.stop_grace_seconds).install()
    run_store.update_status(run, state="running", attempt=attempt, job=_this_process(), message="")
    failure = _run_ranks(plan, plan_path, run, attempt)
    stopper.disarm()
    outcome = _outcome(run, attempt, failure, stopper)
    record = {**outcome, "first_failure": failure, "host": os.uname().nodename, "started_at": started, "ended_at": time.time()}
    run_store.write_json(run.attempt(attempt) / "exit.json", record)
    run_store.update_status(run, state=outcome["state"], message=outcome["message"])
    return 0 if outcome["state"] == "completed" else 130 if outcome["state"] in ("cancelled", "preempted") else 1


def _run_ranks(plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int) -> dict[str, Any] | None:
    """Start the ranks and wait for them; returns the first failure or None."""
    # Elastic's own handlers kill the ranks on TERM after 30 s; ours let them save. QUIT keeps the quick way.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    topology = plan.topology
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // topology.ranks_per_node)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=topology.ranks_per_node,
        run_id=f"{plan.wandb_id}-{attempt}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=plan.config.cluster.max_restarts,
        monitor_interval=0.2,
        signals_to_handle="SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "launcher.worker.entry", plan_path, str(attempt))
    except ChildFailedError as error:
        return _first_failure(error, run, attempt)
    return None


def _first_failure(error: Any, run: RunDir, attempt: int) -> dict[str, Any]:
    """Who failed first, and why. A rank that a signal killed comes before those whose connection to it broke."""
    ranked = sorted(error.failures.items(), key=lambda item: (not _killed(item[1]), item[1].timestamp, item[0]))
    rank, failure = ranked[0]
    message, trace = failure.message, ""
    recorded = failure.error_file_data.get("message")
    if isinstance(recorded, dict):
        message, trace = recorded.get("message", ""), recorded.get("extraInfo", {}).get("py_callstack", "")
    kind, _, text = str(message).partition(": ")
    if kind in _EXPECTED:
        # Plain words say it all; the traceback stands in the rank's log.
        message, trace = text, ""
    if _killed(failure):
        message = f"killed by {signal.Signals(-failure.exitcode).name}"
    return {
        "rank": rank,
        "exit_code": failure.exitcode,
        "message": str(message),
        "traceback": "\n".join(str(trace).splitlines()[-_TRACEBACK_LINES:]),
        "log": str(run.rank_log(attempt, rank)),
    }


def _killed(failure: Any) -> bool:
    """True where a signal other than the agent's own TERM ended the rank."""
    return failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, signal.SIGINT) and failure.error_file == "<N/A>"


def _outcome(run: RunDir, attempt: int, failure: dict[str, Any] | None, stopper: _Stopper) -> dict[str, Any]:
    file = run.attempt(attempt) / "outcome.json"
    if failure is None and file.is_file():
        return json.loads(file.read_text())
    step = run_store.read_status(run).step
    if stopper.killed:
        return {"state": "cancelled", "step": step, "message": f"killed at step {step} without saving", "checkpoint": None}
    if failure is None:
        failure = {"rank": 0, "message": "ended without an outcome"}
    if stopper.requested:
        return {
            "state": "cancelled",
            "step": step,
            "message": f"stopped before anything could be saved (step {step})",
            "checkpoint": None,
        }
    return {"state": "failed", "step": step, "message": f"rank {failure['rank']}: {failure['message']}", "checkpoint": None}


class _Stopper:
    """First signal: ask the ranks to save and stop. Second, or the grace running out: kill them."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._timer: threading.Timer | None = None
        self.requested = False
        self.killed = False

    def install(self) -> _Stopper:
        for number in _FORWARDED:
            signal.signal(number, self._handle)
        return self

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number in (signal.SIGINT, signal.SIGTERM, CANCEL):
            self._kill()
            return
        self.requested = True
        _signal_ranks(_FORWARDED[signal.Signals(number)])
        if self._timer is None:
            self._timer = threading.Timer(self._grace_s, self._kill)
            self._timer.daemon = True
            self._timer.start()

    def _kill(self) -> None:
        self.killed = True
        _signal_ranks(signal.SIGKILL)


def _signal_ranks(number: int) -> None:
    for child in psutil.Process().children():
        try:
            child.send_signal(number)
        except psutil.NoSuchProcess:
            pass


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": os.uname().nodename, "pid": process.pid, "started": process.create_time()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
