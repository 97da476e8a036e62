"""The verbs train and resume on a backend whose machines all run the same command: node 0 starts the run, the others join."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import launcher
from launcher import facts
from launcher.cli.follow import Interrupts, follow
from launcher.cli.plan import print_plan
from launcher.cli.resume import resume_run
from launcher.cli.start_run import choose_run_dir, may_start, prepare_plan, start_run
from launcher.cli.worker_process import run_worker_module
from launcher.clusters import detached_process, network, static
from launcher.clusters.detached_process import LIVENESS_TIMEOUT_S
from launcher.clusters.static import StaticCluster
from launcher.clusters.static_meeting import END, Meeting, Notice, head_endpoint, join
from launcher.config.command_line import override_key
from launcher.config.compose import Composed
from launcher.config.resume import differing, table, with_overrides
from launcher.config.schema import RunConfig, leaves
from launcher.config.sections.model import is_run
from launcher.config.sections.static import NodeIdentity, StaticSection, identify
from launcher.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConfigError, LauncherError, Problem, RunError, SubmitError
from launcher.hardware import device
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.retry import FINAL
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, journal, run_store
from launcher.runs.run_records import RUNNING_STATES
from launcher.security import folders
from launcher.shell_commands import launcher_command

_POLL_S = 0.2
# A network file system may show the attempt this late.
_VISIBLE_S = 60.0
# How long an earlier start's agent of node 0 has to end, in addition to the time after which it counts as lost.
_LEAVE_S = 60.0
_PER_START = ("cluster.node_rank", "cluster.master_addr", "cluster.master_port", "cluster.nodes")
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)


def train(jobs: Sequence[Composed], accepts_cost: bool) -> int:
    """Take this machine's part in starting or continuing the run, and follow it to its end; returns the exit code."""
    if len(jobs) > 1:
        remedy = "start the runs one after the other, each on every machine"
        raise ConfigError("-m starts several runs, and a machine takes part in one at a time", where="-m", remedy=remedy)
    composed = jobs[0]
    config = composed.config
    section = StaticSection.of(config.cluster)
    with composed.located():
        here = identify(section, os.environ, section.model_fields_set)
        # The other machines, and the next start of the command, must find the run.
        problems = []
        if config.run.name is None:
            remedy = "set run.name, the same on every machine; repeating the command then continues the run"
            message = "run.name is needed, since every machine must find the same run"
            problems.append(Problem(message, "run.name", remedy=remedy))
        if here.nodes > 1 and not config.run.root.startswith(("/", "~")):
            remedy = "set run.root to an absolute path on storage that all machines share, such as /shared/runs"
            message = "run.root must be on storage that all machines share, under one absolute path"
            problems.append(Problem(message, "run.root", config.run.root, remedy))
        if problems:
            raise ConfigError(problems)
    run = choose_run_dir(config, str(config.run.name))
    changes = {"cluster": section.for_plan(here.nodes)}
    composed = replace(composed, config=config.model_copy(update=changes))

    def begin(cluster: StaticCluster, interrupts: Interrupts) -> int | str:
        if run.plan.is_file():
            return _continue_run(composed, run, cluster, interrupts)
        with composed.located():
            plan = prepare_plan(composed, taken_names=set())
        print_plan(plan, cluster)
        cluster.check(plan)
        if not may_start([plan], accepts_cost):
            raise SubmitError("the cost of the run was not accepted", remedy="start again and accept it, or add --yes")
        interrupts.defer()
        return start_run(plan, cluster)[1]

    command = _list_shared_settings(composed.config, run)
    if here.is_head:
        return _lead_run(here, run, section, command, begin)
    return _join_run(here, run, command, lambda: _describe_end(composed.config, run))


