"""Scores a step's weights and the base model on tasks of lm-evaluation-harness, and compares them.

`python -m launcher.evaluate.tasks PLAN_JSON --step N --tasks A,B` reads the run's settings, with the command's
overrides, as JSON from standard input, and prints one JSON object. Scores are kept, so an interrupted command can continue. Tasks
read Hub data sets and `evaluate` metrics from the local cache; nothing is fetched.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from launcher.child_process import print_result, run_process
from launcher.config.schema import RunConfig
from launcher.data.tokenization.encoder import load_tokenizer
from launcher.errors import ConfigError, DataError, LauncherError, Problem, RunError, describe, did_you_mean
from launcher.evaluate.evaluation_folder import EvaluationFolder, Weights
from launcher.evaluate.verdict import judge
from launcher.evaluate.weights import choose_dtype, count_context, export_tuned_weights, find_base_weights
from launcher.models.remote_code import code_option, folder_to_load
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.security import folders
from launcher.security.folders import private_files
from launcher.tracking.verdicts import BENCHMARKS, TUNED, digest_checkpoint
from launcher.train.model import DTYPES

BASE = "base"
_WHERE = "--tasks"
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
_NOT_PLAIN = re.compile(r"^\.+|[^\w.-]")
# What ends the thoughts of a reasoning model; the harness scores what follows.
_THOUGHT_END = "</think>"
# Tolerance within which an aggregate counts as the mean of the per-question scores.
_SAME = 1e-6
_FORM = 'write {"question": "2+2?", "choices": ["3", "4"], "answer": 1}; the answer is an index from 0, a letter or a text'


@dataclass(frozen=True)
class TaskScores:
    """The scores of one model on one task.

    `values` are the harness's values by metric. `samples` holds per-question scores for metrics that are their mean.
    `lower_is_better` names metrics. `belongs_to` is a digest of everything that determines the scores.
    """

    belongs_to: str
    num_questions: int
    values: dict[str, float]
    samples: dict[str, tuple[float, ...]]
    lower_is_better: tuple[str, ...]


def score_tasks(
    config: RunConfig,
    run: RunDir,
    step: int,
    names: Sequence[str],
    task_folder: Path | None,
    limit: int | None,
    gains: Sequence[str],
) -> dict[str, Any]:
    """Score what has no scores yet, write each task's verdict, and return what the command shows.

    `limit` is the number of questions per task, None for all. `gains` are the command's minimum gains, such as `acc:base:0.1`.
    """
    plan = run_store.load_plan(run).model_copy(update={"config": config})
    tasks = find_tasks(names, task_folder)
    require_metrics(gains, tasks)
    folder, base = EvaluationFolder.of(run.root, step), find_base_weights(plan)
    folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    sides = {} if base is None else {BASE: base}
    sides[TUNED] = export_tuned_weights(plan, run, folder, step)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = [torch.__version__, transformers.__version__, sys.modules["lm_eval"].__version__, _THOUGHT_END]
    # Scoring changes the tasks' settings.
    settings = {name: task.dump_config() for name, task in tasks.items()}
    scores: dict[str, dict[str, TaskScores]] = {task: {} for task in tasks}
    for side, weights in sides.items():
        model = None
        for name, task in tasks.items():
            parts = [weights.digest, weights.config, settings[name], limit, choose_dtype(config, device), device, versions]
            belongs_to = xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())
            path = scores_path(folder, name, side)
            task_scores = json_records.read_if_present(TaskScores, path)
            if task_scores is None or task_scores.belongs_to != belongs_to:
                done = sum(map(len, scores.values()))
                # On a terminal, the harness shows its progress.
                print(f"{side}: {name} ({done + 1} of {len(tasks) * len(sides)})", file=sys.stderr, flush=True)
                model = model or _load_model(plan, weights, side, device)
                task_scores = _score_task(name, task, model, limit, belongs_to)
                path.parent.mkdir(parents=True, exist_ok=True)
                json_records.write(path, task_scores)
            scores[name][side] = task_scores
    folder.weights_record.unlink(missing_ok=True)
    shutil.rmtree(folder.weights, ignore_errors=True)
    checkpoint = digest_checkpoint(run, step)
    shown = {task: _judge_task(scores_path(folder, task, TUNED).parent, several, checkpoint) for task, several in scores.items()}
    return {"run": plan.run_name, "step": step, "folder": str(folder.root / BENCHMARKS), "tasks": shown}


def scores_path(folder: EvaluationFolder, task: str, side: str) -> Path:
    """Return the file of a side's scores; the verdict is beside it. A task may have any name."""
    return folder.root / BENCHMARKS / _NOT_PLAIN.sub("_", task) / f"{side}.json"


