"""`drill`: a short run, a fault on purpose, and a report whether the cluster saved, went on, and what was lost.

The drill is an observer: it submits a run as `train` does, reads its files as `status` does, and does to the run only what
machines and people may do to any run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from launcher import run_records, run_store
from launcher.checkpoint import store
from launcher.cli import drill_report, formatting, launch
from launcher.cli.drill_report import Hit, Records, Step
from launcher.cli.plan_view import plan_lines
from launcher.cli.resume import start_again
from launcher.clusters.base import Cluster, cluster_for
from launcher.clusters.preflight import check_startable
from launcher.config.compose import Composed, run_hydra
from launcher.config.resume import differences, table, with_overrides
from launcher.config.schema import RunConfig
from launcher.error_record import ErrorRecord
from launcher.errors import EXIT_FAILED, ConfigError, LauncherError, RunError, SubmitError
from launcher.plan.launch_plan import Facts, LaunchPlan
from launcher.plan.planner import plan as make_plan
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES
from launcher.tracking.jsonl import Tail, read_events

_FAULTS = {
    "preempt": "the scheduler wants the machines back (SIGUSR2)",
    "kill-rank": "one rank is killed",
    "kill-node": "the agent of the last node is killed, and the ranks there with it",
    "fill-disk": "a node's saves fail for a while, by a limit on its ranks' file size (RLIMIT_FSIZE): no disk is filled",
    "hang": "one rank is stopped (SIGSTOP), and all others wait for it",
}
_STEPS = 1000
_SAVE_EVERY = 5
# So many steps there are to lose when the fault comes.
_BEYOND = 2
_STALL_S = 20
_POLL_S = 0.2
# A backend is asked less often than files are read: its answer may cost a call to a busy controller.
_ASK_S = 1.0


def run(tokens: list[str]) -> int:
    """Rehearse one fault; 0 when the run came through, 1 when not."""
    # Not abbreviated, and without the overrides among its arguments: what it does not know keeps its order for Hydra.
    arguments, rest = _parser().parse_known_args(tokens)
    plan = _planned(arguments, rest)
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
        print("\n".join([*plan_lines(plan), "", cluster.preview(plan) or ""]))
        return 0
    _say(f"{arguments.fault} on {plan.config.cluster.kind}: a run of its own in {formatting.short(plan.run_dir)}")
    deadline = time.monotonic() + arguments.timeout * 60
    run_dir, _ = launch.start(plan, cluster)
    watch = _Watch(run_dir, cluster, deadline)
    try:
        hit = _hit(arguments.fault, plan, watch)
        if arguments.fault == "fill-disk":
            _await_save(plan, hit, watch)
        else:
            _await_recovery(plan, hit, watch)
        # Before the drill itself makes an end.
        records = _records(arguments.fault, plan, hit, watch)
    finally:
        _end(run_dir, cluster)
    report = drill_report.judge(records, _kept(run_dir))
    print(report.to_json() if arguments.json else "\n".join(drill_report.lines(report)))
    if not report.came_through:
        attempt = formatting.short(run_dir.attempt(hit.life[0]))
        _say(f"look at {attempt} and, for the whole run, python -m launcher status {report.run}")
    return 0 if report.came_through else EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launcher drill",
        usage="%(prog)s [RUN] --fault FAULT [--steps N] [--timeout MINUTES] [--json] [overrides]",
        description=(
            "Rehearse a fault on a short run: does it save and go on, and what does it lose?\nSettings are those of `train`, or "
            "those of RUN, which itself is not touched.\nThe run ends as soon as it has come through, and its files are kept."
        ),
        epilog="faults:\n" + "\n".join(f"  {name:<11}{what}" for name, what in _FAULTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--fault", required=True, choices=_FAULTS, metavar="FAULT", help="what happens to it, see below")
    parser.add_argument("--steps", type=int, default=_STEPS, metavar="N", help=f"most steps of the run (default: {_STEPS})")
    timeout = "for the whole drill, waiting in a queue included (default: 30)"
    parser.add_argument("--timeout", type=_minutes, default=30.0, metavar="MINUTES", help=timeout)
    parser.add_argument("--root", default="runs", metavar="DIR", help="folder where RUN is looked for (default: runs)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def _minutes(value: str) -> float:
    minutes = float(value)
    if not 0 < minutes < float("inf"):
        raise ValueError
    return minutes


def _planned(arguments: argparse.Namespace, rest: list[str]) -> LaunchPlan | None:
    """The plan of the run to rehearse on; None where Hydra has printed what was asked for."""
    if rest and "=" not in rest[0] and not rest[0].startswith(("-", "+", "~")):
        return _like(run_store.find_run(rest[0], Path(arguments.root)), rest[1:], arguments)
    jobs: list[Composed] = []
    run_hydra(rest, jobs.append)
    if len(jobs) > 1:
        raise ConfigError("a drill is one run", where="command line", value="-m", remedy="start one drill after the other")
    for composed in jobs:
        with composed.located():
            return launch.planned(replace(composed, config=_short(composed.config, rest, arguments)), taken=set())
    return None


def _like(run: RunDir, overrides: list[str], arguments: argparse.Namespace) -> LaunchPlan:
    """A plan with the model, the data and the cluster of `run`, whose directory will lie beside it."""
    plan = run_store.load_plan(run)
    asked = with_overrides(plan.config, overrides)
    if found := differences(plan.config, asked):
        raise ConfigError(
            f"a drill like a run has that run's model, data and batch:\n{table(found)}",
            where="command line",
            remedy="take it out, or drill without a RUN",
        )
    config = _short(asked, overrides, arguments)
    launch.check_extra(config)
    values = config.model_dump(mode="json")
    values["run"]["root"] = str(run.root.parent)
    values["cluster"] = config.cluster.for_another_run().model_dump(mode="json")
    config = RunConfig.model_validate(values)
    cluster = cluster_for(config.cluster.kind)
    provenance = plan.provenance.model_copy(update={"overrides": (*plan.provenance.overrides, *overrides)})
    drill = make_plan(
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
    check_startable(drill)
    cluster.check(drill)
    return drill


def _short(config: RunConfig, overrides: Sequence[str], arguments: argparse.Namespace) -> RunConfig:
    """`config` as a short run that saves soon and leaves out what a rehearsal does not need, unless the user has set it.

    Raises:
        ConfigError: where there would be no steps between a save and the next, or no save before the end.
    """
    own = {
        "run.name": f"drill-{arguments.fault}-{datetime.now():%Y%m%d-%H%M%S}",
        # Should the drill itself be killed, the run ends nevertheless.
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
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    given |= {"train.max_steps"} if "train.epochs" in given else set()
    given |= {"tracking.kind"} if any(key.startswith("tracking") for key in given) else set()
    # Without every step in the metrics there is nothing to report.
    given -= {"train.log_every"}
    values = config.model_dump(mode="json")
    for key, value in own.items():
        if key not in given:
            section, _, name = key.partition(".")
            values[section][name] = value
            if key == "train.max_steps":
                values["train"]["epochs"] = None
    every, steps = values["checkpoint"]["save_every"], values["train"]["max_steps"]
    if every <= _BEYOND:
        remedy = f"set it to {_BEYOND + 1} or more"
        raise ConfigError(
            "a drill needs some steps between two saves", where="checkpoint.save_every", value=str(every), remedy=remedy
        )
    if steps is not None and steps <= every + _BEYOND:
        remedy = f"raise --steps above {every + _BEYOND}"
        raise ConfigError("the run would be over before its first save", where="--steps", value=str(steps), remedy=remedy)
    return RunConfig.model_validate(values)


class _Watch:
    """What can be seen of a run from outside, looked at again and again until the deadline."""

    def __init__(self, run: RunDir, cluster: Cluster, deadline: float) -> None:
        self.run, self.cluster, self.deadline = run, cluster, deadline
        self.steps: list[Step] = []
        self.committed: set[int] = set()
        self.stopped_as = ""
        self.by_hand: int | None = None
        self._tail, self._said = Tail(run.metrics), ""
        self.ask()

    def look(self) -> bool:
        """Wait a moment and look; False when the deadline has passed."""
        time.sleep(_POLL_S)
        # The state first: what was written before it changed is then seen as well.
        if time.monotonic() > self._asked + _ASK_S:
            self.ask()
        self.steps += [Step.of(line) for line in self._tail.poll() if "train/loss" in line]
        self.committed |= _kept(self.run)
        return time.monotonic() < self.deadline

    def ask(self) -> None:
        """Have the backend tell the run's state; a person hears why it waits."""
        self.status, self._asked = self.cluster.status(self.run), time.monotonic()
        said = self.status.message.splitlines()[:1]
        self.last_word = ": ".join([self.status.state, *said])
        if self.status.state == "pending" and said and self.last_word != self._said:
            self._said = self.last_word
            _say(self.last_word)

    @property
    def running(self) -> bool:
        return self.status.state in RUNNING_STATES


