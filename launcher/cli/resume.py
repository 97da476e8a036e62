"""Another attempt of a run: choose the checkpoint, plan again, reject a run that cannot continue, and start the attempt."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import clock, facts
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.checkpoint.state import read_state
from launcher.cli.accounts import check_wandb
from launcher.cli.checkpoints import verify
from launcher.cli.follow import Interrupts
from launcher.cli.plan import remarks
from launcher.cli.start_run import may_start
from launcher.cli.status import require_idle
from launcher.cli.worker_process import check_extra, prepare, prepare_eval_sets
from launcher.clusters.backends import Cluster
from launcher.clusters.preflight import check_startable, disk_note, push_note
from launcher.config.command_line import override_key
from launcher.config.resume import Difference, differences, differing, require_same, table, with_overrides
from launcher.config.schema import RunConfig
from launcher.data import cache_store
from launcher.data.sources.reading import describe_origin, list_inputs
from launcher.errors import CheckpointError, ConfigError, DamagedCheckpoint, DataError, LauncherError, Problem, SubmitError
from launcher.models.found_model import find_model
from launcher.plan.launch_plan import DataFacts, Facts, LaunchPlan, ModelFacts
from launcher.plan.planner import plan as make_plan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.plan.steps import describe_changed_rate
from launcher.runs import run_store
from launcher.runs.run_records import Attempt, read_export
from launcher.shell_commands import launcher_command, short_path
from launcher.tracking import goodput
from launcher.tracking.run_metrics import has_trained

# Marks numbers of the plan in a list of differences, such as plan.model.num_layers.
_PLAN_PREFIX = "plan."
# Settings that name data files; a resume that sets one requests the rows that these files contain today.
_SOURCE_KEYS = {"data.path", "data.sources", "data.eval_path"}
_NEW_ROWS = (
    "remove the path to continue with the rows as they were built; or train on today's rows, in a different order from those "
    "trained so far: {command} --force ..., or start another run with these weights"
)
_DIGEST_CHARS = 8


def resume_run(
    run: RunDir,
    plan: LaunchPlan,
    cluster: Cluster,
    overrides: list[str],
    step: int | None,
    interrupts: Interrupts,
    force: bool = False,
    automatic: bool = False,
    accepts_cost: bool = False,
) -> int:
    """Submit a further attempt of a run that has ended, from the checkpoint of `step` or the newest one; returns its number.

    Before a run gets more steps than it had, run.confirm_usd applies as at its start, unless `accepts_cost`.

    A run that has trained no step, for example because it was cancelled in the queue, begins with its initial weights. An
    `automatic` attempt counts toward the retry budgets with the attempts before it, and starts over if no checkpoint was ever
    committed.
    """
    require_idle(run, cluster)
    # Settings are judged before the checkpoint is verified, which takes minutes for a large model.
    with_overrides(plan.config, overrides, plan.run_name)
    begins_again = automatic and store.newest_step(run.checkpoints) is None
    checkpoint = None if begins_again else _choose_checkpoint(run, step)
    if checkpoint is not None and not run.attempts.is_dir():
        plan = run_store.find_plan(run, checkpoint.manifest.plan_digest) or plan
        print("note: attempts/ is missing; it is created again, and limits of time and cost count from this attempt on")
    former = plan
    plan = _plan_again(plan, run, checkpoint, overrides, cluster, force)
    if checkpoint is not None:
        _require_steps_left(run, plan, checkpoint)
    _require_budget(run, plan)
    check_startable(plan)
    cluster.check(plan)
    for note in (check_wandb(plan.config), disk_note(plan), push_note(plan)):
        if note:
            print(f"note: {note}")
    for line in list_new_remarks(plan, former):
        print(line)
    if checkpoint is not None and (note := describe_replaced_export(run, plan, checkpoint.step)):
        print(f"note: {note}")
    is_longer = (plan.batch.max_steps or 0) > (former.batch.max_steps or 0)
    if is_longer and not automatic and not may_start([plan], accepts_cost):
        raise SubmitError("the run was not continued, as you answered", where=str(run.root), remedy="answer y to continue it")
    # Changes to the run begin here.
    interrupts.defer()
    if checkpoint is not None:
        for path in store.set_aside_after(run.checkpoints, checkpoint.step):
            print(f"set aside: {short_path(path)}")
    if not run_store.is_code_current(run):
        earlier = run_store.replace_code(run, run_store.newest_attempt(run))
        message = "the code of this run reads other plans than this launcher writes: the current code replaces it"
        print(f"{message}, {earlier.name} keeps it")
    resume_step = None if checkpoint is None else checkpoint.step
    attempt = run_store.create_attempt(run, Attempt(resume_step, automatic=automatic, pinned=step is not None))
    plan_path = run_store.write_plan(run, attempt, plan)
    run_store.update_status(run, state="pending", job=None, max_steps=plan.batch.max_steps, message="")
    missing = "no checkpoint was saved yet" if begins_again else "no step was trained yet"
    start = f"the beginning: {missing}" if resume_step is None else f"step {resume_step} of {plan.batch.max_steps}"
    print(f"continuing {plan.run_name} from {start}", flush=True)
    cluster.submit(run, attempt, plan_path)
    return attempt


def list_new_remarks(plan: LaunchPlan, former: LaunchPlan) -> list[str]:
    """Return the warnings and notes of a plan that the former one does not have, such as a warm-up longer than the run."""
    known = remarks(former)
    return [line for line in remarks(plan) if line not in known]


def describe_replaced_export(run: RunDir, plan: LaunchPlan, step: int) -> str | None:
    """Say that a run's result will be replaced; None unless it is completed, or has exported the step that it continues from."""
    exported = read_export(run) if plan.config.export.enabled else None
    if exported is None or (exported.step != step and run_store.read_status(run).state != "completed"):
        return None
    holds = f"{short_path(run.export)} holds step {exported.step}"
    return f"{holds} and is replaced when the run ends; to keep this model, copy the folder before then"


