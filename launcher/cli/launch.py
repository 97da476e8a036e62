"""The verbs that compose settings: train, plan, data."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from launcher import facts, hardware, model_source, run_store
from launcher.cli import data, formatting, wandb_check
from launcher.cli.follow import follow
from launcher.cli.formatting import wrap
from launcher.cli.plan_view import LABEL_WIDTH, plan_lines, started_lines, sweep_lines
from launcher.clusters.backends import Cluster, StatusReader, cluster_for, status_reader_for
from launcher.clusters.preflight import check_startable, disk_note
from launcher.config.compose import Composed, conf_dir, require_distinct_runs, run_hydra
from launcher.config.schema import RunConfig
from launcher.data import report as data_report
from launcher.data.texts import DecodedTexts, TextsMissing
from launcher.errors import ConfigError, DataError, Problem, RunError, SubmitError, describe
from launcher.models import isolation_verdicts
from launcher.plan.launch_plan import DeviceFacts, Facts, LaunchPlan
from launcher.plan.planner import plan as make_plan
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, Attempt
from launcher.security import ownership

_USAGE = {
    "train": """python -m launcher [train] [--follow | --detach] [overrides]

Plan, prepare data, start the run. On this machine the command follows the run to its end, on a cluster it returns at once.
--follow (or follow=true) and --detach (or follow=false) override that. With -m it starts several runs.""",
    "plan": "python -m launcher plan [--json] [overrides]\n\nShow the complete plan and start nothing.",
    "data": data.USAGE,
}
# The flags that are suggested for mistyped ones.
_COMMON_FLAGS = ("--help", "--debug", ownership.FLAG)
_OWN_FLAGS = {"train": ("--follow", "--detach"), "plan": ("--json",), "data": data.FLAGS}
# A worker that is ended removes what it has written so far.
_TERMINATION_S = 10.0
# Ten times what it takes on an idle machine.
_ISOLATION_CHECK_S = 150.0
_FOLLOW = {"--follow": True, "follow=true": True, "--detach": False, "follow=false": False}


def run(verb: str, tokens: list[str]) -> int:
    """Compose the settings and carry out the verb, once or, with -m, once per job."""
    if "--help" in tokens or "-h" in tokens:
        return _help(verb)
    if verb == "data":
        return _data(tokens)
    as_json = "--json" in tokens
    follows = next((_FOLLOW[token] for token in tokens if token in _FOLLOW), None)
    rest = [token for token in tokens if token != "--json" and token not in _FOLLOW]  # noqa: S105
    jobs: list[Composed] = []
    run_hydra(rest, jobs.append, (*_OWN_FLAGS[verb], *_COMMON_FLAGS))
    require_distinct_runs(jobs)
    if verb == "plan":
        return max((_plan(job, as_json) for job in jobs), default=0)
    return _train(jobs, follows)


def _plan(composed: Composed, as_json: bool) -> int:
    with composed.located():
        cluster = cluster_for(composed.config.cluster.kind)
        node = _node_of(composed, cluster)
        config = facts.resolve(composed.config, node)
        plan = make_plan(config, _checked_facts(config, composed, node))
        if as_json:
            print(plan.to_json())
            return 0
        notes = (disk_note(plan), model_source.weights_note(config.model), data.refusal(plan.config, plan.data))
        print("\n".join(wrap(plan_lines(plan, *notes), LABEL_WIDTH)))
        if script := cluster.preview(plan):
            print(f"\n{script}", end="")
    return 0


def _data(tokens: list[str]) -> int:
    options, rest = data.options(tokens)
    jobs: list[Composed] = []
    run_hydra(rest, jobs.append, (*_OWN_FLAGS["data"], *_COMMON_FLAGS))
    if options.html is not None and len(jobs) > 1:
        raise ConfigError("--html writes one report, and -m makes several", where="--html", remedy="leave out --html, or -m")
    for composed in jobs:
        with composed.located():
            # The data does not depend on the nodes: asking for them would need the scheduler.
            config = facts.resolve(composed.config, hardware.device)
            facts.check(config)
            check_extra(config)
        report = _cached_report(config, options.num_shown) or prepare(config, show=options.num_shown)["report"]
        if note := model_source.weights_note(config.model):
            print(f"note: {note}", file=sys.stderr, flush=True)
        data.present(report, config, options, facts.id_problem(report["cache_dir"], model_source.read_model_facts(config.model)))
    return 0


def _cached_report(config: RunConfig, num_shown: int) -> dict[str, Any] | None:
    """Return the report of a finished cache; None if data must be prepared or texts decoded first.

    Raises:
        DataError: if a block of the cache is damaged.
    """
    data_facts = facts.prepared_data(config)
    if data_facts is None:
        return None
    stop_ids = model_source.stop_ids(config.model)
    try:
        return data_report.report(
            data_facts, config.data, DecodedTexts(data_facts), config.train, config.run.seed, stop_ids, num_shown
        )
    except TextsMissing:
        return None


def _train(jobs: list[Composed], follows: bool | None) -> int:
    """Start all jobs, after all of them have passed their checks; returns the largest exit code."""
    plans: list[LaunchPlan] = []
    _check_wandb_accounts(jobs)
    for composed in _group_jobs(jobs):
        with composed.located():
            plans.append(prepare_plan(composed, taken_names={plan.run_name for plan in plans}))
    codes = []
    started = []
    for plan in plans:
        cluster = cluster_for(plan.config.cluster.kind)
        notes = (disk_note(plan), model_source.weights_note(plan.config.model), data.accepted(plan.config, plan.data))
        print("\n".join(wrap(plan_lines(plan, *notes), LABEL_WIDTH)), flush=True)
        if plan.config.cluster.is_dry_run:
            print(f"\n{cluster.preview(plan)}", end="")
            continue
        run_dir, attempt = start(plan, cluster)
        started.append((plan, cluster.submission_details(run_dir, attempt)))
        if plan.config.cluster.is_followed if follows is None else follows:
            codes.append(follow(run_dir, attempt, cluster))
        else:
            print("\n".join(started_lines(plan, cluster.submission_details(run_dir, attempt))), flush=True)
    if len(started) > 1:
        print("\n".join(sweep_lines(started)))
    return max(codes, default=0)


def _check_wandb_accounts(jobs: list[Composed]) -> None:
    """Check the W&B login once for each combination of tracking settings and cluster."""
    distinct = {(job.config.tracking, job.config.cluster.kind): job for job in jobs}
    for composed in distinct.values():
        with composed.located():
            for note in wandb_check.check(composed.config, worker_environment()):
                print(f"note: {note}", flush=True)


def start(plan: LaunchPlan, cluster: Cluster) -> tuple[RunDir, int]:
    """Create the run directory of a plan and submit the first attempt; returns the directory and the attempt's number.

    Raises:
        SubmitError: if the directory exists already, or the backend refuses the run.
    """
    _require_new(plan)
    run_dir = run_store.create(plan)
    with run_store.start_lock(run_dir):
        attempt = run_store.create_attempt(run_dir, Attempt(resume_step=None))
        cluster.submit(run_dir, attempt, run_dir.plan)
    return run_dir, attempt


def _require_new(plan: LaunchPlan) -> None:
    """Refuse a plan whose run exists, with the state of one that is running."""
    existing = RunDir(Path(plan.run_dir))
    if existing.plan.is_file() and existing.status.is_file():
        require_idle(existing, status_reader_for(existing, run_store.load_plan(existing).config.cluster.kind))
    run_store.require_new(plan)


def require_idle(run: RunDir, backend: StatusReader) -> None:
    """Refuse to start a run that is running already.

    Raises:
        SubmitError: with the job or process that runs it.
    """
    status = backend.status(run)
    if status.state not in RUNNING_STATES:
        return
    name = formatting.short(run.root)
    starter = run_store.start_lock_holder(run) if status.job is None else None
    number = run_store.newest_attempt(run)
    where = f"being started by {starter}" if starter is not None else formatting.whereabouts(run, status, number)
    raise SubmitError(
        f"the run is {status.state} already",
        where=str(run.root),
        value=where,
        remedy=f"follow it with: python -m launcher logs {name} -f, or stop it with: python -m launcher cancel {name}",
    )


def _group_jobs(jobs: list[Composed]) -> list[Composed]:
    """Give the runs of a sweep a common W&B group, unless the user has set one."""
    if len(jobs) < 2:
        return jobs
    group = f"sweep-{datetime.now():%Y%m%d-%H%M%S}"
    with_groups = []
    for job in jobs:
        tracking = job.config.tracking
        with_group = tracking if tracking.group else tracking.model_copy(update={"group": group})
        with_groups.append(replace(job, config=job.config.model_copy(update={"tracking": with_group})))
    return with_groups


def prepare_plan(composed: Composed, taken_names: set[str]) -> LaunchPlan:
    """Plan a job, prepare its model and data, and check the plan against the cluster; starts nothing."""
    cluster = cluster_for(composed.config.cluster.kind)
    node = _node_of(composed, cluster)
    config = facts.resolve(composed.config, node)
    facts.check(config)
    check_extra(config)
    if not model_source.is_config_known(config.model):
        prepare(config)
    collected = _checked_facts(config, composed, node)
    plan = make_plan(config, collected)
    if config.run.name is not None and not config.cluster.is_dry_run:
        # Before data is prepared, and before a sweep starts any of its runs.
        _require_new(plan)
    check_startable(plan)
    cluster.check(plan)
    if not facts.is_prepared(config, collected):
        prepare(config)
        collected = _checked_facts(config, composed, node)
        if collected.data is None:
            what = "the data cache is not there after it was built"
            remedy = "make sure that no program changes the files while they are read, then try again"
            raise DataError(Problem(what, "data.sources", remedy=remedy))
    data.check(config, collected.data)
    return _plan_with_free_name(config, collected, taken_names)


def _node_of(composed: Composed, cluster: Cluster) -> Callable[[], DeviceFacts]:
    """Return a function that asks the backend for the devices of a node, once: a scheduler may take seconds to answer."""
    return functools.cache(lambda: cluster.device(composed.config.cluster))


def _checked_facts(config: RunConfig, composed: Composed, node: Callable[[], DeviceFacts]) -> Facts:
    """Collect the facts of a run, and probe in another process whether its packed documents affect each other."""
    collected = facts.gather(config, composed.overrides, node())
    if not facts.needs_isolation_check(config, collected.model):
        return collected
    # What can be refused at once is refused before a process is started.
    make_plan(config, collected)
    print("checking that packed documents do not affect each other in this model (once)", file=sys.stderr, flush=True)
    try:
        _run_worker_module("launcher.worker.checks.isolation_check", config, timeout_s=_ISOLATION_CHECK_S)
    except RunError as error:
        # The ranks then measure it on the loaded model.
        unknown = isolation_verdicts.unknown(config.model, describe(error))
        return collected.model_copy(update={"model": collected.model.model_copy(update={"isolation": unknown})})
    return facts.gather(config, composed.overrides, node())


def _plan_with_free_name(config: RunConfig, collected: Facts, taken_names: set[str]) -> LaunchPlan:
    """Plan a job under a generated name that no run has; a name that the user chose is never changed."""
    plan = make_plan(config, collected)
    while config.run.name is None and (plan.run_name in taken_names or Path(plan.run_dir).exists()):
        later = datetime.fromisoformat(collected.provenance.created_at) + timedelta(seconds=1)
        provenance = collected.provenance.model_copy(update={"created_at": later.strftime("%Y-%m-%dT%H:%M:%SZ")})
        collected = collected.model_copy(update={"provenance": provenance})
        plan = make_plan(config, collected)
    return plan


def prepare(config: RunConfig, show: int | None = None) -> dict[str, Any]:
    """Download and convert the model and build the data cache, in a process that may import torch.

    Returns the process's answer; with `show`, it contains the data report with that many rows.

    Raises:
        DataError: if the data or the model has problems.
        RunError: if the process fails for another reason.
    """
    answer = _run_worker_module("launcher.worker.prepare", config, *([f"--report={show}"] if show is not None else []))
    if "problems" in answer:
        kind = DataError if answer["exit_code"] == DataError.exit_code else RunError
        raise kind([Problem(*parts) for parts in answer["problems"]])
    return answer


def check_extra(config: RunConfig) -> None:
    """Let DeepSpeed validate `deepspeed.extra` in another process, unless it has accepted the same value before.

    Raises:
        ConfigError: with every key that DeepSpeed refuses or does not know.
    """
    if facts.is_extra_accepted(config):
        return
    answer = _run_worker_module("launcher.worker.checks.deepspeed_check", config)
    if answer["problems"]:
        raise ConfigError([Problem(*parts) for parts in answer["problems"]])


def _run_worker_module(module: str, config: RunConfig, *arguments: str, timeout_s: float | None = None) -> dict[str, Any]:
    """Run a module of the worker side with `config` on standard input; returns the JSON object of its last line.

    Raises:
        RunError: if it prints no JSON object, fails without reporting problems, or has not ended after `timeout_s`.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        code, output = run_worker(command, config.model_dump_json(), subprocess.PIPE, timeout_s)
    except subprocess.TimeoutExpired:
        raise RunError(f"python -m {module} did not end within {timeout_s:.0f} s") from None
    try:
        answer: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise RunError(f"preparing the run ended with exit code {code}; its messages are above") from None
    if code and "problems" not in answer:
        raise RunError(f"preparing the run ended with exit code {code}")
    return answer


