"""The verb init: fit settings to the data, the model and the machine, write them to a file, and print what to run next."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import facts
from launcher.cli.plan import remarks
from launcher.cli.render import terminal
from launcher.cli.render.sections import Commands, Items, Part, Section, Text
from launcher.cli.verbs import flags_of
from launcher.cli.worker_process import run_worker_module
from launcher.clusters.backends import BACKENDS, cluster_for
from launcher.clusters.preflight import disk_note
from launcher.config.command_line import GROUPS, SUFFIXES, override_key
from launcher.config.compose import Composed, compose_one, conf_dir
from launcher.config.run_file import hide_secrets, render
from launcher.config.schema import RunConfig, leaves, settings
from launcher.config.sections.data import STDLIB_DOCS
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.config.sections.model import is_local_path, is_run
from launcher.errors import ConfigError, LauncherError, raise_reported
from launcher.models.found_model import find_model
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DeviceFacts, Facts, LaunchPlan, Topology
from launcher.plan.planner import choose_topology, device_gib
from launcher.plan.planner import plan as make_plan
from launcher.plan.quantities import format_count
from launcher.plan.suggested_settings import DataSample, Machine, Suggestion, needs_offload, suggest, suggest_held_out
from launcher.security.redaction import REDACTED
from launcher.shell_commands import launcher_command
from launcher.tracking.progress import show_waiting

# The sections of the file in reading order; others follow.
_ORDER = ("model", "data", "train", "optim", "deepspeed", "eval", "checkpoint", "cluster", "tracking", "run")
_FILE_WIDTH = 100
# Longer than inspecting the largest data takes: all rows are counted.
_LOOK_TIMEOUT_S = 3600.0
_ASSUMED_SIZE = "the size of the model is not known: 8 billion parameters are assumed"
_ASSUMED_PARAMS = 8_000_000_000
_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z])")


def write_file(arguments: argparse.Namespace) -> int:
    """Write the file, or refuse with the reason; nothing is overwritten."""
    named = [token.partition("=")[2].strip("'\"") for token in arguments.overrides if override_key(token) == "data.path"]
    data = arguments.data or next(reversed(named), None)
    out = arguments.out or Path(f"{_choose_name(data)}.yaml")
    composed = _compose(arguments.model, arguments.data, arguments.overrides)
    _require_free(out)
    if composed.config.cluster.runs_on_every_node and composed.config.run.name is None:
        # Every machine must find the same run.
        composed = _compose(arguments.model, arguments.data, [*arguments.overrides, f'run.name="{_choose_name(out.stem)}"'])
    with composed.located():
        starter = fit_settings(composed, data)
    values = _list_values(starter, composed)
    text = format_file(starter.head, values, starter.reasons)
    plan = _require_plan(text, out)
    with out.open("x", encoding="utf-8") as file:
        file.write(text)
    hidden = [key for key, value in leaves(values) if REDACTED in str(value)]
    notes = [f"wrote {out}", f"fitted to: {starter.machines}", *(f"assumed: {text}" for text in starter.assumptions)]
    notes += [f"warning: {key} looks like a credential: {out} has {REDACTED} in its place" for key in hidden]
    if plan is not None:
        notes += remarks(plan, disk_note(plan))
    commands = [launcher_command(verb, out) for verb in ("data", "plan", "train")]
    parts: list[Part] = [Items(notes), Section("next:", [Commands(commands)])]
    cluster = starter.config.cluster
    if cluster.runs_on_every_node and cluster.nodes > 1:
        shared = "run.root is a folder that all machines share"
        parts.append(Text(f"train starts on every machine, with the variables of docs/static.md; {shared}"))
    elif cluster.is_this_machine:
        parts.append(
            Text(
                "for a cluster, repeat init with another --out and +cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8: "
                "batch, length and memory depend on the machines"
            )
        )
    terminal.show(*parts)
    return 0


def format_file(head: Sequence[str], values: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Return the file: `head` as comments, then the sections; `reasons` is keyed by section or section.name."""
    sections = ["\n".join(_format_comment(line) for line in head)]
    for name in [*(name for name in _ORDER if name in values), *(name for name in values if name not in _ORDER)]:
        lines, content = [_format_comment(reasons[name])] if name in reasons else [], values[name]
        if isinstance(content, dict):
            lines.append(f"{name}:")
            for key, value in content.items():
                if reason := reasons.get(f"{name}.{key}"):
                    lines.append(_format_comment(reason, "  "))
                lines.append(textwrap.indent(render({key: value}).rstrip(), "  "))
        else:
            lines.append(render({name: content}).rstrip())
        sections.append("\n".join(lines))
    return "\n\n".join(sections) + "\n"


def _format_comment(text: str, indent: str = "") -> str:
    """Return a text as comment lines; no character in it, for example in a data file's name, can end the comment."""
    prefix = f"{indent}# "
    return textwrap.fill(
        " ".join(text.splitlines()),
        _FILE_WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_on_hyphens=False,
        break_long_words=False,
    )