def resume(run: RunDir, plan: LaunchPlan, arguments: argparse.Namespace) -> int:
    """Take this machine's part in a resume, which must be started on every machine; returns the exit code."""
    config = with_overrides(plan.config, arguments.overrides, plan.run_name)
    section = StaticSection.of(config.cluster)
    keys = map(override_key, arguments.overrides)
    here = identify(section, os.environ, [key.removeprefix("cluster.") for key in keys if key.startswith("cluster.")])
    config = config.model_copy(update={"cluster": section.for_plan(here.nodes)})
    command = _list_shared_settings(config, run)
    command |= {"resume --step": str(arguments.step), "resume --force": str(arguments.force)}
    if not here.is_head:
        return _join_run(here, run, command, lambda: None)

    def begin(cluster: StaticCluster, interrupts: Interrupts) -> int | str:
        # Without those specific to this machine and start.
        overrides = [override for override in arguments.overrides if override_key(override) not in _PER_START]
        overrides += [] if plan.config.cluster.nodes == here.nodes else [f"cluster.nodes={here.nodes}"]
        with run_store.start_lock(run):
            _await_idle(run)
            return resume_run(
                run, plan, cluster, overrides, arguments.step, interrupts, arguments.force, accepts_cost=arguments.yes
            )

    return _lead_run(here, run, section, command, begin)


def _list_shared_settings(config: RunConfig, run: RunDir) -> dict[str, str]:
    """Return what must be the same on every machine: the settings, the run directory and the launcher's version."""
    values = {key: str(value) for key, value in leaves(config.model_dump(mode="json"))}
    return {**values, "run directory": str(run.root), "launcher": launcher.__version__}


def _lead_run(
    here: NodeIdentity,
    run: RunDir,
    section: StaticSection,
    command: dict[str, str],
    begin: Callable[[StaticCluster, Interrupts], int | str],
) -> int:
    """Run node 0's part: `begin` returns the attempt that it started, or why nothing is left to do."""
    _end_on_signals()
    meeting = Meeting(here, run.root, command, head_endpoint(here, section.interface)).open()
    cluster = StaticCluster(meeting)
    code, text = EXIT_INTERRUPTED, "the command on node 0 was interrupted"
    with Interrupts() as interrupts:
        try:
            attempt = begin(cluster, interrupts)
            if isinstance(attempt, str):
                print(attempt)
                code, text = 0, attempt
                return 0
            assert cluster.agent is not None
            _forward_signals(cluster.agent, interrupts)
            code = follow(run, attempt, cluster, interrupts)
            status = cluster.status(run)
            if status != run_store.read_status(run):
                # The agent left no record, and readers on other machines cannot know that it has ended.
                with suppress(OSError):
                    run_store.update_status(run, state=status.state, message=status.message)
            text = f"{status.state}: {status.message}" if status.message else status.state
            return code
        except Exception as error:
            code, text = getattr(error, "exit_code", EXIT_FAILED), str(error)
            raise
        finally:
            meeting.close(code, text)


def _join_run(here: NodeIdentity, run: RunDir, command: dict[str, str], describe_end: Callable[[], str | None]) -> int:
    """Run the part of a machine other than node 0; for `describe_end` see `join`."""
    _end_on_signals()
    joined = join(here, run.root, command, describe_end)
    if isinstance(joined, str):
        print(joined)
        return 0
    attempt, connection = joined
    until, names = time.monotonic() + _VISIBLE_S, tuple[str, ...]()
    while not names:
        time.sleep(_POLL_S)
        with suppress(OSError, LauncherError):
            atomic_files.refresh_directory(run.attempts)
            names = run_store.read_attempt(run, attempt).nodes
        if time.monotonic() > until:
            message, where = f"attempt {attempt} did not appear on this machine", str(run.attempt(attempt))
            raise SubmitError(message, where=where, remedy="check the storage of run.root on this machine")
    folders.require_run(run.root)
    name, log = names[here.node], static.agent_log(run, attempt, here.node)
    arguments = [str(run_store.newest_plan_path(run)), str(attempt), str(here.node)]
    agent = detached_process.start_module(run, static.AGENT, arguments, log, {network.NODE_NAME_VARIABLE: name})
    print(f"{here.label}: attempt {attempt} of {run.root.name} runs here as {name}; its output is in {log}", flush=True)
    with Interrupts() as interrupts:
        interrupts.defer()
        _forward_signals(agent, interrupts)
        num_handled = 0
        while not connection.poll(_POLL_S):
            if len(interrupts.received) > num_handled:
                num_handled += 1
                with suppress(SubmitError, RunError):
                    StaticCluster().cancel(run)
            with suppress(OSError, LauncherError):
                static.report_killed_agent(run, attempt, here.node, name, agent)
        try:
            end = connection.receive(Notice)
        except OSError as error:
            lost = f"{names[0]} was lost: {error.strerror or error}"
            static.report_loss(run, attempt, 0, lost)
            end = Notice(END, f"failed: {lost}; {static.REPEAT}", code=EXIT_FAILED)
        connection.close()
        static.await_agent(agent)
    print(f"{here.label}: {end.text}", file=sys.stderr if end.code == EXIT_FAILED else sys.stdout, flush=True)
    return end.code


