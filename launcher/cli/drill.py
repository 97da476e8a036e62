"""The verb `drill`: start a short run, inject a fault, and report whether the run saved and continued, and what it lost.

The drill submits a run as `train` does and reads its files as `status` does. It changes the run only through the injected fault
and through commands that a user has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from datetime import datetime

from launcher import run_records, run_store
from launcher.checkpoint import store
from launcher.cli import formatting
from launcher.cli.interaction import Interrupts
from launcher.cli.resume import resume_run
from launcher.cli.start_run import prepare_plan, start_run
from launcher.cli.verbs import flags_of
from launcher.cli.views import drill_report
from launcher.cli.views.drill_report import Records, Step
from launcher.clusters.backends import Cluster, cluster_for
from launcher.config.compose import Composed, run_hydra
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, ConfigError, LauncherError, RunError, SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.shell_commands import launcher_command
from launcher.tracking.jsonl import Tail

_MAX_STEPS, _SAVE_EVERY = 1000, 5
# The number of steps after the last checkpoint, which the fault puts at risk.
_STEPS_AT_RISK = 2
_STALL_S = 20
_POLL_S = 0.2
# Seconds between two calls of `Cluster.status`, which may ask a busy scheduler.
_STATUS_INTERVAL_S = 1.0


def rehearse_fault(arguments: argparse.Namespace) -> int:
    """Rehearse one fault; returns 0 if the run recovered, 1 if not."""
    jobs: list[Composed] = []
    run_hydra(arguments.overrides, jobs.append, flags_of("drill"))
    if not jobs:
        return 0
    if len(jobs) > 1:
        raise ConfigError("a drill has only one run", where="command line", value="-m")
    (composed,) = jobs
    with composed.located():
        shortened = replace(composed, config=_shorten(composed.config, arguments))
        plan = prepare_plan(shortened, taken_names=set())
    kind = plan.config.cluster.kind
    cluster = cluster_for(kind)
    if cluster.drill_remedy is not None:
        message = "drill does not support this kind of cluster"
        raise SubmitError(message, where="cluster", value=kind, remedy=cluster.drill_remedy)
    _say(f"{arguments.fault} on {kind}: the drill's run is {formatting.short(plan.run_dir)}")
    deadline = time.monotonic() + arguments.timeout * 60
    with Interrupts() as interrupts:
        interrupts.defer()
        run_dir, _ = start_run(plan, cluster)
    watch = _RunWatch(run_dir, cluster, deadline)
    try:
        if interrupts.received:
            raise KeyboardInterrupt
        # The records must precede the drill's stop of the run.
        records = _rehearse(arguments.fault, plan, watch)
    finally:
        _stop_run(run_dir, cluster)
    report = drill_report.judge(replace(records, intact=_committed_steps(run_dir)))
    print(json.dumps(report, indent=2) if arguments.json else "\n".join(drill_report.lines(report)))
    if report["has_recovered"]:
        return 0
    attempt = formatting.short(run_dir.attempt(records.life[0]))
    _say(f"see {attempt}, and for the whole run: {launcher_command('status', records.run)}")
    return EXIT_FAILED


def _shorten(config: RunConfig, arguments: argparse.Namespace) -> RunConfig:
    """Change `config` to a short run that saves early and skips evaluation and export; the user's settings take precedence.

    Raises:
        ConfigError: if there are too few steps between two saves.
    """
    drill_settings = {
        "run.name": f"drill-{arguments.fault}-{datetime.now():%Y%m%d-%H%M%S}",
        # Ends the run even if the drill is killed.
        "run.max_hours": arguments.timeout / 60,
        "train.max_steps": _MAX_STEPS,
        "checkpoint.save_every": _SAVE_EVERY,
        "checkpoint.keep_last": 2,
        "eval.every": 0,
        "eval.at_start": False,
        "export.enabled": False,
        "eval.sample": False,
        "tracking.kind": "none",
        **({"cluster.stall_seconds": _STALL_S} if arguments.fault == "hang" else {}),
    }
    user_keys = {override.lstrip("+").partition("=")[0] for override in arguments.overrides}
    user_keys |= {"train.max_steps"} if "train.epochs" in user_keys else set()
    user_keys |= {"tracking.kind"} if any(key.startswith("tracking") for key in user_keys) else set()
    values = config.model_dump(mode="json")
    for key, value in drill_settings.items():
        if key not in user_keys:
            section, _, name = key.partition(".")
            values[section][name] = value
            if key == "train.max_steps":
                values["train"]["epochs"] = None
    if (save_every := values["checkpoint"]["save_every"]) <= _STEPS_AT_RISK:
        message, remedy = "a drill needs more steps between two saves", f"set it to {_STEPS_AT_RISK + 1} or more"
        raise ConfigError(message, where="checkpoint.save_every", value=str(save_every), remedy=remedy)
    return RunConfig.model_validate(values)


class _RunWatch:
    """The observable state of a run, polled until the deadline."""

    def __init__(self, run: RunDir, cluster: Cluster, deadline: float) -> None:
        self.run, self.cluster, self.deadline = run, cluster, deadline
        self.steps: list[Step] = []
        self.committed: frozenset[int] = frozenset()
        self._tail, self.last_status = Tail(run.metrics), ""
        self.update_status()

    def poll(self) -> bool:
        """Wait a moment and read the run's files; returns False after the deadline."""
        time.sleep(_POLL_S)
        # Read the status before the files, so that everything written before it changed is read too.
        if time.monotonic() > self._status_at + _STATUS_INTERVAL_S:
            self.update_status()
        for line in self._tail.poll():
            if "train/loss" in line:
                life = line["attempt"], int(line["run/restarts"])
                self.steps.append(Step(life, int(line["trainer/step"]), line["train/loss"], line["time"]))
        self.committed |= _committed_steps(self.run)
        return time.monotonic() < self.deadline

    def update_status(self) -> None:
        """Ask the backend for the run's status; prints why the run is waiting."""
        status, self._status_at = self.cluster.status(self.run), time.monotonic()
        self.is_running = status.state in RUNNING_STATES
        previous, self.last_status = self.last_status, ": ".join([status.state, *status.message.splitlines()[:1]])
        if status.state == "pending" and self.last_status != previous:
            _say(self.last_status)