def _require_steps_left(run: RunDir, plan: LaunchPlan, checkpoint: Checkpoint) -> None:
    """Reject a checkpoint at or after the last step, unless the run has ended there without its export."""
    max_steps = plan.batch.max_steps
    export = launcher_command("export", short_path(run.root), "--step", str(checkpoint.step))
    if max_steps is not None and checkpoint.step > max_steps:
        key = "train.epochs" if plan.config.train.max_steps is None else "train.max_steps"
        raise SubmitError(
            f"the checkpoint is of step {checkpoint.step}, and {key} ends the run at step {max_steps}",
            where=key,
            value=str(plan.config.train.epochs if key == "train.epochs" else max_steps),
            remedy=f"raise it, go back with --step, or export this step with: {export}",
        )
    if checkpoint.step == max_steps and (store.newest_step(run.checkpoints) or 0) > checkpoint.step:
        raise SubmitError(
            f"no step is left to train: the run would end at step {max_steps}, where it would begin",
            where="--step",
            value=str(checkpoint.step),
            remedy=f"raise train.max_steps, or export this step with: {export}",
        )
    exported = read_export(run)
    is_completed = run_store.read_status(run).state == "completed"
    has_result = is_completed and not plan.config.export.enabled
    if exported is not None:
        has_result = is_completed or exported.step == checkpoint.step
    if checkpoint.step == max_steps and has_result:
        raise SubmitError(
            f"the run is complete: step {checkpoint.step} of {max_steps}",
            where=str(run.root),
            remedy=f"train further with: {_resume_command(run)} train.max_steps=...",
        )
    if exported is not None and is_completed and plan.config.eval.stop_after:
        kept = read_state(checkpoint.path).extra.get("early_stopping") or {}
        if plan.config.eval.stop_after <= int(kept.get("num_without_improvement", 0)):
            raise SubmitError(
                f"the run is complete: it ended at step {checkpoint.step} because of eval.stop_after",
                where=str(run.root),
                remedy=f"train further with: {_resume_command(run)} eval.stop_after=0",
            )