def _choose_name(data: str | None) -> str:
    last = (data or "run").rstrip("/").rpartition("/")[2]
    while Path(last).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz", ".zst"):
        last = Path(last).stem
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "run"


def _require_free(out: Path) -> None:
    """Refuse to overwrite a file, to write to a missing folder, or to use a name that no command accepts as a run's file."""
    problem = ""
    if not out.name.endswith(SUFFIXES):
        problem = f"a file of settings must end in {' or '.join(SUFFIXES)}"
    elif out.exists() or out.is_symlink():
        problem = "the file exists, and init overwrites nothing"
    elif not out.parent.is_dir():
        problem = "the folder of the file does not exist"
    if problem:
        raise ConfigError(problem, where="--out", value=str(out), remedy="name another file with --out")


def _compose(model: str | None, data: str | None, rest: Sequence[str]) -> Composed:
    """Return the settings for model, data and overrides."""
    tokens = []
    if model:
        if Path(model).is_dir() and "/" not in model:
            model = f"./{model}"
        is_source = is_local_path(model) or is_run(model) or HUB_ID_PATTERN.fullmatch(model) or ":" in model
        tokens.append(f"model.path={_quote(model)}" if is_source else f"model={model}")
    tokens += ["data=jsonl", f"data.path={_quote(data)}"] if data else []
    keys = [override_key(token) for token in rest]
    if "data.path" in keys and "data" not in keys and not data:
        tokens.append("data=jsonl")
    return compose_one([*tokens, *rest], flags_of("init"))


def _quote(value: str) -> str:
    """Return a value in Hydra's syntax: quoted if it has characters that are not allowed in names."""
    if re.fullmatch(r"[\w./:@-]+", value):
        return value
    # `${` begins a reference.
    escaped = value.replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def _list_values(starter: StarterSettings, composed: Composed) -> dict[str, Any]:
    """Return the file's content: the options of groups, and everything that was typed or fitted."""
    before, after = (config.model_dump(mode="json") for config in (composed.config, starter.config))
    run_file, options = composed.origins.run_file, composed.origins.choices
    typed = {override_key(token) for token in composed.overrides if "=" in token or token.startswith("~")}
    typed |= set() if run_file is None else set(run_file.keys)
    # The setting of a key, such as data.sources of data.sources[0].path.
    given = {".".join(re.split(r"[.\[]", key)[:2]) for key in (*typed, *starter.reasons)}
    values: dict[str, Any] = {"experiment": options.get("experiment")} if "experiment" in typed else {}
    for section, content in after.items():
        is_whole = section in typed and section not in GROUPS
        own = {
            name: value
            for name, value in content.items()
            if is_whole or value != before[section].get(name) or f"{section}.{name}" in given
        }
        option = options.get(section)
        if option is not None and not (conf_dir() / section / f"{option}.yaml").is_file():
            # It is in a folder that only this command line names.
            option, own = None, content
        # A model of the user's own is no change of the option.
        is_own_model = section == "model" and "model.path" in typed and section not in typed
        if section in typed & {*GROUPS} or (section in ("model", "data", "cluster") and not is_own_model):
            values[section] = {"base": option, **own} if own or option is None else option
        elif own:
            values[section] = own
    return hide_secrets(values)


