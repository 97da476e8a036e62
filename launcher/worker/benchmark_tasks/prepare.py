"""Finds the tasks and the weights to score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher import run_store
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError, Problem, did_you_mean
from launcher.evaluate.task import EvaluationFolder
from launcher.plan.run_dir import RunDir
from launcher.security import ownership
from launcher.tracking.verdicts import TUNED, digest_checkpoint
from launcher.worker.benchmark_tasks.harness import Harness
from launcher.worker.benchmark_tasks.request import BASE, BenchmarkFolder, BenchmarkRequest
from launcher.worker.evaluation.weights import count_context, export_tuned, find_base


def prepare(
    config: RunConfig,
    run: RunDir,
    step: int,
    names: Sequence[str],
    task_folder: Path | None,
    limit: int | None,
    gains: Sequence[str] = (),
) -> tuple[BenchmarkFolder, Harness, BenchmarkRequest]:
    """Find the tasks, and export the step; returns what to score, and the harness with the tasks.

    `gains` are the command's minimum gains, such as `acc:base:0.1`.

    Raises:
        ConfigError, DataError: for tasks that are unknown, may not run, or lack their data, for a gain in a metric that no task
            has, and if there is no base model.
        CheckpointError: if the step cannot be exported.
    """
    plan = run_store.load_plan(run).model_copy(update={"config": config})
    if task_folder is not None:
        if not task_folder.is_dir():
            raise ConfigError("there is no such folder", where="--task-folder", value=str(task_folder))
        # A task names functions to run, and its templates are not sandboxed.
        if problem := ownership.folder_problem("the folder of tasks", task_folder, ()):
            raise ConfigError(problem)
    evaluation = EvaluationFolder.of(run.root, step)
    evaluation.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = BenchmarkFolder(evaluation.benchmarks)
    folder.root.mkdir(mode=0o700, exist_ok=True)
    harness = Harness(task_folder)
    metrics = harness.find(names)
    _require_metrics(gains, metrics)
    base = find_base(plan)
    tuned = export_tuned(plan, run, evaluation, step)
    request = BenchmarkRequest(
        config=config,
        step=step,
        tasks=tuple(metrics),
        task_folder=task_folder,
        limit=limit,
        weights={TUNED: tuned} if base is None else {BASE: base, TUNED: tuned},
        tokenizer=str(plan.model.tokenizer_path),
        code=plan.model.path,
        context=count_context(plan),
        checkpoint=digest_checkpoint(run, step),
    )
    return folder, harness, request


def _require_metrics(gains: Sequence[str], metrics: dict[str, tuple[str, ...]]) -> None:
    """Reject a gain in a metric that no task has, before hours of scoring."""
    known = list(dict.fromkeys(metric for several in metrics.values() for metric in several))
    problems = [
        Problem(
            f"--min-gain names {metric}, which no task has",
            where="command line",
            value=gain,
            remedy=f"{did_you_mean(metric, known)} metrics of these tasks are {', '.join(known)}".strip(),
        )
        for gain in gains
        if known and (metric := gain.partition(":")[0]).partition(" (")[0] not in known
    ]
    if problems:
        raise ConfigError(problems)
