"""The plan of a further attempt: changed settings with the run's model and data, compared with its checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher import facts, run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.cli import formatting
from launcher.cli.starting import eval_set_caches
from launcher.cli.worker_process import check_extra, prepare
from launcher.clusters.backends import Cluster
from launcher.config.resume import Difference, differences, differing, require_same, table, with_overrides
from launcher.config.schema import RunConfig
from launcher.config.sections.evaluation import EvalSet
from launcher.data import cache_store
from launcher.data.sources.reading import describe_origin, list_inputs
from launcher.errors import ConfigError, DataError, Problem
from launcher.models.found_model import find_model
from launcher.plan.launch_plan import DataFacts, Facts, LaunchPlan, ModelFacts
from launcher.plan.planner import plan as make_plan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.plan.steps import describe_changed_rate
from launcher.shell_commands import launcher_command

# Marks numbers of the plan in a list of differences, such as plan.model.num_layers.
_PLAN_PREFIX = "plan."
# Settings that name data files; a resume that sets one requests the rows that these files contain today.
_SOURCE_KEYS = ("data.path=", "data.sources=", "data.eval_path=")
_NEW_ROWS = (
    "remove the path to continue with the rows as they were built; or train on today's rows, in a different order from those "
    "trained so far: {command} --force ..., or start another run with these weights"
)
_DIGEST_CHARS = 8


def resume_command(run: RunDir) -> str:
    """Return the command that resumes a run, for a remedy."""
    return launcher_command("resume", formatting.short(run.root))


def plan_again(
    plan: LaunchPlan, run: RunDir, checkpoint: Checkpoint | None, overrides: list[str], cluster: Cluster, force: bool
) -> LaunchPlan:
    """Plan the run with changed settings and the current path of its directory; model, data and identity stay the same.

    Without a checkpoint, every setting may change except those that identify the run and its model.
    """
    config = with_overrides(plan.config, overrides, plan.run_name)
    check_extra(config)
    saved_plan = (_plan_of_checkpoint(run, checkpoint, force) if checkpoint is not None else None) or plan
    where = formatting.short(run.root if checkpoint is None else checkpoint.path)
    accepts = force or checkpoint is None
    # Overrides in this command, and manual changes to plan.json.
    changes = [
        *_model_differences(saved_plan.model, plan.model),
        *differences(saved_plan.config, config),
        *_data_differences(saved_plan.data, plan.data),
    ]
    is_newest = checkpoint is not None and checkpoint.step == store.newest_step(run.checkpoints)
    known = _accepted_before(saved_plan, plan) if is_newest else []
    asks_for_data = any(override.lstrip("+").startswith(_SOURCE_KEYS) for override in overrides)
    remedy = _NEW_ROWS.format(command=resume_command(run)) if asks_for_data else ""
    require_same([one for one in changes if one not in known], accepts, run.root, where, remedy)
    model = _restore_model(plan, config)
    data = _restore_data(plan, config, model, asks_for_data)
    # Source files may have changed, so a rebuilt cache may contain different rows.
    data_changes = _data_differences(saved_plan.data, data)
    changes = [*differences(saved_plan.config, config), *data_changes]
    require_same([one for one in changes if one not in known], accepts, run.root, where, remedy)
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
    if checkpoint is not None:
        for describe in (describe_moved_rows, describe_changed_rate):
            if note := describe(saved_plan, next_plan, checkpoint.step):
                print(f"note: {note}", flush=True)
    return next_plan


def _accepted_before(saved_plan: LaunchPlan, plan: LaunchPlan) -> list[Difference]:
    """Return the differences from the checkpoint that --force accepted for an attempt that has not saved since."""
    accepted = plan.provenance.overrides[len(saved_plan.provenance.overrides) :]
    keys = tuple(override.lstrip("+").partition("=")[0] for override in accepted)
    changes = [*differences(saved_plan.config, plan.config), *_data_differences(saved_plan.data, plan.data)]
    asked_for_data = any(override.lstrip("+").startswith(_SOURCE_KEYS) for override in accepted)
    return [one for one in changes if one.key.startswith((*keys, *(("plan.data", "data.") if asked_for_data else ())))]


def describe_moved_rows(saved_plan: LaunchPlan, next_plan: LaunchPlan, step: int) -> str | None:
    """Describe which rows a changed batch size or other data skip or repeat; None if the rows continue without a gap.

    A step's rows depend only on its number, the global batch size and the data.
    """
    num_trained, next_row = (step * plan.batch.global_batch_size for plan in (saved_plan, next_plan))
    if next_plan.data is not None and _data_differences(saved_plan.data, next_plan.data):
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
    data = next_plan.config.data
    if not data.packing:
        return "another batch size changes the order of the rows: in this epoch some rows are repeated and others are skipped"
    change = f"{format_count(next_row - num_trained, 'row')} skipped"
    if next_row < num_trained:
        change = f"{format_count(num_trained - next_row, 'row')} repeated"
    if next_plan.config.train.max_steps is None and saved_plan.batch.max_steps != next_plan.batch.max_steps:
        change += f"; train.epochs now ends the run at step {next_plan.batch.max_steps} instead of {saved_plan.batch.max_steps}"
    return f"step {step} starts at row {next_row:,} of the order after {format_count(num_trained, 'trained row')}: {change}"


def _all_overrides(earlier: Sequence[str], overrides: Sequence[str], changes: Sequence[Difference]) -> tuple[str, ...]:
    """Return all overrides of the run so far, plus the differences that --force accepted without an override."""
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
            remedy=f"undo the changes in plan.json, or continue with the plan as it is: {resume_command(run)} --force",
        )
    return saved


def _model_differences(saved: ModelFacts, current: ModelFacts) -> list[Difference]:
    """Return the architecture numbers that differ; paths may differ."""
    paths = {"path", "tokenizer_path", "has_weights", "isolation"}
    return differing(saved.model_dump(exclude=paths), current.model_dump(exclude=paths), f"{_PLAN_PREFIX}model")


def _data_differences(saved: DataFacts | None, current: DataFacts | None) -> list[Difference]:
    if saved and current and saved.digest and saved.contents() == current.contents():
        # The key also changes with the versions of libraries and of the cache format; the digest depends only on the rows.
        return []
    return differing(_cache_contents(saved), _cache_contents(current), f"{_PLAN_PREFIX}data")


def _cache_contents(data: DataFacts | None) -> dict[str, Any]:
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

    Raises:
        DataError: if the sources are gone too.
    """
    recorded = plan.data
    if recorded is not None and _is_same_data(config, plan.config):
        if cache_store.read(Path(recorded.cache_dir)) != recorded:
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
        raise DataError(Problem("the data cache is missing or damaged right after it was built", "data", remedy="try again"))
    return built


def _is_same_data(one: RunConfig, other: RunConfig) -> bool:
    """Return whether the settings describe the same rows; the number of workers and the group of the cache do not matter."""
    free = {"workers", "cache_group"}
    return one.data.model_dump(exclude=free) == other.data.model_dump(exclude=free)


def _restore_eval_sets(plan: LaunchPlan, config: RunConfig, model: ModelFacts) -> dict[str, DataFacts]:
    """Return the facts of the eval.sets caches; the recorded rows count, and missing caches are built.

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
    """Return whether the plan has this set's cache, built with the same settings, and the cache exists."""
    recorded = plan.eval_sets.get(eval_set.name)
    before = next((one for one in plan.config.eval.all_sets if one.name == eval_set.name), None)
    if recorded is None or before is None or not _is_same_data(config, plan.config) or before.rows != eval_set.rows:
        return False
    return cache_store.read(Path(recorded.cache_dir)) == recorded


def _changed_sources(recorded: DataFacts, config: RunConfig) -> list[str]:
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
