"""Finds the tasks and the weights to score: `python -m launcher.worker.benchmark_tasks.prepare PLAN_JSON --step N --tasks A,B`.

Reads the run's settings, with the command's overrides, as JSON from standard input. Prints one JSON object: the folder and each
task's metrics, or the problems.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher import json_records, run_store
from launcher.config.schema import RunConfig
from launcher.errors import LauncherError
from launcher.evaluate.task import EvaluationFolder
from launcher.plan.run_dir import RunDir
from launcher.security.folders import private_files
from launcher.security.printable_stream import printable_output
from launcher.tracking.verdicts import TUNED, digest_checkpoint
from launcher.worker.benchmark_tasks.harness import Harness
from launcher.worker.benchmark_tasks.request import BASE, BenchmarkFolder, BenchmarkRequest
from launcher.worker.benchmark_tasks.task_files import TASK_FOLDER, require_own
from launcher.worker.evaluation.weights import count_context, export_tuned, find_base
from launcher.worker.ranks.rank_env import die_with_parent
from launcher.worker.signals import exit_on_termination


def prepare(
    config: RunConfig, run: RunDir, step: int, names: Sequence[str], task_folder: Path | None, limit: int | None
) -> tuple[BenchmarkFolder, dict[str, tuple[str, ...]]]:
    """Write the request for an evaluation on tasks; returns its folder and each task's metrics.

    Raises:
        ConfigError, DataError: for tasks that are unknown, may not run, or lack their data, and if there is no base model.
        CheckpointError: if the step cannot be exported.
    """
    plan = run_store.load_plan(run).model_copy(update={"config": config})
    if task_folder is not None:
        require_own(task_folder)
    evaluation = EvaluationFolder.of(run.root, step)
    evaluation.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder = BenchmarkFolder(evaluation.benchmarks)
    folder.root.mkdir(mode=0o700, exist_ok=True)
    metrics = Harness(folder.caches, task_folder).find(names)
    base = find_base(plan)
    tuned = export_tuned(plan, run, evaluation, step)
    request = BenchmarkRequest(
        config=config.model_dump(mode="json"),
        step=step,
        tasks=tuple(metrics),
        task_folder=None if task_folder is None else str(task_folder),
        limit=limit,
        weights={TUNED: tuned} if base is None else {BASE: base, TUNED: tuned},
        tokenizer=str(plan.model.tokenizer_path),
        code=plan.model.path,
        context=count_context(plan),
        checkpoint=digest_checkpoint(run, step),
    )
    json_records.write(folder.request, request)
    return folder, metrics


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.benchmark_tasks.prepare")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument(TASK_FOLDER, type=Path)
    parser.add_argument("--limit", type=int)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = RunConfig.model_validate_json(sys.stdin.read())
    # Use plan.json's folder, because the run may have been moved. It must be absolute: the harness changes the working directory.
    run = RunDir(arguments.plan.absolute().parent)
    task_folder = None if arguments.task_folder is None else arguments.task_folder.absolute()
    try:
        folder, metrics = prepare(config, run, arguments.step, arguments.tasks.split(","), task_folder, arguments.limit)
    except LauncherError as error:
        print(json.dumps(error.to_report()))
        return error.exit_code
    print(json.dumps({"folder": str(folder.root), "metrics": metrics}))
    return 0


if __name__ == "__main__":
    exit_on_termination()
    die_with_parent(signal.SIGTERM)
    # The harness keeps tasks' rows in the cache of `datasets`.
    with private_files(), printable_output():
        code = main()
    sys.exit(code)
