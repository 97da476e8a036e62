"""The verbs train and plan."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from launcher import facts, run_store
from launcher.cli import data, formatting
from launcher.cli.accounts import hub_access, wandb_check
from launcher.cli.arguments import COMMON_FLAGS, composing_usage
from launcher.cli.cost_question import require_consent
from launcher.cli.follow import follow, interrupted_start
from launcher.cli.formatting import wrap
from launcher.cli.liveness import require_ended
from launcher.cli.starting import earlier_runs
from launcher.cli.starting.interrupts import Interrupts
from launcher.cli.views.memory_view import why_lines
from launcher.cli.views.plan_view import LABEL_WIDTH, plan_json, plan_lines, started_lines, sweep_lines
from launcher.cli.worker_process import check_extra, prepare, run_worker_module, worker_environment
from launcher.clusters.backends import Cluster, StatusReader, cluster_for, status_reader_for
from launcher.clusters.preflight import check_startable, disk_note, folder_problem, push_note
from launcher.config.compose import Composed, require_distinct_runs, run_hydra
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_REFUSED, DataError, Problem, RunError, SubmitError, describe
from launcher.models import stored_checks
from launcher.models.found_model import FoundModel, find_model
from launcher.plan.flops import FAMILIES, missing_sizes
from launcher.plan.launch_plan import DeviceFacts, Facts, LaunchPlan
from launcher.plan.planner import plan as make_plan
from launcher.plan.planner import run_dir_of
from launcher.plan.run_dir import RunDir
from launcher.plan.throughput import SpeedEstimate, estimate_speed
from launcher.run_records import RUNNING_STATES, Attempt
from launcher.security import owners
from launcher.shell_commands import launcher_command

_USAGE = {
    "train": """python -m launcher [train] [FILE] [--follow | --detach] [--yes] [overrides]

Plan, prepare data, start the run. On this machine the command follows the run to its end, on a cluster it returns at once.
--follow (or follow=true) and --detach (or follow=false) override that. With -m it starts several runs. --yes starts runs that
may cost more than run.confirm_usd without a question.""",
    "plan": """python -m launcher plan [FILE] [--why] [--script] [--json] [overrides]