def _hit(fault: str, plan: LaunchPlan, watch: _Watch) -> Hit:
    """Wait until there is something to lose, then inject the fault.

    Raises:
        RunError: where it does not come to that before the deadline or the end of the run.
    """
    while not (watch.committed and watch.steps and watch.steps[-1].number >= max(watch.committed) + _BEYOND):
        if not watch.look() or not watch.running:
            raise RunError(
                f"the run did not train beyond a checkpoint before {'the deadline' if watch.running else 'its end'}",
                where=str(watch.run.root),
                value=watch.last_word,
                remedy="raise --timeout" if watch.running else "see its logs; where it was just too quick, raise --steps",
            )
    step, saved = watch.steps[-1], max(watch.committed)
    _say(f"step {step.number}, with a checkpoint of step {saved}: {fault}")
    injected = watch.cluster.inject_fault(watch.run, step.life[0], fault)
    _say(f"{injected.description} on {injected.host}")
    return Hit(injected.description, injected.at, injected.host, step.life, saved)


def _await_save(plan: LaunchPlan, hit: Hit, watch: _Watch) -> None:
    """A save that fails ends nothing: wait until it is told, make room again, and wait until another one is committed."""
    freed = False
    while watch.look() and watch.running:
        if not freed and _alerts(watch.run, hit.at):
            freed_disk = watch.cluster.inject_fault(watch.run, hit.life[0], "free-disk")
            _say(f"{freed_disk.description} on {freed_disk.host}")
            freed = True
        if freed and max(watch.committed) > hit.saved_step:
            return