def _require_plan(text: str, out: Path) -> LaunchPlan | None:
    """Reject what `plan` would reject before the file is written; returns the plan, or None for a model not known yet."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / out.name
        file.write_text(text, encoding="utf-8")
        config = compose_one([str(file)]).config
    node = cluster_for(config.cluster.kind).device(config.cluster)
    config = facts.resolve_settings(config, lambda: node)
    found = find_model(config.model)
    if not found.is_config_known:
        return None
    try:
        return make_plan(config, facts.gather(config, found, (), node))
    except LauncherError as error:
        raise type(error)(
            replace(problem, remedy=f"{problem.remedy}; or add overrides to init, such as cluster.nodes=2")
            for problem in error.problems
        ) from error


@dataclass(frozen=True)
class StarterSettings:
    """The settings to write, the facts behind them, the assumptions, and the intended machines."""

    config: RunConfig
    reasons: dict[str, str]
    head: list[str]
    assumptions: list[str]
    machines: str


def fit_settings(composed: Composed, data: str | None) -> StarterSettings:
    """Inspect the data, the model and the machine, and suggest settings."""
    config = composed.config
    cluster = cluster_for(config.cluster.kind)
    node = cluster.device(config.cluster)
    config = facts.resolve_settings(config, lambda: node)
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
    num_params, max_positions, gathered, assumed = _estimate_model_size(config, composed.overrides, node)
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
    machine = Machine(topology.data_ranks, topology.device, device_gib(config, gathered))
    chosen = list_chosen(composed)
    if not is_demo:
        suggestions = suggest(num_params, max_positions, sample, machine, chosen)
    else:
        # The file of the demonstration chooses the other settings.
        reason = "a demonstration of a few minutes; with rows of your own: init --data FILE"
        suggestions = [Suggestion("train.max_steps", config.train.max_steps, reason)] if config.train.max_steps else []
    changes |= {one.key: one.value for one in suggestions}
    config = apply_changes(config, changes)
    of_data = [] if is_demo else _suggest_for_data(config, sample_report, sample, chosen)
    config = apply_changes(config, {one.key: one.value for one in of_data})
    config, offload = _fit_offload(config, gathered, machine, composed.overrides)
    # The file may be used on a machine for which `auto` means a different type.
    config = apply_changes(config, {"model.dtype": composed.config.model.dtype})
    reasons = {one.key: one.reason for one in (*suggestions, *of_data, *offload)}
    reasons["model"] = "a preset (listed by plan --help), or `path:` with a folder or a Hub id below `model:`"
    machines = _describe_machines(topology, node, config)
    others = ", ".join(kind for kind in BACKENDS if kind != config.cluster.kind)
    reasons["cluster"] = f"fitted to {machines}. Number of nodes and site settings are keys below; other clusters: {others}"
    return StarterSettings(config, reasons, _describe_data(sample_report, data), assumptions, machines)


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


def _suggest_for_data(config: RunConfig, report: dict[str, Any], sample: DataSample, chosen: dict[str, Any]) -> list[Suggestion]:
    """Return the settings that train every part of long texts, and hold out enough documents of small data for an evaluation."""
    suggestions = []
    if report["is_text"] and "data.long_documents" not in chosen and report["longest"] > config.data.max_length:
        # Texts have no answers that begin in another row.
        reason = "all of a text that is longer than a row is trained; truncate cuts its end off"
        suggestions.append(Suggestion("data.long_documents", "split", reason))
    share = config.data.eval_fraction
    if share and "data.eval_fraction" not in chosen and (larger := suggest_held_out(sample.num_documents, share)):
        suggestions.append(larger)
    return suggestions


def _estimate_model_size(config: RunConfig, overrides: Sequence[str], node: DeviceFacts) -> tuple[int, int | None, Facts, str]:
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
    gathered = Facts(working_dir=os.getcwd(), device=node, model=stand_in, data=None, provenance=facts.read_provenance(overrides))
    return int(size), None, gathered, assumed


def _fit_offload(
    config: RunConfig, gathered: Facts, machine: Machine, overrides: Sequence[str]
) -> tuple[RunConfig, list[Suggestion]]:
    """Return the settings with optimizer states in main memory if a GPU has too little memory for them."""
    if any(override_key(override).startswith("deepspeed") for override in overrides):
        return config, []
    # The plan may reject the settings.
    with suppress(ConfigError):
        if not needs_offload(make_plan(config, gathered).memory.per_rank_gib, machine):
            return config, []
    if machine.device != "cuda" or machine.memory_gib is None:
        return config, []
    changed = apply_changes(config, {"deepspeed.offload_optimizer": "cpu", "deepspeed.offload_params": "cpu"})
    reason = f"model states would fill the {machine.memory_gib:.0f} GiB of a GPU; more GPUs make steps faster, without offload"
    return changed, [Suggestion("deepspeed", "cpu", reason)]


def _describe_machines(topology: Topology, node: DeviceFacts, config: RunConfig) -> str:
    """Describe the machines that the settings are for, such as `16 GPUs of type H100-80GB on 2 nodes (slurm)`."""
    count, nodes = topology.world_size, config.cluster.nodes
    if topology.device != "cuda":
        ranks = f"{format_count(count, 'CPU rank')} on {node.name}"
    elif kind := config.cluster.gpu_type or (node.name if node.name != "gpu" else ""):
        ranks = f"{format_count(count, 'GPU')} of type {kind}"
    else:
        ranks = f"{format_count(count, 'GPU')} of unknown type"
    ranks += f" on {nodes} nodes" if nodes > 1 else ""
    return f"{ranks} ({'this machine' if config.cluster.is_this_machine else config.cluster.kind})"


def _describe_data(sample_report: dict[str, Any], data: str | None) -> list[str]:
    lines = ["Settings of a run: docs/run-file.md. Every key is in docs/settings.md."]
    for source in sample_report["sources"]:
        lines.append(f"{data or source['path']}: {format_count(source['num_rows'], 'row')}.")
    counted = "tokens" if sample_report["is_measured"] else "tokens (estimated)"
    lines.append(
        "Of {num_sampled:,} documents, half have up to {p50:,} {counted}, 90 of 100 up to {p90:,}, 99 of 100 up to {p99:,}; "
        "the longest has {longest:,}.".format(counted=counted, **sample_report)
    )
    return lines
