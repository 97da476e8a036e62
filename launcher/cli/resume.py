"""A further attempt of a run that has ended: what it continues, and what may differ from it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher import facts, model_source, run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.cli import formatting, wandb_check
from launcher.cli.checkpoints import verify
from launcher.cli.launch import check_extra, prepare, require_idle, worker_environment
from launcher.clusters.base import Cluster
from launcher.clusters.preflight import check_startable, disk_note
from launcher.config.resume import Difference, differences, differing, require_same, table, with_overrides
from launcher.config.schema import RunConfig
from launcher.data import cache
from launcher.errors import CheckpointError, ConfigError, DamagedCheckpoint, DataError, LauncherError, Problem, SubmitError
from launcher.plan.launch_plan import DataFacts, Facts, LaunchPlan, ModelFacts
from launcher.plan.planner import plan as make_plan
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.tracking import goodput

# How the plan's own numbers are told apart from settings of the same section.
_RECORDED = "plan."


def start_again(
    run: RunDir, plan: LaunchPlan, cluster: Cluster, overrides: list[str], step: int | None, force: bool = False
) -> int:
    """Submit a further attempt of a run that has ended, from the checkpoint of `step` or the newest; returns its number.

    Raises:
        ConfigError: where settings or data differ from those of the checkpoint, unless `force` accepts it.
        SubmitError: where it runs already, is complete, or has no such checkpoint.
    """
    require_idle(run, cluster)
    checkpoint = _to_begin_from(run, step)
    plan = _replanned(plan, run, checkpoint, overrides, cluster, force)
    if plan.batch.max_steps is not None and checkpoint.step > plan.batch.max_steps:
        raise SubmitError(
            f"the run has come to step {checkpoint.step} already",
            where="train.max_steps",
            value=str(plan.batch.max_steps),
            remedy="raise it, go back with --step N, or write the model of a step with: python -m launcher export RUN --step N",
        )
    if checkpoint.step == plan.batch.max_steps and run.export.is_dir():
        raise SubmitError(
            f"the run is complete: step {checkpoint.step} of {plan.batch.max_steps}",
            where=str(run.root),
            remedy="give it more to do with: resume RUN train.max_steps=...",
        )
    _require_budget(run, plan)
    check_startable(plan)
    cluster.check(plan)
    for words in wandb_check.check(plan.config, worker_environment()):
        print(f"note: {words}")
    if said := disk_note(plan):
        print(f"note: {said}")
    for path in store.set_aside_after(run.checkpoints, checkpoint.step):
        print(f"set aside: {formatting.short(path)}")
    if not run_store.has_current_code(run):
        earlier = run_store.replace_code(run)
        print(f"the code of this run is from an earlier launcher: the current code replaces it, {earlier.name} keeps it")
    attempt = run_store.create_attempt(run, Attempt(resume_step=checkpoint.step, pinned=step is not None))
    plan_path = run_store.write_plan(run, attempt, plan)
    run_store.update_status(run, state="pending", job=None, max_steps=plan.batch.max_steps, message="")
    print(f"continuing {plan.run_name} from step {checkpoint.step} of {plan.batch.max_steps}", flush=True)
    cluster.submit(run, attempt, plan_path)
    return attempt


def _require_budget(run: RunDir, plan: LaunchPlan) -> None:
    """Refuse what would load, take one step and stop.

    Raises:
        SubmitError: where the run has reached a limit already.
    """
    limits, problems = plan.limits, []
    if limits.max_seconds is None and limits.max_gpu_seconds is None:
        return
    try:
        spent = goodput.read(run, time.time(), "pending", plan)
    except (OSError, LauncherError, KeyError, TypeError, ValueError) as error:
        line, *_ = str(error).partition("\n")
        print(f"note: what the run has spent cannot be read, so its limits count from here: {line}")
        return
    if limits.max_seconds is not None and spent.held_s >= limits.max_seconds:
        value, remedy = f"it has run for {spent.held_s / 3600:.2f} hours", "raise it: resume RUN run.max_hours=..."
        problems.append(Problem("the run has used up run.max_hours", "run.max_hours", value, remedy))
    max_usd = plan.config.run.max_usd
    if max_usd is not None and spent.usd is not None and spent.usd >= max_usd:
        value = f"it has cost ${spent.usd:,.2f}, for {spent.gpu_s / 3600:,.2f} GPU hours"
        remedy = "raise it: resume RUN run.max_usd=..."
        problems.append(Problem("the run has used up run.max_usd", "run.max_usd", value, remedy))
    if problems:
        raise SubmitError(problems)


def _to_begin_from(run: RunDir, step: int | None) -> Checkpoint:
    """The newest checkpoint, which the ranks verify when they read it, or the one that was asked for, verified at once.

    Going back sets the later ones aside, and that should be for something.

    Raises:
        SubmitError: where it is not there, cannot be read now, or is asked for and damaged; nothing was touched.
    """
    try:
        if step is None:
            return store.get_latest(run.checkpoints)
        checkpoint = store.get_at_step(run.checkpoints, step)
        if error := verify([checkpoint])[checkpoint.path]:
            damaged = isinstance(error, DamagedCheckpoint)
            raise store.damaged_step_error(step, error.problems, run.checkpoints) if damaged else error
        return checkpoint
    except CheckpointError as error:
        anew = "where the run had not come so far, start it anew with another run.name"
        raise SubmitError([replace(problem, remedy=problem.remedy or anew) for problem in error.problems]) from None


def _replanned(
    plan: LaunchPlan, run: RunDir, checkpoint: Checkpoint, overrides: list[str], cluster: Cluster, force: bool
) -> LaunchPlan:
    """The same run under changed settings and where its directory lies now; model, data and identity stay."""
    config = with_overrides(plan.config, overrides)
    check_extra(config)
    saved = _plan_of(run, checkpoint, force) or plan
    where = formatting.short(checkpoint.path)
    # What was asked for, and what somebody has written into plan.json.
    found = [*_fixed(saved.model, plan.model), *differences(saved.config, config), *_data_differences(saved.data, plan.data)]
    require_same(found, force, run.root.name, where)
    model = _model(plan, config)
    data = _data(plan, config, model)
    # The same sources need not give the same rows any more.
    found = [*differences(saved.config, config), *_data_differences(saved.data, data)]
    require_same(found, force, run.root.name, where)
    if found:
        print(f"continuing with what differs from the checkpoint:\n{table(found)}", flush=True)
    known = Facts(
        working_dir=str(run.root.parent),
        device=cluster.device(config.cluster),
        model=model,
        data=data,
        provenance=plan.provenance.model_copy(update={"overrides": _recorded(plan.provenance.overrides, overrides, found)}),
        lineage=plan.lineage,
    )
    kept = {"run_name": plan.run_name, "run_dir": str(run.root), "wandb_id": plan.wandb_id}
    again = make_plan(config, known).model_copy(update=kept)
    if said := rows_moved(saved, again, checkpoint.step):
        print(f"note: {said}", flush=True)
    return again


def rows_moved(saved: LaunchPlan, again: LaunchPlan, step: int) -> str | None:
    """What another batch size does to the rows of the same data: those of a step are told by its number and the size alone."""
    before, after = (step * plan.batch.global_batch_size for plan in (saved, again))
    if before == after or _data_differences(saved.data, again.data):
        return None
    data = again.config.data
    if data.group_by_length and not data.packing:
        return "with another batch size the rows stand in another order: of this epoch, some are seen twice and others not at all"
    change = f"{after - before:,} rows are left out" if after > before else f"{before - after:,} rows are trained on again"
    return f"step {step} begins at row {after:,} of the order, and {before:,} rows have been trained on: {change}"


def _recorded(before: Sequence[str], overrides: Sequence[str], found: Sequence[Difference]) -> tuple[str, ...]:
    """Every override so far, and what --force has accepted that stood on no command line."""
    keys = tuple(override.lstrip("+").partition("=")[0] for override in overrides)
    return (*before, *overrides, *(f"{d.key}={d.asked}" for d in found if not d.key.startswith(keys)))


def _plan_of(run: RunDir, checkpoint: Checkpoint, force: bool) -> LaunchPlan | None:
    """The plan that saved a checkpoint.

    Raises:
        ConfigError: where it is not there as it was, unless `force` goes on without it.
    """
    digest = checkpoint.manifest.plan_digest
    saved = run_store.find_plan(run, digest)
    if saved is None and not force:
        raise ConfigError(
            "the plan that saved this checkpoint is not in the run directory, so what has changed since cannot be told",
            where=formatting.short(checkpoint.path),
            value=f"its digest is {digest}",
            remedy="undo what was changed in plan.json, or go on with what it says now: resume RUN --force",
        )
    return saved


def _fixed(saved: ModelFacts, now: ModelFacts) -> list[Difference]:
    """Numbers of the architecture that somebody has changed in a plan; where the model lies may change."""
    places = {"path", "tokenizer_path", "has_weights"}
    return differing(saved.model_dump(exclude=places), now.model_dump(exclude=places), f"{_RECORDED}model")


def _data_differences(saved: DataFacts | None, now: DataFacts | None) -> list[Difference]:
    return differing(_counts(saved), _counts(now), f"{_RECORDED}data")


def _counts(data: DataFacts | None) -> dict[str, Any]:
    """What a cache holds, by its key instead of its place."""
    return {} if data is None else {"key": Path(data.cache_dir).name, **data.contents()}


def _model(plan: LaunchPlan, config: RunConfig) -> ModelFacts:
    """The model's facts, with its folders made again where the cache that held them is gone or they never were fetched."""
    model = plan.model
    wanted = [model.tokenizer_path, model.path] if config.model.path else [model.tokenizer_path]
    if all(folder is not None and Path(folder).is_dir() for folder in wanted):
        return model
    print("the model or its tokenizer is not where the plan says; it is fetched", flush=True)
    prepare(config)
    weights = model_source.locate(config.model.path, config.model).folder if config.model.path else None
    tokenizer = model_source.locate(config.model.tokenizer, config.model).folder if config.model.tokenizer else weights
    return model.model_copy(update={"path": weights and str(weights), "tokenizer_path": tokenizer and str(tokenizer)})


def _data(plan: LaunchPlan, config: RunConfig, model: ModelFacts) -> DataFacts | None:
    """The facts of the data cache that an attempt will read, built again where it is not what the plan recorded.

    Raises:
        DataError: where the sources are gone as well.
    """
    recorded = plan.data
    if recorded is not None and config.data == plan.config.data:
        if cache.read(Path(recorded.cache_dir)) == recorded:
            return recorded
        print("the data cache is not what the plan recorded; it is built from the sources", flush=True)
    prepare(config)
    built = facts.data_facts(config, model.tokenizer_path)
    if built is None:
        raise DataError(Problem("the data cache is not there after it was built", "data", remedy="try again"))
    return built
