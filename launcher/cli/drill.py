"""The verb `drill`: start a short run, inject a fault, and report whether the run saved and continued, and what it lost.

The drill submits a run as `train` does and reads its files as `status` does. It changes the run only through the injected fault
and through commands that a user has.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launcher import run_records, run_store
from launcher.checkpoint import store
from launcher.cli import formatting, launch
from launcher.cli.arguments import VerbParser
from launcher.cli.resume import resume_run
from launcher.cli.starting.interrupts import Interrupts
from launcher.cli.views import drill_report
from launcher.cli.views.drill_report import Hit, Records, Step
from launcher.cli.views.plan_view import LABEL_WIDTH, plan_lines
from launcher.cli.worker_process import check_extra
from launcher.clusters.backends import Cluster, cluster_for
from launcher.clusters.preflight import check_startable
from launcher.config.compose import Composed, run_hydra
from launcher.config.resume import differences, table, with_overrides
from launcher.config.run_file.tokens import is_run_file
from launcher.config.schema import RunConfig
from launcher.error_record import ErrorRecord
from launcher.errors import EXIT_FAILED, ConfigError, LauncherError, RunError, SubmitError
from launcher.plan.launch_plan import Facts, LaunchPlan
from launcher.plan.planner import plan as make_plan
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.security import ownership
from launcher.shell_commands import launcher_command
from launcher.tracking.jsonl import Tail, read_events

_FAULTS = {
    "preempt": "the scheduler preempts the nodes (SIGUSR2)",
    "kill-rank": "one rank is killed",
    "kill-node": "the agent of the last node is killed together with its ranks",
    "fill-disk": "saves on one node fail for a while, because of a file size limit on its ranks; no disk is filled",
    "hang": "one rank is stopped (SIGSTOP), and all others wait for it",
}
_STEPS = 1000
_SAVE_EVERY = 5
# The number of steps after the last checkpoint, which the fault puts at risk.
_STEPS_AT_RISK = 2
_STALL_S = 20
_POLL_S = 0.2
# Seconds between two calls of `Cluster.status`, which may ask a busy scheduler.
_STATUS_INTERVAL_S = 1.0


def run(verb: str, tokens: list[str]) -> int:
    """Rehearse one fault; returns 0 if the run recovered, 1 if not."""
    # Unknown arguments are Hydra's overrides, which keep their order.
    arguments, rest = _parser().parse_known_args(tokens)
    plan = _make_plan(arguments, rest)
    if plan is None:
        return 0
    cluster = cluster_for(plan.config.cluster.kind)
    if cluster.drill_remedy is not None:
        raise SubmitError(
            "drill does not support this kind of cluster",
            where="cluster",
            value=plan.config.cluster.kind,
            remedy=cluster.drill_remedy,
        )
    if plan.config.cluster.is_dry_run:
        print("\n".join([*formatting.wrap(plan_lines(plan), LABEL_WIDTH), "", cluster.preview(plan) or ""]))
        return 0
    _say(f"{arguments.fault} on {plan.config.cluster.kind}: the drill's run is {formatting.short(plan.run_dir)}")
    deadline = time.monotonic() + arguments.timeout * 60
    with Interrupts() as interrupts:
        interrupts.defer()
        run_dir, _ = launch.start(plan, cluster)
    watch = _RunWatch(run_dir, cluster, deadline)
    try:
        if interrupts.received:
            raise KeyboardInterrupt
        hit = _inject_fault(arguments.fault, watch)
        if arguments.fault == "fill-disk":
            _await_save(hit, watch)
        else:
            _await_recovery(plan, hit, watch)
        # This must precede the drill's stop of the run.
        records = _collect_records(arguments.fault, plan, hit, watch)
    finally:
        _stop_run(run_dir, cluster)
    report = drill_report.judge(records, _committed_steps(run_dir))
    print(report.to_json() if arguments.json else "\n".join(drill_report.lines(report)))
    if not report.has_recovered:
        attempt = formatting.short(run_dir.attempt(hit.life[0]))
        _say(f"see {attempt}, and for the whole run: {launcher_command('status', report.run)}")
    return 0 if report.has_recovered else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = VerbParser(
        prog="python -m launcher drill",
        usage="%(prog)s [RUN] --fault FAULT [--steps N] [--timeout MINUTES] [--json] [overrides]",
        description=(
            "Rehearse a fault on a short run: does it save and continue, and what does it lose?\nIt takes the settings of "
            "`train`, or those of RUN, which is not changed.\nThe run is stopped as soon as it has recovered; its files are kept."
        ),
        epilog="faults:\n" + "\n".join(f"  {name:<11}{effect}" for name, effect in _FAULTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--fault", required=True, choices=_FAULTS, metavar="FAULT", help="the fault to inject, see below")
    parser.add_argument("--steps", type=int, default=_STEPS, metavar="N", help=f"maximum steps of the run (default: {_STEPS})")
    timeout = "limit for the whole drill, including time in a queue (default: 30)"
    parser.add_argument("--timeout", type=_minutes, default=30.0, metavar="MINUTES", help=timeout)
    parser.add_argument("--root", default="runs", metavar="DIR", help="folder that contains RUN (default: runs)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _minutes(value: str) -> float:
    with suppress(ValueError):
        if 0 < (minutes := float(value)) < float("inf"):
            return minutes
    raise argparse.ArgumentTypeError(f"{value} is not a number of minutes above 0")


def _make_plan(arguments: argparse.Namespace, rest: list[str]) -> LaunchPlan | None:
    """Plan the drill's run; None if the command only executed a Hydra flag such as --cfg."""
    if rest and "=" not in rest[0] and not rest[0].startswith(("-", "+", "~")) and not is_run_file(rest[0]):
        like = run_store.find_run(rest[0], Path(arguments.root))
        ownership.require_run(like)
        return _plan_like(like, rest[1:], arguments)
    jobs: list[Composed] = []
    run_hydra(rest, jobs.append, ("--fault", "--steps", "--timeout", "--root", "--json", "--help", "--debug"))
    if len(jobs) > 1:
        raise ConfigError("a drill has only one run", where="command line", value="-m", remedy="start one drill after the other")
    for composed in jobs:
        with composed.located():
            return launch.prepare_plan(replace(composed, config=_shorten(composed.config, rest, arguments)), taken_names=set())
    return None


