"""Collect the facts that a plan is based on: the machine, the model's architecture, and the data cache's counts.

Reads the disk and queries the GPUs; downloads and converts nothing, and does not import torch. `python -m
launcher.worker.prepare` downloads or converts a missing model and builds a missing data cache.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import launcher
from launcher.config.schema import RunConfig
from launcher.config.sections.data import GENERAL_TEXT
from launcher.config.sections.evaluation import FORGETTING
from launcher.config.sections.model import is_run
from launcher.data import cache_store
from launcher.data.checks import findings
from launcher.data.sources.reading import check_sources, find_path_problem, make_set_data
from launcher.errors import ConfigError, DataError, Problem
from launcher.hardware import has_fast_bf16
from launcher.models import stored_checks
from launcher.models.found_model import FoundModel, local_folder
from launcher.plan.launch_plan import DataFacts, DeviceFacts, Facts, ModelFacts, Provenance

_PACKAGES = (*("torch", "deepspeed", "transformers", "ray", "wandb", "hydra-core", "submitit", "safetensors", "liger-kernel"),)


def resolve_settings(config: RunConfig, node: Callable[[], DeviceFacts]) -> RunConfig:
    """Resolve settings that depend on the current state or on the machines: `model.dtype=auto`, a run in `model.path` without a
    step, a folder name that could also be a Hub repository, and what the environment says about the machines.

    The newest checkpoint of that run is pinned: a job may wait in the queue for hours while the run continues. `node` returns
    the devices of one of the job's nodes; its CPUs are assumed to be like this machine's.

    Raises:
        ConfigError: if there is no such run or checkpoint.
    """
    sources = {"path": config.model.path, "tokenizer": config.model.tokenizer}
    changes = {key: local for key, value in sources.items() if value and (local := local_folder(value)) != value}
    if is_run(config.model.path):
        from launcher.models import parent_run

        changes["path"] = parent_run.resolve_parent(config).path
    if config.model.dtype == "auto":
        is_fast = config.cluster.gpu_type is not None or node().kind == "cuda" or has_fast_bf16()
        changes["dtype"] = "bf16" if is_fast else "fp32"
    if changes:
        config = config.model_copy(update={"model": config.model.model_copy(update=changes)})
    cluster = config.cluster.completed(os.environ)
    return config if cluster is config.cluster else config.model_copy(update={"cluster": cluster})


def gather(config: RunConfig, found: FoundModel, overrides: Sequence[str], node: DeviceFacts) -> Facts:
    """Collect the facts for a run whose settings `resolve_settings` returned, with their model.

    `node` describes a node's accelerators.

    Raises:
        ConfigError: with every path that is missing, empty or of the wrong kind.
        DataError: if a source is unreachable, or the data has token ids that the model's embedding lacks; includes its findings.
    """
    check(config, found)
    model = found.facts.model_copy(update={"isolation": stored_checks.load_verdict(found.facts, config.model)})
    data = data_facts(config, model.tokenizer_path)
    eval_sets = eval_set_facts(config, model.tokenizer_path)
    caches = [*([data] if data is not None else []), *eval_sets.values()]
    if problems := [problem for one in caches if (problem := id_problem(one.cache_dir, model))]:
        raise DataError([*problems, *(findings.problems(findings.read(data.cache_dir), config.data.checks) if data else [])])
    lineage = None
    if is_run(config.model.path):
        from launcher.models import parent_run

        lineage = parent_run.build_lineage(parent_run.find_parent(config.model.path or ""))
    return Facts(
        working_dir=os.getcwd(),
        home_dir=str(Path.home()),
        device=node,
        model=model,
        data=data,
        eval_sets=eval_sets,
        provenance=read_provenance(overrides),
        lineage=lineage,
    )


def check(config: RunConfig, found: FoundModel) -> None:
    """Check that the model and the data sources exist, and that the weights cover the model.

    Raises:
        ConfigError: with every path that is missing, empty or of the wrong kind, and with the tensors missing from the weights.
    """
    problems = [*found.problems, *check_sources(config.data)]
    for i, source in enumerate(config.data.sources):
        if source.path == GENERAL_TEXT:
            what = "this text shows what a model forgets, and a model that is trained on it shows nothing"
            remedy = "set eval.forgetting=true, and data.sources to rows of your own"
            problems.append(Problem(what, f"data.sources[{i}].path", source.path, remedy))
    for key, one in config.eval.sets_by_setting.items():
        where = key if one.name == FORGETTING else f"{key}.path"
        problems += filter(None, [find_path_problem(where, one)])
    if problems:
        raise ConfigError(problems)


def find_prepared_data(config: RunConfig, found: FoundModel) -> tuple[DataFacts, dict[str, DataFacts]] | None:
    """Return the data cache for these settings, and the evaluation sets' caches by name.

    None if `launcher.worker.prepare` must run before workers can start.
    """
    if not found.is_prepared:
        return None
    data, eval_sets = data_facts(config, str(found.tokenizer)), eval_set_facts(config, str(found.tokenizer))
    return (data, eval_sets) if data is not None and len(eval_sets) == len(config.eval.all_sets) else None


def needs_isolation_check(config: RunConfig, model: ModelFacts) -> bool:
    """Return True if config.json is available but nothing is known about the architecture."""
    # A GGUF file or a checkpoint is probed only after its conversion, when its config.json is complete.
    is_final = model.path is not None or config.model.path is None or config.model.config is not None
    return is_final and model.isolation is None


def is_extra_accepted(config: RunConfig) -> bool:
    """Return True if `deepspeed.extra` is empty, or the installed DeepSpeed accepted it on this machine."""
    return not config.deepspeed.extra or stored_checks.load(*_make_extra_key(config)) is not None


def accept_extra(config: RunConfig) -> None:
    """Store that DeepSpeed has accepted these settings. Raises DataError if the launcher's cache cannot be written."""
    stored_checks.save(*_make_extra_key(config), {})


