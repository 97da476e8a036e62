"""Start a further attempt of a run: choose the checkpoint, plan again, and refuse what must not differ."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import code_snapshot, facts, model_source, run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.checkpoint.state import read_state
from launcher.cli import formatting
from launcher.cli.accounts import wandb_check
from launcher.cli.checkpoints import verify
from launcher.cli.cleanup import run_folders
from launcher.cli.launch import require_idle
from launcher.cli.starting import eval_set_caches
from launcher.cli.starting.interrupts import Interrupts
from launcher.cli.worker_process import check_extra, prepare, worker_environment
from launcher.clusters.backends import Cluster
from launcher.clusters.preflight import check_startable, disk_note, push_note
from launcher.config.resume import Difference, differences, differing, require_same, table, with_overrides
from launcher.config.schema import RunConfig
from launcher.config.sections.evaluation import EvalSet
from launcher.data import sources
from launcher.data.cache import cache_store
from launcher.errors import CheckpointError, ConfigError, DamagedCheckpoint, DataError, LauncherError, Problem, SubmitError
from launcher.plan.launch_plan import DataFacts, Facts, LaunchPlan, ModelFacts
from launcher.plan.planner import plan as make_plan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt, read_export
from launcher.shell_commands import launcher_command
from launcher.tracking import goodput
from launcher.tracking.metrics_tail import has_trained, read_tail

# Marks numbers of the plan in a list of differences, such as plan.model.num_layers.
_PLAN_PREFIX = "plan."
# Settings that name the files of the data; a resume that sets one asks for the rows that these files hold today.
_SOURCE_KEYS = ("data.path=", "data.sources=", "data.eval_path=")
_NEW_ROWS = (
    "leave out the path to continue with the rows as they were built; or train on the rows of today, in another order than those "
    "trained so far: {command} --force ..., or another run with these weights"
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
) -> int:
    """Submit a further attempt of a run that has ended, from the checkpoint of `step` or the newest one; returns its number.

    A run that has trained no step, such as one that was cancelled in the queue, begins with its initial weights. An `automatic`
    attempt counts in the retry budgets with those before it, and begins again where no checkpoint was ever committed.

    Raises:
        ConfigError: if settings or data differ from those of the checkpoint and `force` is false.
        SubmitError: if the run is running, is complete, has used up a limit, or has no such checkpoint.
    """
    require_idle(run, cluster)
    begins_again = automatic and store.newest_step(run.checkpoints) is None
    checkpoint = None if begins_again else _choose_checkpoint(run, step)
    if checkpoint is not None and not run.attempts.is_dir():
        plan = run_store.find_plan(run, checkpoint.manifest.plan_digest) or plan
        print("note: attempts/ is missing; it is made again, and limits of time and cost count from this attempt on")
    plan = _plan_again(plan, run, checkpoint, overrides, cluster, force)
    if checkpoint is not None:
        _require_steps_left(run, plan, checkpoint)
    _require_budget(run, plan)
    check_startable(plan)
    cluster.check(plan)
    for note in (*wandb_check.check(plan.config, worker_environment()), disk_note(plan), push_note(plan)):
        if note:
            print(f"note: {note}")
    # From here on the run is changed.
    interrupts.defer()
    if checkpoint is not None:
        for path in store.set_aside_after(run.checkpoints, checkpoint.step):
            print(f"set aside: {formatting.short(path)}")
        if note := _describe_lost_metrics(run, plan, checkpoint.step):
            print(f"note: {note}")
    _replace_unusable_code(run)
    resume_step = None if checkpoint is None else checkpoint.step
    run_folders.remember(run.root.parent)
    attempt = run_store.create_attempt(run, Attempt(resume_step, automatic=automatic, pinned=step is not None))
    plan_path = run_store.write_plan(run, attempt, plan)
    run_store.update_status(run, state="pending", job=None, max_steps=plan.batch.max_steps, message="")
    missing = "no checkpoint was saved yet" if begins_again else "no step was trained yet"
    start = f"the beginning: {missing}" if resume_step is None else f"step {resume_step} of {plan.batch.max_steps}"
    print(f"continuing {plan.run_name} from {start}", flush=True)
    cluster.submit(run, attempt, plan_path)
    return attempt


def _resume_command(run: RunDir) -> str:
    return launcher_command("resume", formatting.short(run.root))


def _require_steps_left(run: RunDir, plan: LaunchPlan, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint at or after the last step, unless the export of that step is missing.

    Raises:
        SubmitError: with what to do instead.
    """
    max_steps = plan.batch.max_steps
    if max_steps is not None and checkpoint.step > max_steps:
        raise SubmitError(
            f"the checkpoint is of step {checkpoint.step}, beyond train.max_steps",
            where="train.max_steps",
            value=str(max_steps),
            remedy="raise it, go back with --step, or export this step with: "
            f"{launcher_command('export', formatting.short(run.root), '--step', str(checkpoint.step))}",
        )
    exported = read_export(run)
    if checkpoint.step == max_steps and exported is not None and exported.step == checkpoint.step:
        raise SubmitError(
            f"the run is complete: step {checkpoint.step} of {max_steps}",
            where=str(run.root),
            remedy=f"train further with: {_resume_command(run)} train.max_steps=...",
        )
    if exported is not None and run_store.read_status(run).state == "completed" and _ended_early(checkpoint, plan):
        raise SubmitError(
            f"the run is complete: it ended at step {checkpoint.step} because of eval.stop_after",
            where=str(run.root),
            remedy=f"train further with: {_resume_command(run)} eval.stop_after=0",
        )