def _plan_like(run: RunDir, overrides: list[str], arguments: argparse.Namespace) -> LaunchPlan:
    """Plan a run with the model, data and cluster of `run`, in a directory beside it."""
    plan = run_store.load_plan(run)
    config = with_overrides(plan.config, overrides, plan.run_name)
    if changed := differences(plan.config, config):
        raise ConfigError(
            f"a drill of RUN uses that run's model, data and batch:\n{table(changed)}",
            where="command line",
            remedy="remove these overrides, or drill without a RUN",
        )
    config = _shorten(config, overrides, arguments)
    check_extra(config)
    values = config.model_dump(mode="json")
    values["run"]["root"] = str(run.root.parent)
    values["cluster"] = config.cluster.for_another_run().model_dump(mode="json")
    config = RunConfig.model_validate(values)
    cluster = cluster_for(config.cluster.kind)
    provenance = plan.provenance.model_copy(update={"overrides": (*plan.provenance.overrides, *overrides)})
    drill_plan = make_plan(
        config,
        Facts(
            working_dir=str(run.root.parent),
            device=cluster.device(config.cluster),
            model=plan.model,
            data=plan.data,
            provenance=provenance,
            lineage=plan.lineage,
        ),
    )
    check_startable(drill_plan)
    cluster.check(drill_plan)
    return drill_plan