def _make_extra_key(config: RunConfig) -> tuple[str, Any]:
    settings = [config.model.dtype, config.deepspeed.model_dump(mode="json")]
    return "deepspeed-checks", [_find_version("deepspeed"), launcher.__version__, *settings]


def data_facts(config: RunConfig, tokenizer_path: str | None) -> DataFacts | None:
    """Return the counts of the data cache for these sources and this tokenizer, or None if it is not built."""
    return None if tokenizer_path is None else cache_store.find_built(config.data, tokenizer_path)


def eval_set_facts(config: RunConfig, tokenizer_path: str | None) -> dict[str, DataFacts]:
    """Return the counts of the evaluation sets' data caches by name, except caches that are not built."""
    if tokenizer_path is None:
        return {}
    built = {one.name: cache_store.find_built(make_set_data(one, config.data), tokenizer_path) for one in config.eval.all_sets}
    return {name: counts for name, counts in built.items() if counts is not None}


def id_problem(cache_dir: str, model: ModelFacts) -> Problem | None:
    """Return the problem of a data cache with token ids beyond the model's embedding."""
    return cache_store.id_problem(cache_store.read_report(cache_dir)["max_token_id"], model.vocab_size, str(model.tokenizer_path))


def read_provenance(overrides: Sequence[str]) -> Provenance:
    commit = dirty = None
    # Of the checkout that the package runs from.
    folder = Path(launcher.__file__).resolve().parent.parent
    if (folder / ".git").exists():
        with suppress(OSError, subprocess.SubprocessError):
            run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=10, check=True, cwd=folder)
            head = run(["git", "rev-parse", "HEAD"]).stdout.strip()
            dirty = bool(run(["git", "status", "--porcelain", "--untracked-files=no"]).stdout.strip())
            commit = head
    return Provenance(
        created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        overrides=tuple(overrides),
        launcher_version=launcher.__version__,
        git_commit=commit,
        git_dirty=dirty,
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _find_version(name))},
    )


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
