"""The verb `drill`: start a short run, inject a fault, and report whether the run saved and continued, and what it lost."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from launcher.checkpoint import store
from launcher.cli.follow import Interrupts
from launcher.cli.render import terminal
from launcher.cli.render.sections import Rows
from launcher.cli.resume import resume_run
from launcher.cli.start_run import prepare_plan, start_run
from launcher.cli.verbs import flags_of
from launcher.clusters.backends import Cluster, InjectedFault, cluster_for
from launcher.config.command_line import override_key
from launcher.config.compose import run_hydra
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_FAILED, ConfigError, LauncherError, RunError, SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.journal import AttemptConcluded
from launcher.runs.run_records import RUNNING_STATES
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.jsonl import Tail

_MAX_STEPS, _SAVE_EVERY = 1000, 5
# The number of steps after the last checkpoint, which the fault puts at risk.
_STEPS_AT_RISK = 2
_STALL_S = 20
_POLL_S = 0.2
# Seconds between two calls of `Cluster.status`, which may ask a busy scheduler.
_STATUS_INTERVAL_S = 1.0


# An attempt and the number of restarts of its ranks by the node agents: one life of all ranks.
Life = tuple[int, int]


@dataclass(frozen=True)
class Step:
    """A trained step and its time, in seconds since the epoch."""

    life: Life
    number: int
    loss: float
    time: float


@dataclass(frozen=True)
class Records:
    """The records of a run after a fault, once it has ended or recovered.

    Attributes:
        injected, life, saved_step: the fault, the life of the run that it hit, and the newest checkpoint at that time.
        steps: in the order of training.
        exit_record: of the attempt that was hit; None if the attempt continued.
        committed, intact: steps of all checkpoints that the drill saw, and of those that are complete at the end.
        resumed_attempt: the attempt that the drill started with `resume`, as a user would; None if the run continued by itself.
        last_status: last state and message of the run before that.
    """

    fault: str
    device: str
    run: str
    keep_last: int
    injected: InjectedFault
    life: Life
    saved_step: int
    steps: Sequence[Step]
    exit_record: AttemptConcluded | None
    committed: frozenset[int]
    intact: frozenset[int]
    resumed_attempt: int | None
    last_status: str


def rehearse_fault(arguments: argparse.Namespace) -> int:
    """Rehearse one fault; returns 0 if the run recovered, 1 if not."""
    jobs = run_hydra(arguments.overrides, flags_of("drill"))
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
    _say(f"{arguments.fault} on {kind}: the drill's run is {short_path(plan.run_dir)}")
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
    report = judge(replace(records, intact=_committed_steps(run_dir)))
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        terminal.show(report_rows(report), label_columns=18)
    if report["has_recovered"]:
        return 0
    attempt = short_path(run_dir.attempt(records.life[0]))
    _say(f"see {attempt}, and for the whole run: {launcher_command('status', records.run)}")
    return EXIT_FAILED


def _shorten(config: RunConfig, arguments: argparse.Namespace) -> RunConfig:
    """Change `config` to a short run that saves early and skips evaluation and export; the user's settings take precedence."""
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
    user_keys = set(map(override_key, arguments.overrides))
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
    """Inject the fault once the run has trained beyond a checkpoint, and wait until it has recovered or ended for good."""
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
        last_step, later_steps = split_steps(watch.steps, step.life)
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
        # Resume it as a user would.
        _say(f"{watch.last_status}; resuming it with: {launcher_command('resume', short_path(run.root))}")
        try:
            watch.cluster.await_end(run)
            with Interrupts() as interrupts, run_store.start_lock(run), redirect_stdout(sys.stderr):
                resumed_attempt = resume_run(run, plan, watch.cluster, [], None, interrupts)
            if interrupts.received:
                raise KeyboardInterrupt
            watch.update_status()
        except LauncherError as error:
            last_status = f"{last_status}; resume: {error.problems[0].message}"
            break
    return Records(
        fault=fault,
        device=plan.topology.device,
        run=short_path(run.root),
        keep_last=plan.config.checkpoint.keep_last,
        injected=injected,
        life=step.life,
        saved_step=saved_step,
        steps=watch.steps,
        exit_record=journal.read_end(run, step.life[0]),
        committed=watch.committed,
        intact=frozenset(),
        resumed_attempt=resumed_attempt,
        last_status=last_status or watch.last_status,
    )


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