def _shorten(config: RunConfig, overrides: Sequence[str], arguments: argparse.Namespace) -> RunConfig:
    """Change `config` to a short run that saves early and skips evaluation and export; the user's settings take precedence.

    Raises:
        ConfigError: if there are too few steps between two saves, or before the first one.
    """
    drill_settings = {
        "run.name": f"drill-{arguments.fault}-{datetime.now():%Y%m%d-%H%M%S}",
        # Ends the run even if the drill is killed.
        "run.max_hours": arguments.timeout / 60,
        "train.max_steps": arguments.steps,
        "checkpoint.save_every": _SAVE_EVERY,
        "checkpoint.keep_last": 2,
        "train.log_every": 1,
        "eval.every": 0,
        "eval.at_start": False,
        "export.enabled": False,
        "eval.sample": False,
        "tracking.kind": "none",
        **({"cluster.stall_seconds": _STALL_S} if arguments.fault == "hang" else {}),
    }
    user_keys = {override.lstrip("+").partition("=")[0] for override in overrides}
    user_keys |= {"train.max_steps"} if "train.epochs" in user_keys else set()
    user_keys |= {"tracking.kind"} if any(key.startswith("tracking") for key in user_keys) else set()
    # The report needs every step in the metrics.
    user_keys -= {"train.log_every"}
    values = config.model_dump(mode="json")
    for key, value in drill_settings.items():
        if key not in user_keys:
            section, _, name = key.partition(".")
            values[section][name] = value
            if key == "train.max_steps":
                values["train"]["epochs"] = None
    save_every, max_steps = values["checkpoint"]["save_every"], values["train"]["max_steps"]
    if save_every <= _STEPS_AT_RISK:
        remedy = f"set it to {_STEPS_AT_RISK + 1} or more"
        raise ConfigError(
            "a drill needs more steps between two saves", where="checkpoint.save_every", value=str(save_every), remedy=remedy
        )
    if max_steps is not None and max_steps <= save_every + _STEPS_AT_RISK:
        remedy = f"raise --steps above {save_every + _STEPS_AT_RISK}"
        raise ConfigError("the run would end before its first save", where="--steps", value=str(max_steps), remedy=remedy)
    return RunConfig.model_validate(values)


class _RunWatch:
    """The observable state of a run, polled until the deadline."""

    def __init__(self, run: RunDir, cluster: Cluster, deadline: float) -> None:
        self.run, self.cluster, self.deadline = run, cluster, deadline
        self.steps: list[Step] = []
        self.committed: set[int] = set()
        self.ended_as = ""
        self.resumed_attempt: int | None = None
        self._tail, self._shown_message = Tail(run.metrics), ""
        self.update_status()

    def poll(self) -> bool:
        """Wait a moment and read the run's files; returns False after the deadline."""
        time.sleep(_POLL_S)
        # Read the status before the files, so that everything written before it changed is read too.
        if time.monotonic() > self._status_at + _STATUS_INTERVAL_S:
            self.update_status()
        self.steps += [Step.of(line) for line in self._tail.poll() if "train/loss" in line]
        self.committed |= _committed_steps(self.run)
        return time.monotonic() < self.deadline

    def update_status(self) -> None:
        """Ask the backend for the run's status; prints why the run is waiting."""
        self.status, self._status_at = self.cluster.status(self.run), time.monotonic()
        message = self.status.message.splitlines()[:1]
        self.last_status = ": ".join([self.status.state, *message])
        if self.status.state == "pending" and message and self.last_status != self._shown_message:
            self._shown_message = self.last_status
            _say(self.last_status)

    @property
    def is_running(self) -> bool:
        """True until the run has ended."""
        return self.status.state in RUNNING_STATES


def _inject_fault(fault: str, watch: _RunWatch) -> Hit:
    """Wait until the run has trained beyond a checkpoint, then inject the fault.

    Raises:
        RunError: if the deadline passes or the run ends before that.
    """
    while not (watch.committed and watch.steps and watch.steps[-1].number >= max(watch.committed) + _STEPS_AT_RISK):
        if not watch.poll() or not watch.is_running:
            raise RunError(
                f"the run did not train beyond a checkpoint before {'the deadline' if watch.is_running else 'its end'}",
                where=str(watch.run.root),
                value=watch.last_status,
                remedy="raise --timeout" if watch.is_running else "see its logs; if it has completed, raise --steps",
            )
    step, saved_step = watch.steps[-1], max(watch.committed)
    _say(f"step {step.number}, with a checkpoint of step {saved_step}: {fault}")
    injected = watch.cluster.inject_fault(watch.run, step.life[0], fault)
    _say(f"{injected.description} on {injected.host}")
    return Hit(injected.description, injected.at, injected.host, step.life, saved_step)