def _require_budget(run: RunDir, plan: LaunchPlan) -> None:
    """Reject an attempt that would stop after one step."""
    limits, problems, command = plan.limits, [], _resume_command(run)
    if limits.max_seconds is None and limits.max_gpu_seconds is None:
        return
    try:
        spent = goodput.read(run, clock.now(), "pending", plan)
    except (OSError, LauncherError, KeyError, TypeError, ValueError) as error:
        line, *_ = str(error).partition("\n")
        print(f"note: the time and cost so far cannot be read, so the limits count from this attempt on: {line}")
        return
    if limits.max_seconds is not None and spent.held_s >= limits.max_seconds:
        value, remedy = f"it has run for {spent.held_s / 3600:.2f} hours", f"raise it: {command} run.max_hours=..."
        problems.append(Problem("the run has used up run.max_hours", "run.max_hours", value, remedy))
    max_usd = plan.config.run.max_usd
    if max_usd is not None and spent.usd is not None and spent.usd >= max_usd:
        value = f"it has cost ${spent.usd:,.2f}, for {spent.gpu_s / 3600:,.2f} GPU hours"
        remedy = f"raise it: {command} run.max_usd=..."
        problems.append(Problem("the run has used up run.max_usd", "run.max_usd", value, remedy))
    if problems:
        raise SubmitError(problems)


def _choose_checkpoint(run: RunDir, step: int | None) -> Checkpoint | None:
    """Return the newest checkpoint, or the one at `step`; None for a run that has trained no step.

    The ranks verify the newest checkpoint when they read it. A checkpoint at a chosen step is verified here, because later
    checkpoints are set aside for it.
    """
    is_untrained = not has_trained(run, run_store.read_status(run))
    if step is None and is_untrained:
        return None
    try:
        if step is None:
            return store.get_latest(run.checkpoints, or_older=True)
        checkpoint = store.get_at_step(run.checkpoints, step)
        if error := verify([checkpoint])[checkpoint.path]:
            is_damaged = isinstance(error, DamagedCheckpoint)
            raise store.damaged_step_error(step, error.problems, run.checkpoints) if is_damaged else error
        return checkpoint
    except CheckpointError as error:
        fallback = "if the run has not saved a checkpoint yet, start it again under another run.name"
        if is_untrained:
            fallback = "leave out --step: the run has trained no step, and begins with its plan"
        raise SubmitError([replace(problem, remedy=problem.remedy or fallback) for problem in error.problems]) from None


def _resume_command(run: RunDir) -> str:
    """Return the command that resumes a run, for a remedy."""
    return launcher_command("resume", short_path(run.root))


def _plan_again(
    plan: LaunchPlan, run: RunDir, checkpoint: Checkpoint | None, overrides: list[str], cluster: Cluster, force: bool
) -> LaunchPlan:
    """Plan the run with changed settings and its directory's current path; without a checkpoint, more settings may change."""
    config = with_overrides(plan.config, overrides, plan.run_name)
    check_extra(config)
    saved_plan = (_find_saved_plan(run, checkpoint, force) if checkpoint is not None else None) or plan
    where = short_path(run.root if checkpoint is None else checkpoint.path)
    accepts = force or checkpoint is None
    # Overrides in this command, and manual changes to plan.json.
    paths = {"path", "tokenizer_path", "has_weights", "isolation"}
    saved_model, model_now = (one.model.model_dump(exclude=paths) for one in (saved_plan, plan))
    changes = [
        *differing(saved_model, model_now, f"{_PLAN_PREFIX}model"),
        *differences(saved_plan.config, config),
        *_compare_data(saved_plan.data, plan.data),
    ]
    is_newest = checkpoint is not None and checkpoint.step == store.newest_step(run.checkpoints)
    known = _list_accepted(saved_plan, plan) if is_newest else []
    keys = tuple(map(override_key, overrides))
    asks_for_data = not _SOURCE_KEYS.isdisjoint(keys)
    remedy = _NEW_ROWS.format(command=_resume_command(run)) if asks_for_data else ""
    require_same([one for one in changes if one not in known], accepts, run.root, where, remedy)
    model = _restore_model(plan, config)
    data = _restore_data(plan, config, model, asks_for_data)
    # Source files may have changed, so a rebuilt cache may contain different rows.
    data_changes = _compare_data(saved_plan.data, data)
    changes = [*differences(saved_plan.config, config), *data_changes]
    require_same([one for one in changes if one not in known], accepts, run.root, where, remedy)
    if changes:
        print(
            f"continuing with differences from the {'plan' if checkpoint is None else 'checkpoint'}:\n{table(changes)}",
            flush=True,
        )
    # Differences that --force accepted have no override yet.
    accepted = [f"{change.key}={change.requested}" for change in changes if not change.key.startswith(keys)]
    facts_of_run = Facts(
        working_dir=str(run.root.parent),
        device=cluster.device(config.cluster),
        model=model,
        data=data,
        eval_sets=_restore_eval_sets(plan, config, model),
        provenance=plan.provenance.model_copy(update={"overrides": (*plan.provenance.overrides, *overrides, *accepted)}),
        lineage=plan.lineage,
    )
    identity = {"run_name": plan.run_name, "run_dir": str(run.root), "wandb_id": plan.wandb_id}
    next_plan = make_plan(config, facts_of_run).model_copy(update=identity)
    if checkpoint is not None:
        for describe in (describe_moved_rows, describe_changed_rate):
            if note := describe(saved_plan, next_plan, checkpoint.step):
                print(f"note: {note}", flush=True)
    return next_plan


