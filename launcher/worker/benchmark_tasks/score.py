"""Scores a step's weights and the base model on tasks, and compares them.

`python -m launcher.worker.benchmark_tasks.score PLAN_JSON --step N --tasks A,B` reads the run's settings, with the command's
overrides, as JSON from standard input. It prints one JSON object: the verdicts by task, or the problems. Scores are kept, so an
interrupted command can continue.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

from launcher import json_records
from launcher.config.schema import RunConfig
from launcher.data.tokenization.encoder import load_tokenizer
from launcher.errors import LauncherError, RunError
from launcher.evaluate.task import EvaluationFolder, Weights
from launcher.evaluate.verdict import judge
from launcher.models.private_code import code_option, folder_to_load
from launcher.plan.run_dir import RunDir
from launcher.security.folders import private_files
from launcher.security.printable_stream import printable_output
from launcher.tracking.verdicts import TUNED
from launcher.train.model import DTYPES, read_own_config
from launcher.worker.benchmark_tasks.harness import THOUGHT_END, Harness, TaskScores, digest, make_model
from launcher.worker.benchmark_tasks.prepare import prepare
from launcher.worker.benchmark_tasks.request import BenchmarkFolder, BenchmarkRequest
from launcher.worker.evaluation.answer import choose_dtype
from launcher.worker.ranks.rank_env import die_with_parent
from launcher.worker.signals import exit_on_termination


def score(folder: BenchmarkFolder, harness: Harness, request: BenchmarkRequest) -> dict[str, Any]:
    """Score what has no scores yet, write each task's verdict, and return what the command shows.

    Raises:
        ConfigError, DataError: if a task was removed in the meantime.
        RunError: if a task fails.
    """
    scores: dict[str, dict[str, TaskScores]] = {task: {} for task in request.tasks}
    total = len(request.tasks) * len(request.weights)
    for side, weights in request.weights.items():
        model = None
        for task in request.tasks:
            belongs_to = digest(weights.digest, weights.config, harness.describe(task), *_surroundings(request))
            task_scores = json_records.read_if_present(TaskScores, folder.scores(task, side))
            if task_scores is None or task_scores.belongs_to != belongs_to:
                done = sum(map(len, scores.values()))
                # On a terminal, the harness shows its progress.
                print(f"{side}: {task} ({done + 1} of {total})", file=sys.stderr, flush=True)
                model = model or _load(request, weights, side)
                task_scores = _score(harness, task, model, request.limit, belongs_to)
                folder.scores(task, side).parent.mkdir(exist_ok=True)
                json_records.write(folder.scores(task, side), task_scores)
            scores[task][side] = task_scores
    return {"step": request.step, "folder": str(folder.root), "tasks": _conclude(folder, request, scores)}


def _score(harness: Harness, task: str, model: Any, limit: int | None, belongs_to: str) -> TaskScores:
    try:
        return harness.score(task, model, limit, belongs_to)
    except LauncherError:
        raise
    # A task is third-party configuration and code, and may raise anything.
    except Exception as error:
        message = f"the task {task} failed: {type(error).__name__}: {error}"
        raise RunError(message, where="--tasks", remedy="leave it out; scores of the other tasks are kept") from error


def _load(request: BenchmarkRequest, weights: Weights, side: str) -> Any:
    config, folder = request.config, Path(weights.folder)
    code = Path(request.code) if request.code is not None and config.model.trust_remote_code else None
    path = folder_to_load(folder, config.model.trust_remote_code, config.model.code_digest, code)
    device = _device()
    # A model that does not fit on one GPU is spread over all GPUs of this machine.
    placement = {"device_map": "auto"} if device == "cuda" else {}
    remote = code_option(config.model.trust_remote_code, path)
    own = read_own_config(path, **remote)
    model = AutoModelForCausalLM.from_pretrained(
        path, config=own, dtype=DTYPES[choose_dtype(config, device)], **remote, **placement
    )
    # An export contains the chat template that its training data was rendered with.
    tokenizer = load_tokenizer(str(folder) if side == TUNED else request.tokenizer)
    return make_model(model.eval(), tokenizer, config.evaluate.prompts_per_batch, request.context)


def _surroundings(request: BenchmarkRequest) -> tuple[str, ...]:
    """Return what determines the scores apart from the task and the weights."""
    device = _device()
    versions = torch.__version__, transformers.__version__
    return (str(request.limit), choose_dtype(request.config, device), device, *versions, THOUGHT_END)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _conclude(folder: BenchmarkFolder, request: BenchmarkRequest, scores: dict[str, dict[str, TaskScores]]) -> dict[str, Any]:
    """Judge each task that has per-question scores, and write its verdict."""
    shown: dict[str, Any] = {}
    for task, sides in scores.items():
        first = sides[TUNED]
        metrics = [key for key in first.values if all(key in one.samples for one in sides.values())]
        by_metric = {_name(key): {side: _higher_is_better(one, key) for side, one in sides.items()} for key in metrics}
        whole = {_name(key): {side: one.values[key] for side, one in sides.items()} for key in first.values if key not in metrics}
        entry: dict[str, Any] = {"num_questions": first.num_questions, "whole": whole}
        if by_metric:
            primary, *_ = by_metric
            verdict = judge(primary, by_metric[primary], others=by_metric)
            verdict = replace(verdict, checkpoint=request.checkpoint)
            verdict.write(folder.scores(task, TUNED).parent)
            header, rows = verdict.table
            entry |= {"verdict": json_records.encode(verdict), "header": header, "rows": rows}
        shown[task] = entry
    return shown


def _name(key: str) -> str:
    """Return `METRIC` for `METRIC,none`, and `METRIC (FILTER)` for other filters."""
    metric, _, name = key.partition(",")
    return metric if name in ("", "none") else f"{metric} ({name})"


def _higher_is_better(scores: TaskScores, key: str) -> np.ndarray:
    values = np.asarray(scores.samples[key], dtype=np.float64)
    return -values if key in scores.lower_is_better else values


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.benchmark_tasks.score")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--task-folder", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--min-gain", action="append", default=[])
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = RunConfig.model_validate_json(sys.stdin.read())
    # Use plan.json's folder, because the run may have been moved. It must be absolute: the harness changes the working directory.
    run = RunDir(arguments.plan.absolute().parent)
    task_folder = None if arguments.task_folder is None else arguments.task_folder.absolute()
    names = arguments.tasks.split(",")
    try:
        folder, harness, request = prepare(config, run, arguments.step, names, task_folder, arguments.limit, arguments.min_gain)
        shown = score(folder, harness, request)
    except LauncherError as error:
        print(json.dumps(error.to_report()))
        return error.exit_code
    evaluation = EvaluationFolder(folder.root.parent)
    evaluation.weights_record.unlink(missing_ok=True)
    shutil.rmtree(evaluation.weights, ignore_errors=True)
    print(json.dumps(shown))
    return 0


if __name__ == "__main__":
    exit_on_termination()
    die_with_parent(signal.SIGTERM)
    # The harness keeps tasks' rows in the cache of `datasets`.
    with private_files(), printable_output():
        code = main()
    sys.exit(code)