def _await_recovery(plan: LaunchPlan, hit: Hit, watch: _Watch) -> None:
    """Wait until the run trains beyond where it was, or has ended for good."""
    while watch.look():
        last, again = drill_report.progress(watch.steps, hit.life)
        if any(step.number > last for step in again) or watch.status.state == "completed":
            return
        if watch.running:
            continue
        if watch.by_hand is not None or plan.config.cluster.continues_by_itself:
            return
        try:
            _resume(plan, watch)
        except LauncherError as error:
            watch.last_word = f"{watch.last_word}; resume: {error.problems[0].what}"
            return


def _resume(plan: LaunchPlan, watch: _Watch) -> None:
    """Nothing runs it again by itself: do what a person does who finds it like this."""
    watch.stopped_as = watch.last_word
    _say(f"{watch.last_word}; continuing it as a person would: python -m launcher resume {formatting.short(watch.run.root)}")
    watch.cluster.await_end(watch.run)
    with run_store.start_lock(watch.run), redirect_stdout(sys.stderr):
        watch.by_hand = start_again(watch.run, plan, watch.cluster, [], None)
    watch.ask()


def _end(run: RunDir, cluster: Cluster) -> None:
    """Stop the run where it still goes on; what it has written stays."""
    if cluster.status(run).state not in RUNNING_STATES:
        return
    _say("ending the run")
    try:
        cluster.cancel(run, save=False)
    except SubmitError:
        # It has just ended by itself.
        return
    cluster.await_end(run)


def _records(fault: str, plan: LaunchPlan, hit: Hit, watch: _Watch) -> Records:
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
        by_hand=watch.by_hand,
        stopped_as=watch.stopped_as,
        last_word=watch.last_word,
    )


def _alerts(run: RunDir, since: float) -> list[str]:
    """What the run itself has warned of since then."""
    return [event["text"] for event in read_events(run.events) if event["kind"] == "alert" and event["time"] >= since]


def _kept(run: RunDir) -> frozenset[int]:
    """The steps of the checkpoints that are committed and have all their files."""
    return frozenset(checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints))


def _errors(attempt: Path) -> list[str]:
    """What the ranks of an attempt left as the reason of their end."""
    files = sorted(attempt.glob("elastic/**/error.json"), key=lambda file: file.stat().st_mtime)
    return [error.message for error in map(ErrorRecord.read, files) if error is not None]


def _say(words: str) -> None:
    """Progress, which is no part of the report."""
    print(words, file=sys.stderr, flush=True)
