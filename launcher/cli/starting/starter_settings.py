"""Settings that fit the data, the model and the machine, with the reason for each; `init` writes them to a file."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher import facts
from launcher.cli.views.starter_file import data_warnings
from launcher.cli.worker_process import run_worker_module
from launcher.clusters.backends import BACKENDS, cluster_for
from launcher.config.command_line import override_key
from launcher.config.compose import Composed
from launcher.config.known_settings import settings
from launcher.config.schema import RunConfig
from launcher.config.sections.data import STDLIB_DOCS
from launcher.errors import ConfigError, raise_reported
from launcher.models.found_model import find_model
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DeviceFacts, Facts
from launcher.plan.planner import choose_topology, device_gib
from launcher.plan.planner import plan as make_plan
from launcher.plan.quantities import format_count
from launcher.plan.suggested_settings import DataSample, Machine, Suggestion, needs_offload, suggest, suggest_held_out
from launcher.tracking.progress import show_waiting

_OFFLOAD = "zero3_offload"
# Longer than inspecting the largest data takes: all rows are counted.
_LOOK_TIMEOUT_S = 3600.0
_ASSUMED_SIZE = "the size of the model is not known: 8 billion parameters are assumed"
_ASSUMED_PARAMS = 8_000_000_000
_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z])")


@dataclass(frozen=True)
class StarterSettings:
    """The settings to write, the facts behind them, the assumptions, what `data` would reject, and the intended machines."""

    config: RunConfig
    reasons: dict[str, str]
    head: list[str]
    assumptions: list[str]
    warnings: list[str]
    machines: str


def fit_settings(composed: Composed, data: str | None) -> StarterSettings:
    """Inspect the data, the model and the machine, and suggest settings.

    Raises:
        ConfigError, DataError: for a model or data that a run would reject.
    """
    config = composed.config
    cluster = cluster_for(config.cluster.kind)
    node = cluster.device(config.cluster)
    config = facts.resolve(config, lambda: node)
    facts.check(config, find_model(config.model))
    with show_waiting("reading a sample of the data"):
        sample_report = run_worker_module("launcher.worker.data_sample", config, timeout_s=_LOOK_TIMEOUT_S)
    raise_reported(sample_report)
    changes: dict[str, Any] = {}
    assumptions = []
    if not sample_report["is_measured"]:
        assumptions.append(f"{sample_report['note']}: the length of documents is estimated from characters")
    if sample_report["config"] is not None and config.model.config is None:
        changes["model.config"] = sample_report["config"]
        config = apply_changes(config, changes)
    num_params, max_positions, gathered, assumed = _model_size(config, composed.overrides, node)
    assumptions += [assumed] if assumed else []
    sample = DataSample(
        num_documents=sum(source["num_rows"] for source in sample_report["sources"]),
        mean_tokens=sample_report["mean"],
        p99_tokens=sample_report["p99"],
        longest_tokens=sample_report["longest"],
        is_measured=sample_report["is_measured"],
    )
    topology = choose_topology(config, gathered)
    is_demo = not data and all(source.path == STDLIB_DOCS for source in config.data.sources)
    machine = Machine(topology.world_size, topology.device, device_gib(config, gathered))
    chosen = list_chosen(composed)
    suggestions = _of_demo(config) if is_demo else suggest(num_params, max_positions, sample, machine, chosen)
    changes |= {one.key: one.value for one in suggestions}
    config = apply_changes(config, changes)
    of_data = [] if is_demo else [*_splits_text(config, sample_report, chosen), *_holds_out(config, sample, chosen)]
    config = apply_changes(config, {one.key: one.value for one in of_data})
    config, offload = _offloaded(config, gathered, machine, composed.overrides)
    # The file may be used on a machine for which `auto` means a different type.
    config = apply_changes(config, {"model.dtype": composed.config.model.dtype})
    reasons = {one.key: one.reason for one in (*suggestions, *of_data, *offload)}
    reasons["model"] = "a preset (listed by plan --help), or `path:` with a folder or a Hub id below `model:`"
    machines = _machines(machine, node, config)
    others = ", ".join(kind for kind in BACKENDS if kind != config.cluster.kind)
    reasons["cluster"] = f"fitted to {machines}. Number of nodes and site settings are keys below; other clusters: {others}"
    warnings = [] if is_demo else data_warnings(config, sample_report)
    return StarterSettings(config, reasons, _head(sample_report, data), assumptions, warnings, machines)


def list_chosen(composed: Composed) -> dict[str, Any]:
    """Return the settings that overrides set, with their values."""
    values = composed.config.model_dump(mode="json")
    keys = [override_key(token) for token in composed.overrides]
    return {
        key: values[key.partition(".")[0]][key.partition(".")[2]] for key in keys if key in settings() and key.count(".") == 1
    }


def apply_changes(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    """Return the settings with changed values, keyed by names such as `train.epochs`."""
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    if "train.epochs" in changes:
        values["train"]["max_steps"] = None
    return RunConfig.model_validate(values)


def _splits_text(config: RunConfig, sample_report: dict[str, Any], chosen: dict[str, Any]) -> list[Suggestion]:
    """Return the setting that trains every part of long texts, which have no answers that begin in another row."""
    is_text = all(source["format"] == "text" for source in sample_report["sources"])
    if not is_text or "data.long_documents" in chosen or sample_report["longest"] <= config.data.max_length:
        return []
    return [
        Suggestion(
            "data.long_documents", "split", "all of a text that is longer than a row is trained; truncate cuts its end off"
        )
    ]


def _holds_out(config: RunConfig, sample: DataSample, chosen: dict[str, Any]) -> list[Suggestion]:
    """Return the setting that holds out enough documents of small data for an evaluation."""
    share = config.data.eval_fraction
    larger = suggest_held_out(sample.num_documents, share) if share and "data.eval_fraction" not in chosen else None
    return [] if larger is None else [larger]


def _model_size(config: RunConfig, overrides: Sequence[str], node: DeviceFacts) -> tuple[int, int | None, Facts, str]:
    """Return the model's parameters and positions, the facts for the plan, and the assumptions (empty if there are none)."""
    found = find_model(config.model)
    if found.is_config_known:
        gathered = facts.gather(config, found, overrides, node)
        positions = gathered.model.config.get("max_position_embeddings")
        return gathered.model.num_params, positions, gathered, ""
    match = _SIZE_IN_NAME.search(config.model.path or "")
    size = float(match[1]) * (1e9 if match[2] in "bB" else 1e6) if match else _ASSUMED_PARAMS
    assumed = f"the size of the model is taken from its name: {size / 1e9:g} billion parameters" if match else _ASSUMED_SIZE
    known = {"hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 1}
    stand_in = model_facts({**known, "model_type": "llama"}, None, None, int(size))
    gathered = Facts(working_dir=os.getcwd(), device=node, model=stand_in, data=None, provenance=facts.provenance(overrides))
    return int(size), None, gathered, assumed


def _of_demo(config: RunConfig) -> list[Suggestion]:
    """Return the demonstration's settings that a reader may want to change; its file chooses the others."""
    reason = "a demonstration of a few minutes; with rows of your own: init --data FILE"
    return [Suggestion("train.max_steps", config.train.max_steps, reason)] if config.train.max_steps else []


def _offloaded(
    config: RunConfig, gathered: Facts, machine: Machine, overrides: Sequence[str]
) -> tuple[RunConfig, list[Suggestion]]:
    """Return the settings with optimizer states in main memory if a GPU has too little memory for them."""
    if any(override.lstrip("+").startswith("deepspeed") for override in overrides):
        return config, []
    states_gib = _states_gib(config, gathered)
    if states_gib is not None and not needs_offload(states_gib, machine):
        return config, []
    if machine.device != "cuda" or machine.memory_gib is None:
        return config, []
    changed = apply_changes(config, {"deepspeed.offload_optimizer": "cpu", "deepspeed.offload_params": "cpu"})
    reason = f"model states would fill the {machine.memory_gib:.0f} GiB of a GPU; more GPUs make steps faster, without offload"
    return changed, [Suggestion("deepspeed", _OFFLOAD, reason)]


def _states_gib(config: RunConfig, gathered: Facts) -> float | None:
    """Return a rank's model states in GiB, or None if the plan rejects the settings."""
    try:
        return make_plan(config, gathered).memory.per_rank_gib
    except ConfigError:
        return None


def _machines(machine: Machine, node: DeviceFacts, config: RunConfig) -> str:
    """Describe the machines that the settings are for, such as `16 GPUs of type H100-80GB on 2 nodes (slurm)`."""
    count, nodes = machine.world_size, config.cluster.nodes
    if machine.device != "cuda":
        ranks = f"{format_count(count, 'CPU rank')} on {node.name}"
    elif kind := config.cluster.gpu_type or (node.name if node.name != "gpu" else ""):
        ranks = f"{format_count(count, 'GPU')} of type {kind}"
    else:
        ranks = f"{format_count(count, 'GPU')} of unknown type"
    ranks += f" on {nodes} nodes" if nodes > 1 else ""
    return f"{ranks} ({'this machine' if config.cluster.is_this_machine else config.cluster.kind})"


def _head(sample_report: dict[str, Any], data: str | None) -> list[str]:
    lines = ["Settings of a run: docs/run-file.md. Every key is in docs/settings.md."]
    for source in sample_report["sources"]:
        form = f" in the {source['format']} format" if source["format"] else ""
        lines.append(f"{data or source['path']}: {format_count(source['num_rows'], 'row')}{form}.")
    counted = "tokens" if sample_report["is_measured"] else "tokens (estimated)"
    lines.append(
        "Of {num_sampled:,} documents, half have up to {p50:,} {counted}, 90 of 100 up to {p90:,}, 99 of 100 up to {p99:,}; "
        "the longest has {longest:,}.".format(counted=counted, **sample_report)
    )
    return lines