def split_steps(steps: Sequence[Step], hit: Life) -> tuple[int, list[Step]]:
    """Return the last step of the life that was hit, and the steps of later lives."""
    last = max((step.number for step in steps if step.life <= hit), default=0)
    return last, [step for step in steps if step.life > hit]


def judge(records: Records) -> dict[str, Any]:
    """Return the report, with `has_recovered` and `problems`; times are seconds since the fault, None for what did not happen."""
    at = records.injected.at
    last, again = split_steps(records.steps, records.life)
    beyond = [step for step in again if step.number > last]
    resumed = again[0].number - 1 if again else None
    before = {step.number: step.loss for step in records.steps if step.life <= records.life}
    replayed = [abs(step.loss - before[step.number]) for step in again if step.number in before]
    # Retention removes older ones.
    expected = sorted(records.committed | records.intact)[-records.keep_last :]
    lost = [step for step in expected if step not in records.intact]
    num_differing = sum(difference != 0 for difference in replayed)
    problems = []
    if resumed is None:
        problems.append(f"the run did not train again: {records.last_status}")
    elif not beyond and not records.last_status.startswith("completed"):
        problems.append(f"the run trained again but did not get past step {last}: {records.last_status}")
    if lost:
        problems.append(f"committed checkpoints are missing or damaged: step {', '.join(map(str, lost))}")
    if resumed is not None and resumed < records.saved_step:
        problems.append(f"the run continued from step {resumed}, although step {records.saved_step} was saved before the fault")
    if records.fault == "preempt" and resumed is not None and last > resumed:
        problems.append("the run lost steps despite the notice: the save after the signal was not committed")
    # GPUs may add in a different order each time.
    if num_differing and records.device == "cpu":
        problems.append("the losses of the repeated steps differ: the restored state or the rows are not the same")
    happened, continued = _describe_end(records, again)
    return {
        "fault": records.fault,
        "run": records.run,
        "action": records.injected.description,
        "host": records.injected.host,
        "happened": happened,
        "continued": continued,
        "reached_step": last,
        "resumed_step": resumed,
        "lost_steps": None if resumed is None else last - resumed,
        "trains_again_s": again[0].time - at if again else None,
        "caught_up_s": beyond[0].time - at if beyond else None,
        "checkpoints_kept": sorted(records.intact),
        "replayed_steps": len(replayed),
        "differing_steps": num_differing,
        "problems": problems,
        "has_recovered": not problems,
    }


def _describe_end(records: Records, again: Sequence[Step]) -> tuple[str, str]:
    """Return why the life that was hit ended, from the run's records or the cluster, and how the run continued."""
    number, restart = again[0].life if again else (0, 0)
    is_same = number == records.life[0]
    if (record := records.exit_record) is not None:
        happened = " ".join(f"{record.cause}: {record.message}".split())
    else:
        happened = "the node agents restarted all ranks" if is_same else records.last_status
    if not again:
        return happened, "no"
    if is_same:
        return happened, f"in the same allocation, restart {restart} of its ranks"
    who = "the drill, as a user would (python -m launcher resume)" if number == records.resumed_attempt else "the launcher"
    return happened, f"as attempt {number}, started by {who}"


def report_rows(report: Mapping[str, Any]) -> Rows:
    """Return the report of `judge` without what did not happen."""
    shown = {name.removesuffix("_s").replace("_", " "): value for name, value in report.items() if value not in (None, [])}
    values = {name: f"{value:.1f} s" if isinstance(value, float) else value for name, value in shown.items()}
    return Rows([(name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)) for name, value in values.items()])