def find_tasks(names: Sequence[str], task_folder: Path | None = None) -> dict[str, Any]:
    """Return the harness's tasks by name, for names of tasks, groups and tags and for files of multiple-choice questions."""
    files = {name: _make_task(Path(name)) for name in names if name.endswith(".jsonl")}
    if task_folder is not None:
        if not task_folder.is_dir():
            raise ConfigError("there is no such folder", where="--task-folder", value=str(task_folder))
        # A task names functions to run, and its templates are not sandboxed.
        if problem := folders.folder_problem("the folder of tasks", task_folder):
            raise ConfigError(problem)
    # Whatever trust_remote_code a task passes, only the pinned code of the run's own model may run.
    code_option(False, None)
    os.environ.update(dict.fromkeys(_OFFLINE, "1"))
    # Its client has read the variable if transformers is imported, and nothing guards what tasks would fetch with it.
    constants.HF_HUB_OFFLINE = True
    # Data sets and metrics are looked up in the working directory first, which may belong to another user.
    os.chdir("/")
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        message = f"lm-evaluation-harness cannot be imported: {error}"
        raise ConfigError(message, where=_WHERE, remedy='install it with: pip install "launcher[evals]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    tasks, problems, missing = dict[str, Any](), list[Problem](), list[Problem]()
    for name in names:
        if name not in files and name not in manager.task_index:
            remedy = f"{did_you_mean(name, manager.all_tasks)} lm-eval ls tasks lists them".strip()
            problems.append(Problem("there is no such task", where=_WHERE, value=name, remedy=remedy))
            continue
        try:
            loaded = manager.load([files.get(name, name)])["tasks"]
        except LauncherError as error:
            problems += [replace(problem, value=name) for problem in error.problems]
        except (ConnectionError, FileNotFoundError) as error:
            remedy = (
                "on a machine that reaches the Hub: hf download --repo-type dataset OWNER/NAME; then copy datasets--OWNER--NAME "
                f"from its cache (~/.cache/huggingface/hub) to {constants.HF_HUB_CACHE}"
            )
            missing.append(Problem(f"the data of a task is not on this machine: {error}", _WHERE, name, remedy))
        # A task is third-party configuration and code, and may raise anything.
        except Exception as error:
            problems.append(Problem(f"a task cannot be loaded: {describe(error)}", where=_WHERE, value=name))
        else:
            tasks |= loaded
            if any(getattr(one, "UNSAFE_CODE", False) or getattr(one.config, "unsafe_code", False) for one in loaded.values()):
                message = "a task runs code that the model has written, which nothing here isolates"
                problems.append(Problem(message, _WHERE, name, "leave it out"))
    if problems:
        raise ConfigError([*problems, *missing])
    if missing:
        raise DataError(missing)
    return tasks


def _make_task(file: Path) -> dict[str, Any]:
    """Return the harness's configuration of a task with the multiple-choice questions in a file of JSON lines."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise ConfigError(f"the questions cannot be read: {error.strerror}", where=_WHERE, value=str(file)) from None
    numbered = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
    rows = [read_question(line, f"{file}:{number}") for number, line in numbered]
    if not rows:
        raise DataError("the file has no questions", where=str(file), remedy=_FORM)

    def list_rows(**_: object) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return {
        "task": file.stem,
        "custom_dataset": list_rows,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
        # Part of what determines the scores.
        "metadata": {"questions": xxhash.xxh3_128_hexdigest(content)},
    }


def read_question(line: bytes, where: str) -> dict[str, Any]:
    """Return a question with its choices and the index of the right one."""
    try:
        row = json.loads(line)
        question, choices, answer = row["question"], row["choices"], row["answer"]
        is_valid = isinstance(question, str) and len(choices) > 1 and all(isinstance(one, str) and one.strip() for one in choices)
    except (ValueError, KeyError, TypeError):
        is_valid = False
    if is_valid and isinstance(answer, str):
        letters = [chr(ord("A") + i) for i in range(len(choices))]
        answer = next((names.index(answer) for names in (choices, letters) if answer in names), None)
    if not is_valid or type(answer) is not int or not 0 <= answer < len(choices):
        shown = line[:80].decode(errors="replace")
        raise DataError("the line is not a question with choices and the right one", where=where, value=shown, remedy=_FORM)
    return {"question": question, "choices": choices, "answer": answer}


def require_metrics(gains: Sequence[str], tasks: dict[str, Any]) -> None:
    """Reject a gain in a metric that no task has, before hours of scoring."""
    known = list(dict.fromkeys(str(one["metric"]) for task in tasks.values() for one in task.config.metric_list or ()))
    for gain in gains:
        metric = gain.partition(":")[0]
        if known and metric.partition(" (")[0] not in known:
            remedy = f"{did_you_mean(metric, known)} metrics of these tasks are {', '.join(known)}".strip()
            raise ConfigError(f"--min-gain names {metric}, which no task has", where="command line", value=gain, remedy=remedy)


def _load_model(plan: LaunchPlan, weights: Weights, side: str, device: str) -> Any:
    """Return a model of the harness with the weights of a side."""
    from lm_eval.models.huggingface import HFLM

    config, folder = plan.config, Path(weights.folder)
    code = None if plan.model.path is None else Path(plan.model.path)
    path = folder_to_load(folder, config.model.trust_remote_code, config.model.code_digest, code)
    # A model that does not fit on one GPU is spread over all GPUs of this machine.
    placement = {"device_map": "auto"} if device == "cuda" else {}
    remote = code_option(config.model.trust_remote_code, path)
    dtype = DTYPES[choose_dtype(config, device)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **remote, **placement)
    # An export contains the chat template that its training data was rendered with.
    tokenizer = load_tokenizer(str(folder) if side == TUNED else str(plan.model.tokenizer_path))
    thinks = _THOUGHT_END in str(tokenizer.chat_template or "")

    class ScoredModel(HFLM):  # type: ignore[misc, unused-ignore]
        """The harness's model, with thoughts of any length and with progress bars only on terminals."""

        if not sys.stderr.isatty():
            loglikelihood = partialmethod(HFLM.loglikelihood, disable_tqdm=True)
            loglikelihood_rolling = partialmethod(HFLM.loglikelihood_rolling, disable_tqdm=True)
            generate_until = partialmethod(HFLM.generate_until, disable_tqdm=True)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            if thinks:
                # The line breaks in the thoughts would end the answer. The harness cuts answers at these texts afterwards.
                stop = [text for text in stop if not text.isspace()]
            return super()._model_generate(context, max_length, stop, **options)

    sizes = {"batch_size": config.evaluate.prompts_per_batch, "max_length": count_context(plan)}
    return ScoredModel(pretrained=model.eval(), tokenizer=tokenizer, **sizes, think_end_token=_THOUGHT_END)


def _score_task(name: str, task: Any, model: Any, limit: int | None, belongs_to: str) -> TaskScores:
    from lm_eval import evaluator, simple_evaluate

    # It runs git for the result's metadata, which prints an error outside of a repository.
    evaluator.get_git_commit_hash = str
    has_template = bool(model.tokenizer.chat_template)
    options = {"apply_chat_template": has_template, "fewshot_as_multiturn": has_template}
    try:
        result: Any = simple_evaluate(model, tasks=[task], limit=limit, bootstrap_iters=0, **options)
    except LauncherError:
        raise
    # A task is third-party configuration and code, and may raise anything.
    except Exception as error:
        message = f"the task {name} failed: {describe(error)}"
        raise RunError(message, where=_WHERE, remedy="leave it out; scores of the other tasks are kept") from error
    return read_scores(name, result, belongs_to)


def read_scores(task: str, result: Any, belongs_to: str) -> TaskScores:
    """Extract a task's scores from the harness's result; keys are `METRIC,FILTER`."""
    values = {
        key: float(value)
        for key, value in result["results"][task].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }
    higher = result.get("higher_is_better", {}).get(task, {})
    samples: dict[str, tuple[float, ...]] = {}
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for one in result["samples"][task]:
        by_filter.setdefault(one.get("filter", "none"), []).append(one)
    for key, value in values.items():
        metric, _, name = key.partition(",")
        single = [one.get(metric) for one in sorted(by_filter.get(name, []), key=lambda one: one["doc_id"])]
        if single and all(isinstance(score, int | float) for score in single):
            scores = tuple(float(score) for score in single if score is not None)
            if abs(sum(scores) / len(scores) - value) < _SAME:
                samples[key] = scores
    lower = tuple(key for key in values if higher.get(key.partition(",")[0]) is False)
    return TaskScores(belongs_to, max(map(len, by_filter.values()), default=0), values, samples, lower)


def _judge_task(folder: Path, sides: dict[str, TaskScores], checkpoint: str) -> dict[str, Any]:
    """Judge a task, if it has per-question scores, write its verdict, and return what the command shows."""
    first = sides[TUNED]
    by_metric: dict[str, dict[str, np.ndarray]] = {}
    whole: dict[str, dict[str, float]] = {}
    for key in first.values:
        metric, _, name = key.partition(",")
        title = metric if name in ("", "none") else f"{metric} ({name})"
        if all(key in one.samples for one in sides.values()):
            sign = -1.0 if key in first.lower_is_better else 1.0
            by_metric[title] = {side: sign * np.asarray(one.samples[key], dtype=np.float64) for side, one in sides.items()}
        else:
            whole[title] = {side: one.values[key] for side, one in sides.items()}
    shown: dict[str, Any] = {"num_questions": first.num_questions, "whole": whole}
    if by_metric:
        primary, *_ = by_metric
        verdict = replace(judge(primary, by_metric[primary], others=by_metric), checkpoint=checkpoint)
        verdict.write(folder)
        header, rows = verdict.table
        shown |= {"verdict": json_records.encode(verdict), "header": header, "rows": rows}
    return shown


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.evaluate.tasks")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--task-folder", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--min-gain", action="append", default=[])
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")
    config = RunConfig.model_validate_json(sys.stdin.read())
    # Use plan.json's folder, because the run may have been moved. It must be absolute: the working directory changes.
    run = RunDir(arguments.plan.absolute().parent)
    folder = None if arguments.task_folder is None else arguments.task_folder.absolute()
    names = arguments.tasks.split(",")
    # The harness keeps tasks' rows in the cache of `datasets`.
    with private_files():
        return print_result(lambda: score_tasks(config, run, arguments.step, names, folder, arguments.limit, arguments.min_gain))


if __name__ == "__main__":
    run_process(main)