def _rehearse(fault: str, plan: LaunchPlan, watch: _RunWatch) -> Records:
    """Inject the fault once the run has trained beyond a checkpoint, and wait until it has recovered or ended for good.

    Raises:
        RunError: if the deadline passes or the run ends before the fault.
    """
    run = watch.run
    while not (watch.committed and watch.steps and watch.steps[-1].number >= max(watch.committed) + _STEPS_AT_RISK):
        if not watch.poll() or not watch.is_running:
            raise RunError(
                f"the run did not train beyond a checkpoint before {'the deadline' if watch.is_running else 'its end'}",
                where=str(run.root),
                value=watch.last_status,
                remedy="raise --timeout" if watch.is_running else "see its logs; if it has completed, raise train.max_steps",
            )
    step, saved_step = watch.steps[-1], max(watch.committed)
    _say(f"step {step.number}, with a checkpoint of step {saved_step}: {fault}")
    injected = watch.cluster.inject_fault(run, step.life[0], fault)
    _say(f"{injected.description} on {injected.host}")
    resumed_attempt, last_status = None, ""
    while watch.poll():
        last_step, later_steps = drill_report.progress(watch.steps, step.life)
        if any(later.number > last_step for later in later_steps):
            break
        if watch.is_running:
            continue
        if (
            resumed_attempt is not None
            or plan.config.cluster.continues_by_itself
            or run_store.read_status(run).state == "completed"
        ):
            break
        last_status = watch.last_status
        try:
            resumed_attempt = _resume(plan, watch)
        except LauncherError as error:
            last_status = f"{last_status}; resume: {error.problems[0].message}"
            break
    return Records(
        fault=fault,
        device=plan.topology.device,
        run=formatting.short(run.root),
        keep_last=plan.config.checkpoint.keep_last,
        injected=injected,
        life=step.life,
        saved_step=saved_step,
        steps=watch.steps,
        exit_record=run_records.read_exit(run, step.life[0]),
        committed=watch.committed,
        intact=frozenset(),
        resumed_attempt=resumed_attempt,
        last_status=last_status or watch.last_status,
    )


def _resume(plan: LaunchPlan, watch: _RunWatch) -> int:
    """Resume the run as a user would, on backends that do not continue runs automatically; returns the attempt."""
    _say(f"{watch.last_status}; resuming it with: {launcher_command('resume', formatting.short(watch.run.root))}")
    watch.cluster.await_end(watch.run)
    with Interrupts() as interrupts, run_store.start_lock(watch.run), redirect_stdout(sys.stderr):
        attempt = resume_run(watch.run, plan, watch.cluster, [], None, interrupts)
    if interrupts.received:
        raise KeyboardInterrupt
    watch.update_status()
    return attempt


def _stop_run(run: RunDir, cluster: Cluster) -> None:
    """Stop the run if it is still running; its files stay."""
    if cluster.status(run).state not in RUNNING_STATES:
        return
    _say("stopping the run")
    # It may have just ended.
    with suppress(SubmitError):
        cluster.cancel(run, save=False)
        cluster.await_end(run)


def _committed_steps(run: RunDir) -> frozenset[int]:
    """Return the steps of the checkpoints that are committed and complete."""
    return frozenset(checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints))


def _say(message: str) -> None:
    """Print progress on standard error; the report goes to standard output."""
    print(message, file=sys.stderr, flush=True)