Show the complete plan and start nothing. --why adds the memory of each stage of a step, and the combinations of settings that
were considered; --script the batch script of Slurm. --json prints the plan's file with the keys estimate, checkpoint_gib,
warnings and notes.""",
}
_OWN_FLAGS = {"train": ("--follow", "--detach", "--yes"), "plan": ("--json", "--why", "--script")}
# Ten times the duration on an idle machine.
_ISOLATION_CHECK_S = 150.0
_FOLLOW = {"--follow": True, "follow=true": True, "--detach": False, "follow=false": False}


def run(verb: str, tokens: list[str]) -> int:
    """Compose the settings and execute the verb, once or, with -m, once per job."""
    if "--help" in tokens or "-h" in tokens:
        print(composing_usage(_USAGE[verb]))
        return 0
    as_json, why = "--json" in tokens, verb == "plan" and "--why" in tokens
    shows_script = verb == "plan" and "--script" in tokens
    follows = next((_FOLLOW[token] for token in tokens if token in _FOLLOW), None)
    accepts_cost = verb == "train" and "--yes" in tokens
    own = ("--json", *(["--yes"] if accepts_cost else ()), *(["--why"] if why else ()), *(["--script"] if shows_script else ()))
    rest = [token for token in tokens if token not in own and token not in _FOLLOW]
    jobs: list[Composed] = []
    run_hydra(rest, jobs.append, (*_OWN_FLAGS[verb], *COMMON_FLAGS))
    require_distinct_runs(jobs)
    if verb == "plan":
        taken_names: set[str] = set()
        return max((_plan(job, as_json, why, shows_script, taken_names) for job in jobs), default=0)
    return _train(jobs, follows, accepts_cost)


def _plan(composed: Composed, as_json: bool, why: bool, shows_script: bool, taken_names: set[str]) -> int:
    with composed.located():
        cluster = cluster_for(composed.config.cluster.kind)
        node = _node_of(composed, cluster)
        config = facts.resolve(composed.config, node)
        found = find_model(config.model)
        plan = _plan_with_free_name(config, _checked_facts(config, found, composed, node, runs_code=False), taken_names)
        taken_names.add(plan.run_name)
        notes = (
            _device_note(plan, cluster),
            disk_note(plan),
            found.weights_note,
            data.summarize_findings(plan, fatal=True),
            _gated_note(config),
            composed.origins.dropped_note(),
        )
        speed = _speed(plan, node)
        own_warnings = (_location_warning(plan), earlier_runs.name_warning(config))
        if as_json:
            print(plan_json(plan, *notes, own_warnings=own_warnings, speed=speed, why=why))
            return 0
        print("\n".join(wrap(plan_lines(plan, *notes, own_warnings=own_warnings, speed=speed), LABEL_WIDTH)))
        if why:
            print("\n".join(why_lines(plan)))
        if line := _preview(cluster.preview(plan), shows_script):
            print(line)
    return 0


def _preview(text: str | None, is_wanted: bool) -> str:
    """Return what a scheduler would get, or one line on how to see it; empty if there is nothing to see."""
    if text is None:
        return f"{'script':<{LABEL_WIDTH}}none: this machine starts the ranks itself" if is_wanted else ""
    if is_wanted:
        return f"\n{text.rstrip()}"
    count = text.count("\n")
    # A script has more than a few lines.
    return f"{'script':<{LABEL_WIDTH}}plan --script shows what the scheduler gets ({count} lines)" if count > 1 else text.rstrip()


def _train(jobs: list[Composed], follows: bool | None, accepts_cost: bool) -> int:
    """Start all jobs, after all of them have passed their checks; returns the largest exit code."""
    if any(job.config.cluster.runs_on_every_node for job in jobs):
        from launcher.cli.starting import every_node

        return every_node.train(jobs, follows, accepts_cost)
    plans: list[LaunchPlan] = []
    check_wandb_accounts(jobs)
    for note in dict.fromkeys(job.origins.dropped_note() for job in jobs):
        if note is not None:
            print(f"note: {note}", flush=True)
    for composed in _group_jobs(jobs):
        with composed.located():
            plans.append(prepare_plan(composed, taken_names={plan.run_name for plan in plans}))
    return start_all(plans, follows) if may_start(plans, accepts_cost) else EXIT_REFUSED


def may_start(plans: Sequence[LaunchPlan], accepts_cost: bool) -> bool:
    """Ask about runs that may cost more than run.confirm_usd; prints a line and returns False if they may not start.

    Raises:
        ConfigError: if there is no terminal to ask on.
    """
    if accepts_cost or all(plan.config.run.confirm_usd is None for plan in plans):
        return True

    def estimate(plan: LaunchPlan) -> SpeedEstimate:
        cluster = cluster_for(plan.config.cluster.kind)
        return _speed(plan, lambda: cluster.device(plan.config.cluster))

    if require_consent([(plan, estimate(plan)) for plan in plans]):
        return True
    print("nothing was started")
    return False


def start_all(plans: list[LaunchPlan], follows: bool | None) -> int:
    """Show and start each run, and follow it if requested; returns the largest exit code. After Ctrl-C, no further run starts."""
    codes = []
    started = []
    for number, plan in enumerate(plans, 1):
        cluster = cluster_for(plan.config.cluster.kind)
        print_plan(plan, cluster)
        with Interrupts() as interrupts:
            interrupts.defer()
            run_dir, attempt = start(plan, cluster)
            started.append((plan, cluster.submission_details(run_dir, attempt)))
            if plan.config.cluster.is_followed if follows is None else follows:
                codes.append(follow(run_dir, attempt, cluster, interrupts))
            else:
                print("\n".join(started_lines(run_dir.root, cluster.submission_details(run_dir, attempt))), flush=True)
                if interrupts.received:
                    codes.append(interrupted_start(run_dir))
        if interrupts.received:
            if rest := [plan.run_name for plan in plans[number:]]:
                print(f"not started: {', '.join(rest)}", flush=True)
            break
    if len(started) > 1:
        print("\n".join(sweep_lines(started)))
    return max(codes, default=0)


def print_plan(plan: LaunchPlan, cluster: Cluster) -> None:
    """Print the plan of a run that is about to start."""
    notes = (
        _device_note(plan, cluster),
        disk_note(plan),
        push_note(plan),
        find_model(plan.config.model).weights_note,
        data.summarize_findings(plan, fatal=False),
    )
    lines = plan_lines(plan, *notes, own_warnings=(_location_warning(plan),))
    print("\n".join(wrap(lines, LABEL_WIDTH)), flush=True)


def check_wandb_accounts(jobs: list[Composed]) -> None:
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
    _require_new(RunDir(Path(plan.run_dir)))
    run_dir = run_store.create(plan)
    with run_store.start_lock(run_dir):
        attempt = run_store.create_attempt(run_dir, Attempt(resume_step=None))
        cluster.submit(run_dir, attempt, run_dir.plan)
    return run_dir, attempt


def _require_new(existing: RunDir) -> None:
    """Reject an existing run, with its state if it is running; nothing is read from another user's run."""
    is_own = existing.root.is_dir() and owners.accepts_owner(existing.root.stat().st_uid)
    if is_own and existing.plan.is_file() and existing.status.is_file():
        require_idle(existing, status_reader_for(existing, run_store.load_plan(existing).config.cluster.kind))
    run_store.require_new(existing)


