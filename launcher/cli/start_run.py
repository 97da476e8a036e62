"""Plan one run, prepare its model and data, check it against the cluster, and start it; the verbs that start runs share this."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path

from launcher import facts
from launcher.cli.accounts import check_wandb
from launcher.cli.render import terminal
from launcher.cli.render.sections import Rows
from launcher.cli.status import require_idle
from launcher.cli.worker_process import check_extra, prepare, run_worker_module
from launcher.clusters.backends import Cluster, cluster_for, status_reader_for
from launcher.clusters.preflight import check_startable, folder_problem
from launcher.config.compose import Composed
from launcher.config.schema import RunConfig
from launcher.data.checks import findings
from launcher.errors import ConfigError, DataError, Problem, RunError, describe
from launcher.models import stored_checks
from launcher.models.found_model import FoundModel, find_model
from launcher.plan.flops import FAMILIES, missing_sizes
from launcher.plan.launch_plan import DeviceFacts, Facts, LaunchPlan
from launcher.plan.planner import plan as make_plan
from launcher.plan.planner import run_dir_of
from launcher.plan.run_dir import RunDir
from launcher.plan.throughput import SpeedEstimate, estimate_speed
from launcher.runs import run_store
from launcher.runs.run_records import Attempt
from launcher.security import folders
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking.goodput import largest_usd

_LABEL_COLUMNS = 11
# Ten times the duration on an idle machine.
_ISOLATION_CHECK_S = 150.0


def prepare_plan(composed: Composed, taken_names: set[str]) -> LaunchPlan:
    """Plan a job, prepare its model and data, and check the plan against the cluster; starts nothing."""
    cluster = cluster_for(composed.config.cluster.kind)
    node = node_devices(composed, cluster)
    if (name := composed.config.run.name) is not None:
        # Check this before anything that takes time, and before a sweep starts any of its runs.
        _require_new(choose_run_dir(composed.config, name))
    parent = choose_run_dir(composed.config, name or "name").root.parent
    folders.require_own_folder(f"a run in {parent}", parent, "set run.root to a folder that only you can write to")
    config = facts.resolve_settings(composed.config, node)
    found = find_model(config.model)
    facts.check(config, found)
    check_extra(config)
    check_wandb(config)
    if not found.is_config_known:
        prepare(config)
        found = find_model(config.model)

    def check(plan: LaunchPlan) -> None:
        check_startable(plan)
        cluster.check(plan)

    collected = gather_facts(config, found, composed, node, check)
    if facts.find_prepared_data(config, found) is None:
        prepare(config)
        collected = gather_facts(config, find_model(config.model), composed, node, check)
        if collected.data is None:
            message = "the data cache is missing or damaged right after it was built"
            remedy = "make sure that no program changes the files while they are read, then try again"
            raise DataError(Problem(message, "data.sources", remedy=remedy))
    if (built := collected.data) is not None:
        findings.refuse(findings.read(built.cache_dir), config.data.checks)
    return plan_with_free_name(config, collected, taken_names)


def may_start(plans: Sequence[LaunchPlan], accepts_cost: bool) -> bool:
    """Ask about runs that may cost more than run.confirm_usd; prints a line and returns False if they may not start."""
    if accepts_cost or all(plan.config.run.confirm_usd is None for plan in plans):
        return True
    devices = (functools.partial(cluster_for(plan.config.cluster.kind).device, plan.config.cluster) for plan in plans)
    if require_consent([(plan, estimate_run_speed(plan, node)) for plan, node in zip(plans, devices, strict=True)]):
        return True
    print("nothing was started")
    return False


def require_consent(planned: Sequence[tuple[LaunchPlan, SpeedEstimate]]) -> bool:
    """Ask on the terminal whether runs above run.confirm_usd, which one of them has, may start; returns True if they may.

    The lowest run.confirm_usd in a sweep is compared with the total cost of its runs.
    """
    limits = [plan.config.run.confirm_usd for plan, _ in planned if plan.config.run.confirm_usd is not None]
    # CPUs without a price cost nothing.
    costs = [largest_usd(plan, speed) for plan, speed in planned if plan.topology.device == "cuda" or plan.price is not None]
    known = [usd for usd in costs if usd is not None]
    unknown = len(costs) - len(known)
    if not unknown and sum(known) <= min(limits):
        return True
    runs = f"{len(planned)} runs" if len(planned) > 1 else "the run"
    if not unknown:
        message = f"{runs} may cost up to ${sum(known):,.2f}"
    elif known:
        message = f"{runs} may cost more than ${sum(known):,.2f}: the cost of {unknown} is not known"
    else:
        message = f"the cost of {runs} is not known"
    where = f"run.confirm_usd={min(limits):g}"
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        remedy = "to start without a question, add --yes; or raise run.confirm_usd, or limit the cost with run.max_usd"
        raise ConfigError(f"{message}, and there is no terminal to ask on", where=where, remedy=remedy)
    return terminal.read_yes(f"{message} ({where}). Start?")


def start_run(plan: LaunchPlan, cluster: Cluster) -> tuple[RunDir, int]:
    """Create the run directory of a plan and submit the first attempt; returns the directory and the attempt's number."""
    _require_new(RunDir(Path(plan.run_dir)))
    run_dir = run_store.create(plan)
    with run_store.start_lock(run_dir):
        attempt = run_store.create_attempt(run_dir, Attempt(resume_step=None))
        cluster.submit(run_dir, attempt, run_dir.plan)
    return run_dir, attempt