def _ended_early(checkpoint: Checkpoint, plan: LaunchPlan) -> bool:
    """Return whether the run ended at this checkpoint because a loss no longer fell, and its settings still say so."""
    if not plan.config.eval.stop_after:
        return False
    kept = read_state(checkpoint.path).extra.get("early_stopping") or {}
    return plan.config.eval.stop_after <= int(kept.get("num_without_improvement", 0))


def _describe_lost_metrics(run: RunDir, plan: LaunchPlan, step: int) -> str | None:
    """Describe metrics that end before the checkpoint, as after a power loss; None if they reach it."""
    last = int(read_tail(run.metrics).last.get("trainer/step", 0))
    if last + plan.config.train.log_every > step:
        return None
    end = f"ends at step {last}" if last else "has no steps"
    return f"metrics.jsonl {end}, and the checkpoint is of step {step}: the lines between are lost; training does not need them"


def _replace_unusable_code(run: RunDir) -> None:
    """Copy the current code into the run where the run's own is damaged or reads other plans; says so."""
    damage = code_snapshot.find_damage(run)
    if damage is None and code_snapshot.is_current(run):
        return
    reason = "is from an earlier launcher" if damage is None else f"is damaged ({damage})"
    earlier = code_snapshot.replace(run, run_store.newest_attempt(run))
    print(f"the code of this run {reason}: the current code replaces it, {earlier.name} keeps it")


def _require_budget(run: RunDir, plan: LaunchPlan) -> None:
    """Refuse an attempt that would stop after one step.

    Raises:
        SubmitError: if the run has used up run.max_hours or run.max_usd.
    """
    limits, problems, command = plan.limits, [], _resume_command(run)
    if limits.max_seconds is None and limits.max_gpu_seconds is None:
        return
    try:
        spent = goodput.read(run, time.time(), "pending", plan)
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
    """Return the newest checkpoint, or the one of `step`; None for a run that has trained no step.

    The ranks verify the newest one when they read it. One of a chosen step is verified here, because later checkpoints are set
    aside for it.

    Raises:
        SubmitError: if it does not exist, cannot be read right now, or is damaged; nothing was changed.
    """
    is_untrained = not has_trained(run, run_store.read_status(run))
    if step is None and is_untrained:
        return None
    try:
        if step is None:
            return store.get_latest(run.checkpoints)
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