def run_worker(
    command: Sequence[str], stdin: str = "", stdout: int | None = None, timeout_s: float | None = None
) -> tuple[int, str]:
    """Run a process of the worker side to its end; returns its exit code, and its output where `stdout` is a pipe.

    Ctrl-C reaches this process alone, which ends the other one: its workers would each print a traceback.

    Raises:
        KeyboardInterrupt: after the process has ended.
        subprocess.TimeoutExpired: where it has not ended after `timeout_s`, after it was ended.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        # The process inherits the mask, until it ignores the signal.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, text=True, env=worker_environment())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with process:
        try:
            output, _ = process.communicate(stdin, timeout=timeout_s)
        except BaseException:
            process.terminate()
            try:
                process.wait(_TERMINATION_S)
            except BaseException:
                process.kill()
            raise
    return process.returncode, output or ""


def worker_environment() -> dict[str, str]:
    """Return the environment of a process that runs a module of the worker side: this package comes first in PYTHONPATH."""
    root = str(Path(facts.__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _help(verb: str) -> int:
    print(f"{_USAGE[verb]}\n\nOptions of each group (group=option):")
    for group in sorted(p for p in conf_dir().iterdir() if p.is_dir()):
        print(f"  {group.name:<11}{', '.join(sorted(p.stem for p in group.glob('*.yaml')))}")
    print("\ndocs/settings.md lists every setting. Hydra's flags: --cfg job, --info, -m, --config-dir DIR.")
    return 0