def _end_on_signals() -> None:
    """Let TERM, HUP and USR2 end a waiting command like Ctrl-C."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in _FORWARDED:
        signal.signal(number, interrupt)


def _forward_signals(agent: subprocess.Popen[bytes], interrupts: Interrupts) -> None:
    """Let TERM, HUP and USR2 ask the ranks to save and stop, also a TERM that arrived while the agent was starting."""
    for number in _FORWARDED:
        signal.signal(number, lambda *_: agent.send_signal(signal.SIGTERM))
    while signal.SIGTERM in interrupts.received:
        interrupts.received.remove(signal.SIGTERM)
        agent.send_signal(signal.SIGTERM)


def _describe_end(config: RunConfig, run: RunDir) -> str | None:
    """Return why a repeated command has nothing to do; None if the run continues or does not exist."""
    if not run.plan.is_file() or folders.run_problem(run.root) is not None:
        return None
    end = journal.read_end(run, run_store.newest_attempt(run))
    if end is None or end.cause not in FINAL:
        return None
    _require_same_command(config, LaunchPlan.load(run.plan), run)
    return f"{run.root.name} is {end.cause}{f': {end.message}' if end.message else ''}; nothing is left to do"


def _continue_run(composed: Composed, run: RunDir, cluster: StaticCluster, interrupts: Interrupts) -> int | str:
    """Start the next attempt of an existing run because the same command was repeated, or return why nothing is left to do."""
    folders.require_run(run.root)
    with run_store.start_lock(run):
        _await_idle(run)
        with composed.located():
            _require_same_command(composed.config, LaunchPlan.load(run.plan), run)
        plan = run_store.load_plan(run)
        # Also records the end of an attempt that could not record it.
        judged = run_worker_module(static.AGENT, None, str(run_store.newest_plan_path(run)))
        if (reason := _describe_end(composed.config, run)) is not None:
            return reason
        if not judged["again"]:
            command = launcher_command("resume", run.root)
            remedy = f"when the cause is gone, continue it on every machine with: {command}"
            raise SubmitError(f"the run is not continued: {judged['reason']}", where=str(run.root), remedy=remedy)
        count = composed.config.cluster.nodes
        overrides = [] if plan.config.cluster.nodes == count else [f"cluster.nodes={count}"]
        return resume_run(run, plan, cluster, overrides, None, interrupts, automatic=True)


def _await_idle(run: RunDir) -> None:
    """Wait until an earlier start's agent of node 0 has ended; it waits for the other machines.

    Also returns if it has not ended: starting the attempt then fails.
    """
    until, is_announced = time.monotonic() + LIVENESS_TIMEOUT_S + _LEAVE_S, False
    while (status := StaticCluster().status(run)).state in RUNNING_STATES and time.monotonic() < until:
        if not is_announced:
            is_announced = True
            print(f"waiting for the end of attempt {run_store.newest_attempt(run)}: {status.state} {status.message}", flush=True)
        time.sleep(_POLL_S)


def _require_same_command(config: RunConfig, plan: LaunchPlan, run: RunDir) -> None:
    requested = facts.resolve_settings(config, device)
    saved = plan.config
    if is_run(requested.model.path) and not str(config.model.path).rpartition("@")[2].isdigit():
        # The newest checkpoint of that run when this one began.
        requested = requested.model_copy(update={"model": requested.model.model_copy(update={"path": saved.model.path})})
    changes = [
        change
        for change in differing(saved.model_dump(mode="json"), requested.model_dump(mode="json"))
        if not change.key.startswith("cluster.")
    ]
    if changes:
        raise ConfigError(
            f"the command differs from the one that began the run:\n{table(changes, before='the run')}",
            where=str(run.root),
            remedy="repeat the first command, change settings on every machine with: "
            f"{launcher_command('resume', run.root)} KEY=VALUE, or choose another run.name",
        )