def _plan_again(
    plan: LaunchPlan, run: RunDir, checkpoint: Checkpoint | None, overrides: list[str], cluster: Cluster, force: bool
) -> LaunchPlan:
    """Plan the run with changed settings and the current path of its directory; model, data and identity stay the same.

    Without a checkpoint, every setting may change but those that identify the run and its model.
    """
    config = with_overrides(plan.config, overrides, plan.run_name)
    check_extra(config)
    saved_plan = (_plan_of_checkpoint(run, checkpoint, force) if checkpoint is not None else None) or plan
    where = formatting.short(run.root if checkpoint is None else checkpoint.path)
    accepts = force or checkpoint is None
    # Overrides of this command, and changes that somebody made in plan.json.
    changes = [
        *_model_differences(saved_plan.model, plan.model),
        *differences(saved_plan.config, config),
        *_data_differences(saved_plan.data, plan.data),
    ]
    require_same(changes, accepts, run.root, where)
    model = _restore_model(plan, config)
    asks_for_data = any(override.lstrip("+").startswith(_SOURCE_KEYS) for override in overrides)
    data = _restore_data(plan, config, model, asks_for_data)
    # The files of the sources may have changed, so a cache that was built again may hold other rows.
    data_changes = _data_differences(saved_plan.data, data)
    changes = [*differences(saved_plan.config, config), *data_changes]
    remedy = _NEW_ROWS.format(command=_resume_command(run)) if asks_for_data and changes == data_changes else ""
    require_same(changes, accepts, run.root, where, remedy)
    if changes:
        print(
            f"continuing with differences from the {'plan' if checkpoint is None else 'checkpoint'}:\n{table(changes)}",
            flush=True,
        )
    facts_of_run = Facts(
        working_dir=str(run.root.parent),
        device=cluster.device(config.cluster),
        model=model,
        data=data,
        eval_sets=_restore_eval_sets(plan, config, model),
        provenance=plan.provenance.model_copy(
            update={"overrides": _all_overrides(plan.provenance.overrides, overrides, changes)}
        ),
        lineage=plan.lineage,
    )
    identity = {"run_name": plan.run_name, "run_dir": str(run.root), "wandb_id": plan.wandb_id}
    next_plan = make_plan(config, facts_of_run).model_copy(update=identity)
    if checkpoint is not None and (note := describe_moved_rows(saved_plan, next_plan, checkpoint.step)):
        print(f"note: {note}", flush=True)
    return next_plan


def describe_moved_rows(saved_plan: LaunchPlan, next_plan: LaunchPlan, step: int) -> str | None:
    """Describe which rows a changed batch size skips or repeats; None if the rows continue without a gap.

    The rows of a step follow from its number and the global batch size alone.
    """
    num_trained, next_row = (step * plan.batch.global_batch_size for plan in (saved_plan, next_plan))
    if num_trained == next_row or _data_differences(saved_plan.data, next_plan.data):
        return None
    data = next_plan.config.data
    if data.group_by_length and not data.packing:
        return "another batch size changes the order of the rows: in this epoch some rows are repeated and others are skipped"
    change = f"{format_count(next_row - num_trained, 'row')} skipped"
    if next_row < num_trained:
        change = f"{format_count(num_trained - next_row, 'row')} repeated"
    return f"step {step} starts at row {next_row:,} of the order after {format_count(num_trained, 'trained row')}: {change}"


def _all_overrides(earlier: Sequence[str], overrides: Sequence[str], changes: Sequence[Difference]) -> tuple[str, ...]:
    """Return all overrides of the run so far, and the differences that --force accepted without an override."""
    keys = tuple(override.lstrip("+").partition("=")[0] for override in overrides)
    return (*earlier, *overrides, *(f"{change.key}={change.requested}" for change in changes if not change.key.startswith(keys)))


def _plan_of_checkpoint(run: RunDir, checkpoint: Checkpoint, force: bool) -> LaunchPlan | None:
    """Return the plan that a checkpoint was saved under; None if it is missing and `force` is true.

    Raises:
        ConfigError: if it is missing or was changed, and `force` is false.
    """
    digest = checkpoint.manifest.plan_digest
    saved = run_store.find_plan(run, digest)
    if saved is None and not force:
        raise ConfigError(
            "the run directory no longer has the plan of this checkpoint, so changes since then are unknown",
            where=formatting.short(checkpoint.path),
            value=f"its digest is {digest}",
            remedy=f"undo the changes in plan.json, or continue with the plan as it is: {_resume_command(run)} --force",
        )
    return saved


def _model_differences(saved: ModelFacts, current: ModelFacts) -> list[Difference]:
    """Return the numbers of the architecture that differ; paths may differ."""
    paths = {"path", "tokenizer_path", "has_weights", "isolation"}
    return differing(saved.model_dump(exclude=paths), current.model_dump(exclude=paths), f"{_PLAN_PREFIX}model")


def _data_differences(saved: DataFacts | None, current: DataFacts | None) -> list[Difference]:
    if saved and current and saved.digest and saved.contents() == current.contents():
        # The key also changes with the versions of libraries and of the cache's format; the digest is that of the rows.
        return []
    return differing(_cache_contents(saved), _cache_contents(current), f"{_PLAN_PREFIX}data")