def _list_accepted(saved_plan: LaunchPlan, plan: LaunchPlan) -> list[Difference]:
    """Return the differences from the checkpoint that --force accepted for an attempt that has not saved since."""
    accepted = plan.provenance.overrides[len(saved_plan.provenance.overrides) :]
    keys = tuple(map(override_key, accepted))
    changes = [*differences(saved_plan.config, plan.config), *_compare_data(saved_plan.data, plan.data)]
    of_data = () if _SOURCE_KEYS.isdisjoint(keys) else ("plan.data", "data.")
    return [one for one in changes if one.key.startswith((*keys, *of_data))]


def describe_moved_rows(saved_plan: LaunchPlan, next_plan: LaunchPlan, step: int) -> str | None:
    """Describe which rows a changed batch size or other data skip or repeat; None if the rows continue without a gap."""
    num_trained, next_row = (step * plan.batch.global_batch_size for plan in (saved_plan, next_plan))
    if next_plan.data is not None and _compare_data(saved_plan.data, next_plan.data):
        begins = next_row % max(1, next_plan.data.num_rows)
        if begins == 0:
            return None
        with_all = launcher_command(f"model.path=run:{next_plan.run_name}", "data.path=...")
        return (
            f"the data differ, so the rows have another order: step {step + 1} begins at row {begins:,} of "
            f"{next_plan.data.num_rows:,}, and this epoch trains on no row before it; to train on all rows, start another run "
            f"with these weights: {with_all}"
        )
    if num_trained == next_row:
        return None
    if not next_plan.config.data.packing:
        return "another batch size changes the order of the rows: in this epoch some rows are repeated and others are skipped"
    change = f"{format_count(abs(next_row - num_trained), 'row')} {'skipped' if next_row > num_trained else 'repeated'}"
    return f"step {step} starts at row {next_row:,} of the order after {format_count(num_trained, 'trained row')}: {change}"


def _find_saved_plan(run: RunDir, checkpoint: Checkpoint, force: bool) -> LaunchPlan | None:
    """Return the plan that a checkpoint was saved under; None if it is missing and `force` is true."""
    digest = checkpoint.manifest.plan_digest
    saved = run_store.find_plan(run, digest)
    if saved is None and not force:
        raise ConfigError(
            "the run directory no longer has the plan of this checkpoint, so changes since then are unknown",
            where=short_path(checkpoint.path),
            value=f"its digest is {digest}",
            remedy=f"undo the changes in plan.json, or continue with the plan as it is: {_resume_command(run)} --force",
        )
    return saved


def _compare_data(saved: DataFacts | None, current: DataFacts | None) -> list[Difference]:
    if saved and current and saved.digest and saved.contents() == current.contents():
        # The key also changes with the versions of libraries and of the cache format; the digest depends only on the rows.
        return []
    return differing(_list_contents(saved), _list_contents(current), f"{_PLAN_PREFIX}data")