def show_started(run: RunDir, details: Sequence[tuple[str, str]]) -> None:
    """Print what a backend tells about a started attempt, the run's directory, and how to follow and stop it."""
    name = short_path(run.root)
    rows = [
        *((label, short_path(value) if value.startswith("/") else value) for label, value in details),
        ("directory", name),
        ("follow it", launcher_command("logs", name, "-f")),
        ("its state", launcher_command("status", name)),
        ("stop it", launcher_command("cancel", name)),
    ]
    print()
    terminal.show(Rows(rows, wraps=False), label_columns=_LABEL_COLUMNS)


def choose_run_dir(config: RunConfig, name: str) -> RunDir:
    """Return the directory of a run with this name that this command starts."""
    return RunDir(run_dir_of(config, name, str(Path.cwd()), str(Path.home())))


def _require_new(existing: RunDir) -> None:
    """Reject an existing run, with its state if it is running; nothing is read from another user's run."""
    is_own = existing.root.is_dir() and folders.accepts_owner(existing.root.stat().st_uid)
    if is_own and existing.plan.is_file():
        require_idle(existing, status_reader_for(existing, run_store.load_plan(existing).config.cluster.kind))
    run_store.require_new(existing)


def node_devices(composed: Composed, cluster: Cluster) -> Callable[[], DeviceFacts]:
    """Return a function that asks the backend for a node's devices only once: a scheduler may take seconds to answer."""
    return functools.cache(lambda: cluster.device(composed.config.cluster))


def location_warning(plan: LaunchPlan) -> str | None:
    """Return why the run directory cannot be created, or which parent folder lets other users replace it, or None."""
    if problem := folder_problem(Path(plan.run_dir)):
        return f"train will be refused: {problem.message}; {problem.remedy}"
    problem = folders.folder_problem(f"a run in {Path(plan.run_dir).parent}", Path(plan.run_dir).parent)
    return f"train, resume and export will be refused: {problem.message}; {problem.remedy}" if problem else None


def estimate_run_speed(plan: LaunchPlan, node: Callable[[], DeviceFacts]) -> SpeedEstimate:
    """Estimate the speed of a run on the GPUs in its settings, or else on a node's GPUs."""
    gpu = plan.config.cluster.gpu_type or (node().name if plan.topology.device == "cuda" else "")
    return estimate_speed(plan, gpu)


def device_note(plan: LaunchPlan, cluster: Cluster) -> str | None:
    """Return why a run is planned for the CPU of a node that may have GPUs, or None if nothing is wrong."""
    problem = cluster.device(plan.config.cluster).problem if plan.topology.device == "cpu" else ""
    return f"no GPU is used: {problem}; look at it with nvidia-smi" if problem else None


def gather_facts(
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
        problem = ""
        if config.model.trust_remote_code and not runs_code:
            problem = "plan does not run the code of a model"
        else:
            packed, unpacked = "packed documents do not affect each other in this model", "this model sees no later tokens"
            print(f"checking that {packed if config.data.packing else unpacked} (once)", file=sys.stderr, flush=True)
            try:
                run_worker_module("launcher.worker.checks.model_check", config, timeout_s=_ISOLATION_CHECK_S)
            except RunError as error:
                problem = describe(error)
        if problem:
            # The ranks measure it on the loaded model.
            unknown = stored_checks.unknown_verdict(config.model, problem)
            collected = collected.model_copy(update={"model": model.model_copy(update={"isolation": unknown})})
        else:
            collected = facts.gather(config, find_model(config.model), composed.overrides, node())
    if not is_counted:
        check(make_plan(config, collected))
    return collected


def plan_with_free_name(config: RunConfig, collected: Facts, taken_names: set[str]) -> LaunchPlan:
    """Plan a job under a generated name that no run has; a name chosen by the user is never changed."""
    plan = make_plan(config, collected)
    while config.run.name is None and (plan.run_name in taken_names or Path(plan.run_dir).exists()):
        later = datetime.fromisoformat(collected.provenance.created_at) + timedelta(seconds=1)
        provenance = collected.provenance.model_copy(update={"created_at": later.strftime("%Y-%m-%dT%H:%M:%SZ")})
        collected = collected.model_copy(update={"provenance": provenance})
        plan = make_plan(config, collected)
    return plan