def _cache_contents(data: DataFacts | None) -> dict[str, Any]:
    """Return what a data cache holds, with its key instead of its path."""
    return {} if data is None else {"key": Path(data.cache_dir).name, **data.contents()}


def _restore_model(plan: LaunchPlan, config: RunConfig) -> ModelFacts:
    """Return the model's facts; downloads or converts the model again if its folders are gone."""
    model = plan.model
    folders = [model.tokenizer_path, model.path] if config.model.path else [model.tokenizer_path]
    if all(folder is not None and Path(folder).is_dir() for folder in folders):
        return model
    print("the folder of the model or tokenizer in the plan is gone; preparing it again", flush=True)
    prepare(config)
    weights = model_source.locate(config.model.path, config.model).folder if config.model.path else None
    tokenizer = model_source.locate(config.model.tokenizer, config.model).folder if config.model.tokenizer else weights
    return model.model_copy(update={"path": weights and str(weights), "tokenizer_path": tokenizer and str(tokenizer)})


def _restore_data(plan: LaunchPlan, config: RunConfig, model: ModelFacts, asks_for_data: bool) -> DataFacts | None:
    """Return the facts of the data cache; builds it again if it is not the one that the plan records.

    The recorded rows count, whatever became of the files, unless the command asks for the data of the files.

    Raises:
        DataError: if the sources are gone as well.
    """
    recorded = plan.data
    if recorded is not None and config.data == plan.config.data:
        if cache_store.read(Path(recorded.cache_dir), config.data.cache_group) != recorded:
            print("the data cache differs from the one in the plan; building it again from the sources", flush=True)
        elif changed := _changed_sources(recorded, config):
            print(f"note: changed since the rows of this run were built: {'; '.join(changed)}", flush=True)
            if not asks_for_data:
                print(f"note: the run continues with the {format_count(recorded.num_rows, 'row')} as built", flush=True)
                return recorded
        else:
            return recorded
    prepare(config)
    built = facts.data_facts(config, model.tokenizer_path)
    if built is None:
        raise DataError(Problem("the data cache is not there after it was built", "data", remedy="try again"))
    return built


def _restore_eval_sets(plan: LaunchPlan, config: RunConfig, model: ModelFacts) -> dict[str, DataFacts]:
    """Return the facts of the caches of eval.sets; the recorded rows count, and a cache that is not there is built.

    Raises:
        ConfigError, DataError: for a set that cannot be read.
    """
    kept = {one.name: plan.eval_sets[one.name] for one in config.eval.all_sets if _is_recorded(one, plan, config)}
    restored = eval_set_caches.find_or_build(config, kept, model.tokenizer_path)
    for name, counts in restored.items():
        if name in plan.eval_sets and plan.eval_sets[name].contents() != counts.contents():
            print(f"note: the rows of the evaluation set {name} have changed: earlier losses do not compare", flush=True)
    return restored


def _is_recorded(eval_set: EvalSet, plan: LaunchPlan, config: RunConfig) -> bool:
    """Return whether the plan has the cache of this set, made with the same settings, and it is there."""
    recorded = plan.eval_sets.get(eval_set.name)
    before = next((one for one in plan.config.eval.all_sets if one.name == eval_set.name), None)
    if recorded is None or before is None or config.data != plan.config.data or before.rows != eval_set.rows:
        return False
    return cache_store.read(Path(recorded.cache_dir), config.data.cache_group) == recorded


def _changed_sources(recorded: DataFacts, config: RunConfig) -> list[str]:
    """Return the sources whose files changed since the cache was built, each with both digests; reads local files whole.

    Sources that cannot be read, such as files that were removed, are left out: the rows do not depend on them any more.
    """
    inputs = [*config.data.sources, *filter(None, [sources.make_eval_source(config.data)])]
    changed = []
    for source, built in zip(inputs, cache_store.read_report(recorded.cache_dir)["sources"], strict=False):
        with suppress(DataError, OSError, KeyError, TypeError):
            before, today = built["digest"], sources.describe_origin(source)["digest"]
            if before != today:
                changed.append(f"{source.path} (digest {before[:_DIGEST_CHARS]} then, {today[:_DIGEST_CHARS]} today)")
    return changed
