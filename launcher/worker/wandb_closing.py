"""Reports the end of a run to W&B if no rank could: `python -m launcher.worker.wandb_closing PLAN ATTEMPT`.

Briefly resumes the W&B run, and sends an alert with the first failure or the limit, the steps that W&B lacks, and exit code 1.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
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
    if tracking.kind != "wandb" or tracking.mode == "disabled":
        return
    if (tracking.mode != "offline" or _has_sessions(run)) and _must_report(run, attempt):
        _run_module("launcher.worker.wandb_closing", str(plan_path), str(attempt))
    if plan.config.eval.answers_every:
        with suppress(OSError, LauncherError):
            # This also sends the table of all steps.
            if (newest := read_newest_verdict(run)) is not None:
                _run_module("launcher.tracking.wandb.tracker", str(run.root), str(newest.step))


def _run_module(module: str, *arguments: str) -> None:
    """Run a module in a separate process, which can be killed: W&B may hang."""
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run([sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, timeout=_DEADLINE_S)


def main(plan_path: str, attempt: int) -> None:
    from launcher.tracking.wandb.tracker import WandbTracker, is_online

    plan = LaunchPlan.load(plan_path)
    run = RunDir(Path(plan.run_dir))
    if not _has_sessions(run) and not is_online(plan.config.tracking.mode):
        return
    status = run_store.read_status(run)
    tracker = WandbTracker(plan, run.root, send_event=partial(append_event, run, attempt), on_stop=lambda: None)
    text = f"the run {'has failed' if status.state == 'failed' else 'ends'}: {status.message}"
    with suppress(OSError, LauncherError):
        record = journal.read_end(run, attempt)
        if status.state == "failed" and record is not None and record.first_failure is not None:
            text += f" (log: {record.first_failure.log})"
    text += describe_gpu_faults(e for e in read_events(run.events) if e["kind"] == "alert" and e["attempt"] == attempt)
    tracker.event("alert", text, status.step)
    tracker.finish(status.state, everything=True)


def _must_report(run: RunDir, attempt: int) -> bool:
    """Return whether the run failed or was ended between two attempts; ranks that reach a limit report it themselves."""
    state = run_store.read_status(run).state
    if state != "preempted":
        return state == "failed"
    with suppress(OSError, LauncherError):
        ended = journal.read_end(run, attempt)
        return ended is None or ended.state != "preempted" or journal.read_training(run, attempt) is None
    return True


def _has_sessions(run: RunDir) -> bool:
    return (run.root / "wandb").is_dir()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
