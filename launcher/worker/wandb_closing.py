"""Reports the end of a run to W&B if no rank could, because the ranks were killed or never started.

`python -m launcher.worker.wandb_closing PLAN ATTEMPT` briefly resumes the W&B run: it sends an alert with the first failure or
the limit that was reached, the steps that W&B lacks, and exit code 1.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from launcher import run_records, run_store
from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import append_event, read_events
from launcher.tracking.verdicts import read_newest_verdict
from launcher.train.previous_failure import describe_gpu_faults

# The run may hold its nodes meanwhile.
_DEADLINE_S = 45.0


def close_wandb_run(plan: LaunchPlan, plan_path: str | Path, run: RunDir, attempt: int) -> None:
    """Show in W&B that the run has failed for good, even before its first step, or reached a limit while no rank ran.

    Also sends the verdicts on checkpoints that were answered during training: the ranks held the session until now. Never raises,
    and returns within a deadline. In offline mode the end is written to W&B's files, if there are any.
    """
    tracking = plan.config.tracking
    _report_end(plan, plan_path, run, attempt)
    if plan.config.eval.answers_every and tracking.kind == "wandb" and tracking.mode != "disabled":
        _send_newest_verdict(run)


def _report_end(plan: LaunchPlan, plan_path: str | Path, run: RunDir, attempt: int) -> None:
    tracking = plan.config.tracking
    may_show = tracking.mode in ("auto", "online") or (tracking.mode == "offline" and _has_sessions(run))
    if tracking.kind != "wandb" or not may_show or not _must_report(run, attempt):
        return
    command = [sys.executable, "-m", "launcher.worker.wandb_closing", str(plan_path), str(attempt)]
    # W&B may hang; a separate process can be killed.
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=_DEADLINE_S)


def _send_newest_verdict(run: RunDir) -> None:
    """Send the verdicts of the newest evaluated step, with the table of all steps."""
    with suppress(OSError, LauncherError, subprocess.SubprocessError):
        if (newest := read_newest_verdict(run)) is not None:
            command = [sys.executable, "-m", "launcher.tracking.wandb.verdict_upload", str(run.root), str(newest.step)]
            subprocess.run(command, stdin=subprocess.DEVNULL, timeout=_DEADLINE_S)


def main(plan_path: str, attempt: int) -> None:
    from launcher.tracking.wandb.session import is_online
    from launcher.tracking.wandb.tracker import WandbTracker

    plan = LaunchPlan.load(plan_path)
    run = RunDir(Path(plan.run_dir))
    if not _has_sessions(run) and not is_online(plan.config.tracking.mode):
        return
    status = run_store.read_status(run)
    report = partial(append_event, run, attempt)
    tracker = WandbTracker(plan, run.root, send_event=report, on_stop=_no_stop)
    text = f"the run ends: {status.message}"
    if status.state == "failed":
        text = f"the run has failed: {status.message}{_log_of_first_failure(run, attempt)}"
    tracker.event("alert", f"{text}{_gpu_faults(run, attempt)}", status.step)
    tracker.finish(status.state, everything=True)


def _must_report(run: RunDir, attempt: int) -> bool:
    """Return whether the run failed or was ended between two attempts; ranks that reach a limit report it themselves."""
    state = run_store.read_status(run).state
    if state != "preempted":
        return state == "failed"
    with suppress(OSError, LauncherError):
        record = run_records.read_exit(run, attempt)
        # An attempt without a cause ran on this machine, and a person stopped it.
        return record is None or record.cause not in (None, Cause.LIMIT)
    return True


def _log_of_first_failure(run: RunDir, attempt: int) -> str:
    """Return the log of the rank that failed first, in parentheses, or an empty string."""
    with suppress(OSError, LauncherError):
        record = run_records.read_exit(run, attempt)
        if record is not None and record.first_failure is not None:
            return f" (log: {record.first_failure.log})"
    return ""


def _gpu_faults(run: RunDir, attempt: int) -> str:
    with suppress(OSError, KeyError, TypeError):
        return describe_gpu_faults(e for e in read_events(run.events) if e["kind"] == "alert" and e["attempt"] == attempt)
    return ""


def _has_sessions(run: RunDir) -> bool:
    return (run.root / "wandb").is_dir()


def _no_stop() -> None:
    """Do nothing: no rank runs that could be stopped."""


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