def require_idle(run: RunDir, backend: StatusReader) -> None:
    """Refuse to start a run that is already running.

    Raises:
        SubmitError: with the job or process that runs it.
    """
    status = backend.status(run)
    if status.state not in RUNNING_STATES:
        require_ended(run)
        return
    name = formatting.short(run.root)
    starter = run_store.start_lock_holder(run) if status.job is None else None
    number = run_store.newest_attempt(run)
    where = f"being started by {starter}" if starter is not None else formatting.whereabouts(run, status, number)
    raise SubmitError(
        f"the run is {status.state} already",
        where=str(run.root),
        value=where,
        remedy=f"follow it with: {launcher_command('logs', name, '-f')}, or stop it with: {launcher_command('cancel', name)}",
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
    if (name := composed.config.run.name) is not None:
        # Check this before anything that takes time, and before a sweep starts any of its runs.
        _require_new(RunDir(run_dir_of(composed.config, name, str(Path.cwd()), str(Path.home()))))
    folder = run_dir_of(composed.config, composed.config.run.name or "name", str(Path.cwd()), str(Path.home()))
    parent = Path(folder).parent
    owners.require_own_folder(f"a run in {parent}", parent, "set run.root to a folder that only you can write to")
    config = facts.resolve(composed.config, node)
    found = find_model(config.model)
    facts.check(config, found)
    check_extra(config)
    if not found.is_config_known:
        prepare(config)
        found = find_model(config.model)

    def check(plan: LaunchPlan) -> None:
        check_startable(plan)
        cluster.check(plan)

    collected = _checked_facts(config, found, composed, node, check)
    if facts.prepared_data(config, found) is None:
        prepare(config)
        collected = _checked_facts(config, find_model(config.model), composed, node, check)
        if collected.data is None:
            message = "the data cache is missing or damaged right after it was built"
            remedy = "make sure that no program changes the files while they are read, then try again"
            raise DataError(Problem(message, "data.sources", remedy=remedy))
    data.check(config, collected.data)
    return _plan_with_free_name(config, collected, taken_names)


def _node_of(composed: Composed, cluster: Cluster) -> Callable[[], DeviceFacts]:
    """Return a function that asks the backend for a node's devices only once: a scheduler may take seconds to answer."""
    return functools.cache(lambda: cluster.device(composed.config.cluster))


def _location_warning(plan: LaunchPlan) -> str | None:
    """Return why the run directory cannot be created, or which parent folder lets other users replace it, or None."""
    if problem := folder_problem(Path(plan.run_dir)):
        return f"train will be refused: {problem.message}; {problem.remedy}"
    problem = owners.folder_problem(f"a run in {Path(plan.run_dir).parent}", Path(plan.run_dir).parent)
    return f"train, resume and export will be refused: {problem.message}; {problem.remedy}" if problem else None


def _speed(plan: LaunchPlan, node: Callable[[], DeviceFacts]) -> SpeedEstimate:
    """Estimate the speed of a run on the GPUs in its settings, or else on a node's GPUs."""
    gpu = plan.config.cluster.gpu_type or (node().name if plan.topology.device == "cuda" else "")
    return estimate_speed(plan, gpu, earlier_runs.find_measured_mfu(plan, gpu))


def _device_note(plan: LaunchPlan, cluster: Cluster) -> str | None:
    """Return why a run is planned for the CPU of a node that may have GPUs, or None if nothing is wrong."""
    problem = cluster.device(plan.config.cluster).problem if plan.topology.device == "cpu" else ""
    return f"no GPU is used: {problem}; look at it with nvidia-smi" if problem else None


def _gated_note(config: RunConfig) -> str | None:
    problem = hub_access.gated_problem(config.model)
    return f"train will be refused: {problem.message}; {problem.remedy}" if problem else None


def _checked_facts(
    config: RunConfig,
    found: FoundModel,
    composed: Composed,
    node: Callable[[], DeviceFacts],
    check: Callable[[LaunchPlan], None] = lambda plan: None,
    runs_code: bool = True,
) -> Facts:
    """Collect the facts of a run, with the verdict of a probe whether the model sees later tokens or neighboring documents.

    Whatever the planner or `check` can reject immediately is rejected before the process of that probe starts. Without
    `runs_code`, a model with code of its own is not probed: the settings may be someone else's.
    """
    collected = facts.gather(config, found, composed.overrides, node())
    # The estimate for layers that the plan does not know may be far off. The probe also counts the parameters.
    model = collected.model
    is_counted = model.num_params_exact or (model.model_type in FAMILIES and not missing_sizes(model))
    if is_counted:
        check(make_plan(config, collected))
    if facts.needs_isolation_check(config, model):
        problem = _probe_model(config, runs_code)
        if problem is None:
            collected = facts.gather(config, find_model(config.model), composed.overrides, node())
        else:
            # The ranks measure it on the loaded model.
            unknown = stored_checks.unknown_verdict(config.model, problem)
            collected = collected.model_copy(update={"model": model.model_copy(update={"isolation": unknown})})
    if not is_counted:
        check(make_plan(config, collected))
    return collected


def _probe_model(config: RunConfig, runs_code: bool) -> str | None:
    """Run the process that probes the model and stores what it finds; return why there is no verdict, or None."""
    if config.model.trust_remote_code and not runs_code:
        return "plan does not run the code of a model"
    condition = (
        "packed documents do not affect each other in this model" if config.data.packing else "this model sees no later tokens"
    )
    print(f"checking that {condition} (once)", file=sys.stderr, flush=True)
    try:
        run_worker_module("launcher.worker.checks.model_check", config, timeout_s=_ISOLATION_CHECK_S)
    except RunError as error:
        return describe(error)
    return None


def _plan_with_free_name(config: RunConfig, collected: Facts, taken_names: set[str]) -> LaunchPlan:
    """Plan a job under a generated name that no run has; a name chosen by the user is never changed."""
    plan = make_plan(config, collected)
    while config.run.name is None and (plan.run_name in taken_names or Path(plan.run_dir).exists()):
        later = datetime.fromisoformat(collected.provenance.created_at) + timedelta(seconds=1)
        provenance = collected.provenance.model_copy(update={"created_at": later.strftime("%Y-%m-%dT%H:%M:%SZ")})
        collected = collected.model_copy(update={"provenance": provenance})
        plan = make_plan(config, collected)
    return plan