def _list_contents(data: DataFacts | None) -> dict[str, Any]:
    """Return the content of a data cache, with its key instead of its path."""
    return {} if data is None else {"key": Path(data.cache_dir).name, **data.contents()}


def _restore_model(plan: LaunchPlan, config: RunConfig) -> ModelFacts:
    """Return the model's facts; downloads or converts the model again if its folders are gone."""
    model = plan.model
    folders = [model.tokenizer_path, model.path] if config.model.path else [model.tokenizer_path]
    if all(folder is not None and Path(folder).is_dir() for folder in folders):
        return model
    print("the folder of the model or tokenizer in the plan is gone; preparing it again", flush=True)
    prepare(config)
    found = find_model(config.model)
    restored = {"path": found.folder, "tokenizer_path": found.tokenizer}
    return model.model_copy(update={key: folder and str(folder) for key, folder in restored.items()})


def _restore_data(plan: LaunchPlan, config: RunConfig, model: ModelFacts, asks_for_data: bool) -> DataFacts | None:
    """Return the facts of the data cache; builds it again if it is not the one that the plan records.

    The recorded rows count, even if the files have changed or are gone, unless the command requests the files' data.
    """
    recorded = plan.data
    if recorded is not None and _is_same_data(config, plan.config):
        if cache_store.read(Path(recorded.cache_dir)) != recorded:
            print("the data cache differs from the one in the plan; building it again from the sources", flush=True)
        elif changed := _find_changed_sources(recorded, config):
            print(f"note: changed since the rows of this run were built: {'; '.join(changed)}", flush=True)
            if not asks_for_data:
                print(f"note: the run continues with the {format_count(recorded.num_rows, 'row')} as built", flush=True)
                return recorded
        else:
            return recorded
    prepare(config)
    built = facts.data_facts(config, model.tokenizer_path)
    if built is None:
        raise DataError(Problem("the data cache is missing or damaged right after it was built", "data", remedy="try again"))
    return built


def _is_same_data(one: RunConfig, other: RunConfig) -> bool:
    """Return whether the settings describe the same rows; the number of workers and the group of the cache do not matter."""
    free = {"workers", "cache_group"}
    return one.data.model_dump(exclude=free) == other.data.model_dump(exclude=free)


def _restore_eval_sets(plan: LaunchPlan, config: RunConfig, model: ModelFacts) -> dict[str, DataFacts]:
    """Return the facts of the eval.sets caches; the recorded rows count, and missing caches are built."""
    kept: dict[str, DataFacts] = {}
    rows_of = {one.name: one.rows for one in plan.config.eval.all_sets}
    for one in config.eval.all_sets if _is_same_data(config, plan.config) else ():
        recorded = plan.eval_sets.get(one.name)
        is_same = recorded is not None and rows_of.get(one.name) == one.rows
        if recorded is not None and is_same and cache_store.read(Path(recorded.cache_dir)) == recorded:
            kept[one.name] = recorded
    restored = prepare_eval_sets(config, kept, model.tokenizer_path)
    for name, counts in restored.items():
        if name in plan.eval_sets and plan.eval_sets[name].contents() != counts.contents():
            print(f"note: the rows of the evaluation set {name} have changed: earlier losses do not compare", flush=True)
    return restored


def _find_changed_sources(recorded: DataFacts, config: RunConfig) -> list[str]:
    """Return the sources whose files changed since the cache was built, each with both digests; reads all of the local files.

    Unreadable sources, such as removed files, are left out: the rows do not depend on them any more.
    """
    inputs, changed = list_inputs(config.data), []
    for source, built in zip(inputs, cache_store.read_report(recorded.cache_dir)["sources"], strict=False):
        with suppress(DataError, OSError, KeyError, TypeError):
            before, today = built["digest"], describe_origin(source)["digest"]
            if before != today:
                changed.append(f"{source.path} (digest {before[:_DIGEST_CHARS]} then, {today[:_DIGEST_CHARS]} today)")
    return changed
