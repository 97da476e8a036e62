"""The only module that imports lm-evaluation-harness: finds its tasks, and scores a model on them.

Tasks read Hub data sets and `evaluate` metrics from the local cache; nothing is fetched.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from huggingface_hub import constants

from launcher.errors import ConfigError, DataError, LauncherError, Problem, did_you_mean

INSTALL = 'install it with: pip install "launcher[evals]"'
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
_REPOSITORY = re.compile(r"'([\w.-]+/[\w.-]+)'")
_WHERE = "--tasks"
# What ends the thoughts of a reasoning model; the harness scores what follows.
THOUGHT_END = "</think>"
# Tolerance within which an aggregate counts as the mean of the per-question scores.
_SAME = 1e-6
_SEED = 1234


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


class Harness:
    """The known tasks: those of lm-evaluation-harness and those in the user's own folder."""

    def __init__(self, folder: Path | None = None) -> None:
        """Read the names of all tasks, which takes seconds.

        Raises:
            ConfigError: if lm-evaluation-harness is not installed.
        """
        os.environ.update(dict.fromkeys(_OFFLINE, "1"))
        # Its client has read the variable if transformers is imported, and nothing guards what tasks would fetch with it.
        constants.HF_HUB_OFFLINE = True
        # Data sets and metrics are looked up in the working directory first, which may belong to another user.
        os.chdir("/")
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            message = f"lm-evaluation-harness cannot be imported: {error}"
            raise ConfigError(message, where=_WHERE, remedy=INSTALL) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._manager = TaskManager(include_path=None if folder is None else str(folder))
        self._version = str(lm_eval.__version__)

    def find(self, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Return the tasks that these names of tasks, groups and tags stand for, in order, each with its metrics.

        Raises:
            ConfigError: with every name that is unknown or whose task may not run.
            DataError: with every task whose data is not on this machine.
        """
        metrics, problems, missing = dict[str, tuple[str, ...]](), list[Problem](), list[Problem]()
        for name in names:
            if name not in self._manager.task_index:
                remedy = f"{did_you_mean(name, self._manager.all_tasks)} lm-eval ls tasks lists them".strip()
                problems.append(Problem("there is no such task", where=_WHERE, value=name, remedy=remedy))
                continue
            try:
                tasks = self._load(name)["tasks"]
            except LauncherError as error:
                problems += [replace(problem, value=name) for problem in error.problems]
            except ImportError as error:
                text = _one_line(error)
                problems.append(Problem(f"a task needs another package: {text}", _WHERE, name, "install what it names"))
            except (ConnectionError, FileNotFoundError) as error:
                missing.append(_missing_data(name, error))
            # A task is third-party configuration and code, and may raise anything.
            except Exception as error:
                text = f"a task cannot be loaded: {type(error).__name__}: {_one_line(error)}"
                problems.append(Problem(text, where=_WHERE, value=name))
            else:
                problems += [problem for task in tasks if (problem := _unsafe_problem(task, tasks[task])) is not None]
                metrics |= {task: _metrics(loaded) for task, loaded in tasks.items()}
        if problems:
            raise ConfigError([*problems, *missing])
        if missing:
            raise DataError(missing)
        return metrics

    def _load(self, name: str) -> dict[str, Any]:
        with _no_code_of_models():
            loaded: dict[str, Any] = self._manager.load([name])
        return loaded

    def describe(self, task: str) -> str:
        """Return what determines a task's scores apart from the model."""
        (loaded,) = self._load(task)["tasks"].values()
        return json.dumps([self._version, loaded.dump_config()], sort_keys=True, default=str)

    def score(self, task: str, model: Any, limit: int | None, belongs_to: str) -> TaskScores:
        """Score a model on a task; `limit` is how many of its first questions to ask, None for all."""
        from lm_eval import evaluate

        loaded = self._load(task)
        for one in loaded["tasks"].values():
            if one.get_config("num_fewshot") is None:
                one.set_config("num_fewshot", 0)
            one.set_fewshot_seed(seed=_SEED)
        # Tasks use either generator to shuffle choices and draw examples.
        random.seed(_SEED)
        np.random.seed(_SEED)
        has_template = bool(model.tokenizer.chat_template)
        with _no_code_of_models():
            result: Any = evaluate(
                lm=model,
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                apply_chat_template=has_template,
                fewshot_as_multiturn=has_template,
            )
        return _read_scores(task, result, belongs_to)


@contextmanager
def _no_code_of_models() -> Iterator[None]:
    """Keep transformers from importing model code in this block, whatever trust_remote_code a task passes.

    Raises:
        ConfigError: in the block, if it would import such code.
    """
    from transformers import dynamic_module_utils

    def refuse(*_: Any, **__: Any) -> None:
        message = "a task loads a model or tokenizer with code of its own, which would run (trust_remote_code)"
        raise ConfigError(message, where=_WHERE, remedy="leave it out")

    # All code loading finds its file, and creates a package for its copy, with these.
    before = {name: getattr(dynamic_module_utils, name) for name in ("get_cached_module_file", "create_dynamic_module")}
    for name in before:
        setattr(dynamic_module_utils, name, refuse)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(dynamic_module_utils, name, function)


def make_model(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    """Wrap a transformers model as a harness model."""
    from lm_eval.models.huggingface import HFLM

    hides_bars, thinks = not sys.stderr.isatty(), THOUGHT_END in str(tokenizer.chat_template or "")

    class ScoredModel(HFLM):  # type: ignore[misc, unused-ignore]
        """Shows progress bars only on terminals, and keeps the thoughts of a reasoning model."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=hides_bars)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood_rolling(requests, disable_tqdm=hides_bars)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().generate_until(requests, disable_tqdm=hides_bars)

        def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
            if thinks:
                # The line breaks in the thoughts would end the answer. The harness cuts answers at these texts afterwards.
                stop = [text for text in stop if not text.isspace()]
            return super()._model_generate(context, max_length, stop, **options)

    sizes = {"batch_size": batch_size, "max_length": max_length}
    return ScoredModel(pretrained=model, tokenizer=tokenizer, **sizes, think_end_token=THOUGHT_END)


def digest(*parts: str) -> str:
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def _unsafe_problem(name: str, task: Any) -> Problem | None:
    """Return the problem of a task that declares that it runs answers."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task.config, "unsafe_code", False):
        message = "a task runs code that the model has written, which nothing here isolates"
        return Problem(message, _WHERE, name, "leave it out")
    return None


def _metrics(task: Any) -> tuple[str, ...]:
    return tuple(str(one["metric"]) for one in task.config.metric_list or ())


def _missing_data(name: str, error: Exception) -> Problem:
    text = _one_line(error)
    if match := _REPOSITORY.search(text):
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = f"datasets--{match[1].replace('/', '--')}"
        remedy = (
            f"on a machine that reaches the Hub: hf download --repo-type dataset {match[1]}; then copy {folder} from its cache "
            f"(~/.cache/huggingface/hub) to {HF_HUB_CACHE}"
        )
        return Problem(f"the data of a task is not on this machine: {match[1]}", where=_WHERE, value=name, remedy=remedy)
    return Problem(f"the data of a task is not on this machine: {text}", _WHERE, name, "put it where the task looks for it")


def _read_scores(task: str, result: Any, belongs_to: str) -> TaskScores:
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
    num_questions = max(map(len, by_filter.values()), default=0)
    for key, value in values.items():
        metric, _, name = key.partition(",")
        rows = sorted(by_filter.get(name, []), key=lambda one: one["doc_id"])
        single = [one.get(metric) for one in rows]
        if single and all(isinstance(score, int | float) for score in single):
            scores = tuple(float(score) for score in single if score is not None)
            if abs(sum(scores) / len(scores) - value) < _SAME:
                samples[key] = scores
    lower = tuple(key for key in values if higher.get(key.partition(",")[0]) is False)
    return TaskScores(belongs_to, num_questions, values, samples, lower)


def _one_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())