def _await_save(hit: Hit, watch: _RunWatch) -> None:
    """Wait for the alert of the failed save, remove the file size limit, and wait until another checkpoint is committed."""
    is_freed = False
    while watch.poll() and watch.is_running:
        if not is_freed and _alerts(watch.run, hit.at):
            freed = watch.cluster.inject_fault(watch.run, hit.life[0], "free-disk")
            _say(f"{freed.description} on {freed.host}")
            is_freed = True
        if is_freed and max(watch.committed) > hit.saved_step:
            return


def _await_recovery(plan: LaunchPlan, hit: Hit, watch: _RunWatch) -> None:
    """Wait until the run trains beyond its last step before the fault, or has ended for good."""
    while watch.poll():
        last_step, later_steps = drill_report.progress(watch.steps, hit.life)
        if any(step.number > last_step for step in later_steps) or watch.status.state == "completed":
            return
        if watch.is_running:
            continue
        if watch.resumed_attempt is not None or plan.config.cluster.continues_by_itself:
            return
        try:
            _resume(plan, watch)
        except LauncherError as error:
            watch.last_status = f"{watch.last_status}; resume: {error.problems[0].message}"
            return


def _resume(plan: LaunchPlan, watch: _RunWatch) -> None:
    """Resume the run as a user would, on backends that do not continue runs automatically."""
    watch.ended_as = watch.last_status
    _say(f"{watch.last_status}; resuming it with: {launcher_command('resume', formatting.short(watch.run.root))}")
    watch.cluster.await_end(watch.run)
    with Interrupts() as interrupts, run_store.start_lock(watch.run), redirect_stdout(sys.stderr):
        watch.resumed_attempt = resume_run(watch.run, plan, watch.cluster, [], None, interrupts)
    if interrupts.received:
        raise KeyboardInterrupt
    watch.update_status()


def _stop_run(run: RunDir, cluster: Cluster) -> None:
    """Stop the run if it is still running; its files stay."""
    if cluster.status(run).state not in RUNNING_STATES:
        return
    _say("stopping the run")
    try:
        cluster.cancel(run, save=False)
    except SubmitError:
        # The run has just ended.
        return
    cluster.await_end(run)


def _collect_records(fault: str, plan: LaunchPlan, hit: Hit, watch: _RunWatch) -> Records:
    run = watch.run
    numbers = range(1, run_store.newest_attempt(run) + 1)
    return Records(
        fault=fault,
        device=plan.topology.device,
        run=formatting.short(run.root),
        checkpoints=str(run.checkpoints),
        keep_last=plan.config.checkpoint.keep_last,
        hit=hit,
        steps=watch.steps,
        attempts={number: run_store.read_attempt(run, number) for number in numbers},
        exits={number: record for number in numbers if (record := run_records.read_exit(run, number)) is not None},
        errors=[*_errors(run.attempt(hit.life[0])), *_alerts(run, hit.at)],
        committed=frozenset(watch.committed),
        resumed_attempt=watch.resumed_attempt,
        ended_as=watch.ended_as,
        last_status=watch.last_status,
    )


def _alerts(run: RunDir, since: float) -> list[str]:
    """Return the texts of the run's alerts since a time, in seconds since the epoch."""
    return [event["text"] for event in read_events(run.events) if event["kind"] == "alert" and event["time"] >= since]


def _committed_steps(run: RunDir) -> frozenset[int]:
    """Return the steps of the checkpoints that are committed and complete."""
    return frozenset(checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints))


def _errors(attempt: Path) -> list[str]:
    """Return the errors that the ranks of an attempt recorded, oldest first."""
    files = sorted(attempt.glob("elastic/**/error.json"), key=lambda file: file.stat().st_mtime)
    return [error.message for error in map(ErrorRecord.read, files) if error is not None]


def _say(message: str) -> None:
    """Print progress on standard error; the report goes to standard output."""
    print(message, file=sys.stderr, flush=True)
