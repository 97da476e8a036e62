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
from launcher.checkpoint import store
from launcher.errors import CheckpointError, ConfigError, DataError, RunError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.signals import CANCEL, PREEMPT

# Passed on to the ranks as a wish to save and stop. Ctrl-C is a person's.
_FORWARDED = {signal.SIGINT: CANCEL, CANCEL: CANCEL, signal.SIGTERM: CANCEL, signal.SIGHUP: PREEMPT, PREEMPT: PREEMPT}
_TRACEBACK_LINES = 40
_ELASTIC_KILL_DELAY_S = 30
_RESEND_S = 0.5
_EXPECTED = {kind.__name__ for kind in (ConfigError, DataError, CheckpointError, RunError)}


def main(plan_path: str, attempt: int) -> int:
    """Run one attempt; returns the exit code and leaves exit.json and status.json behind."""
    plan = LaunchPlan.load(plan_path)
    run = RunDir(Path(plan.run_dir))
    started = time.time()
    stopper = _Stopper(plan.config.cluster.stop_grace_seconds).install()
    run_store.update_status(run, state="running", attempt=attempt, job=_this_process(), message="")
    failure = None if stopper.requested else _run_ranks(plan, plan_path, run, attempt)
    stopper.disarm()
    outcome = _outcome(run, attempt, failure, stopper)
    record = {**outcome, "first_failure": failure, "host": os.uname().nodename, "started_at": started, "ended_at": time.time()}
    run_store.write_json(run.attempt(attempt) / "exit.json", record)
    run_store.update_status(run, state=outcome["state"], message=outcome["message"])
    return 0 if outcome["state"] == "completed" else 130 if outcome["state"] in ("cancelled", "preempted") else 1


def _run_ranks(plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int) -> dict[str, Any] | None:
    """Start the ranks and wait for them; returns the first failure or None."""
    # Elastic's own handlers kill the ranks on TERM after 30 s; ours let them save. QUIT keeps the quick way.
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    topology, agent_log = plan.topology, run.attempt(attempt) / "agent.log"
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // topology.ranks_per_node)))
    elastic_folder = run.attempt(attempt) / "elastic"
    elastic_folder.mkdir(exist_ok=True)
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
        logs_specs=DefaultLogsSpecs(log_dir=str(elastic_folder)),
        signals_to_handle="SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", "launcher.worker.entry", plan_path, str(attempt))
    except ChildFailedError as error:
        return _first_failure(error, run, attempt)
    except Exception as error:
        # Rendezvous, resources and the like: no rank is to blame.
        return {
            "rank": None,
            "exit_code": None,
            "message": f"{type(error).__name__}: {error}",
            "traceback": "",
            "log": str(agent_log),
        }
    return None


def _first_failure(error: Any, run: RunDir, attempt: int) -> dict[str, Any]:
    """Who failed first, and why. A rank that a signal killed comes before those whose connection to it broke."""
    earliest = min(failure.timestamp for failure in error.failures.values())

    def killed(failure: Any) -> bool:
        # After the first failure the agent itself kills the others, 30 s after its TERM.
        return _killed(failure) and failure.timestamp - earliest < _ELASTIC_KILL_DELAY_S / 2

    ranked = sorted(error.failures.items(), key=lambda item: (not killed(item[1]), item[1].timestamp, item[0]))
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
    saved = store.list_checkpoints(run.checkpoints)
    kept = f"the newest checkpoint is of step {saved[-1].step}" if saved else "there is no checkpoint"
    if stopper.killed:
        return {"state": "cancelled", "step": step, "message": f"killed at step {step} without saving; {kept}"}
    stopped_early = failure is None or failure["exit_code"] in (-CANCEL, -PREEMPT)
    if stopper.requested and stopped_early:
        return {"state": "cancelled", "step": step, "message": f"stopped before training had begun; {kept}"}
    if failure is None:
        return {"state": "failed", "step": step, "message": "the ranks ended without an outcome"}
    who = "the node's agent" if failure["rank"] is None else f"rank {failure['rank']}"
    return {"state": "failed", "step": step, "message": f"{who}: {failure['message']}"}


class _Stopper:
    """First signal: ask the ranks to save and stop. Second, or the grace running out: kill them.

    The wish is repeated until it is taken back, because ranks may still be starting when it comes; a rank that has
    heard it ignores the repetition.
    """

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._wish: int | None = None
        self._ended = threading.Event()
        self.requested = False
        self.killed = False

    def install(self) -> _Stopper:
        for number in _FORWARDED:
            signal.signal(number, self._handle)
        return self

    def disarm(self) -> None:
        self._ended.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number in (signal.SIGINT, signal.SIGTERM, CANCEL):
            self._wish, self.killed = signal.SIGKILL, True
        elif not self.requested:
            self._wish, self.requested = _FORWARDED[signal.Signals(number)], True
            threading.Thread(target=self._repeat, name="stopper", daemon=True).start()

    def _repeat(self) -> None:
        deadline = time.monotonic() + self._grace_s
        while not self._ended.is_set():
            if time.monotonic() > deadline:
                self._wish, self.killed = signal.SIGKILL, True
            if self._wish is not None:
                _signal_ranks(self._wish)
            self._ended.wait(_RESEND_S)


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
