"""The verb init: write a starter file that fits the data, the model and the machine, and say what to run next."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import facts, model_source
from launcher.cli.arguments import COMMON_FLAGS, VerbParser
from launcher.cli.views.starter_file import data_warnings, next_lines, slurm_overrides, starter_text
from launcher.cli.worker_process import run_worker_module
from launcher.clusters.backends import BACKENDS, cluster_for
from launcher.config.command_line import override_key
from launcher.config.compose import Composed, conf_dir, run_hydra
from launcher.config.error_messages import no_such_option
from launcher.config.introspect import settings
from launcher.config.run_file.printing import values_to_print
from launcher.config.run_file.tokens import SUFFIXES, split_run_files
from launcher.config.schema import RunConfig, is_local_path, is_run
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.errors import ConfigError, LauncherError, raise_reported
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DeviceFacts, Facts, LaunchPlan
from launcher.plan.planner import choose_topology, device_gib
from launcher.plan.planner import plan as make_plan
from launcher.plan.quantities import format_count
from launcher.plan.suggested_settings import DataSample, Machine, Suggestion, needs_offload, suggest
from launcher.security.redaction import redact
from launcher.shell_commands import launcher_command

_OFFLOAD = "zero3_offload"
# Longer than a look at the largest data takes: all rows are counted.
_LOOK_TIMEOUT_S = 3600.0
_ASSUMED_SIZE = "the size of the model is not known: it is taken for one of 8 billion parameters"
_ASSUMED_PARAMS = 8_000_000_000
_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z])")


@dataclass(frozen=True)
class _Look:
    """The settings to write, the facts behind them, what had to be assumed, what `data` would refuse, and for which machines."""

    config: RunConfig
    reasons: dict[str, str]
    head: list[str]
    assumptions: list[str]
    warnings: list[str]
    machines: str


def run(verb: str, tokens: list[str]) -> int:
    """Write the file, or refuse with what is in the way; nothing is overwritten."""
    arguments, rest = _parser().parse_known_args(tokens)
    _refuse_run_file(rest)
    data = arguments.data or _rows_of(rest)
    out = Path(arguments.out or f"{_name_of(data)}.yaml")
    _require_free(out)
    composed = _with_name(_compose(arguments.model, arguments.data, rest), out)
    with composed.located():
        look = _look(composed, data)
    values = _values(look, composed)
    text = starter_text(look.head, values, look.reasons)
    plan = _require_plan(text, out)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _require_free(out)
        raise
    is_cluster_chosen = any(override_key(token) == "cluster" for token in composed.overrides)
    remarks_on_data = [*(f"assumed: {text}" for text in look.assumptions), *(f"warning: {text}" for text in look.warnings)]
    has_slurm_line = not is_cluster_chosen and look.config.cluster.is_this_machine and _plans_on_slurm(text, out, plan)
    print("\n".join(next_lines(out, look.config, look.machines, remarks_on_data, plan, has_slurm_line)))
    return 0


def _parser() -> VerbParser:
    parser = VerbParser(
        prog="python -m launcher init",
        usage="%(prog)s [--data FILE] [--model NAME] [--out FILE] [overrides]",
        description="Write a commented file of settings that fits the data, the model and this machine or +cluster=..., and "
        "print the commands that use it. Nothing is overwritten or started.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", metavar="FILE", help="a file, folder, pattern or Hub dataset with your rows (default: a demo)")
    parser.add_argument("--model", metavar="NAME", help="a preset, a folder, a Hub id or run:NAME (default: a demo)")
    parser.add_argument("--out", metavar="FILE", help="the file to write (default: named after the data)")
    return parser


def _refuse_run_file(rest: Sequence[str]) -> None:
    """Refuse a run's file among the words, since init writes one.

    Raises:
        ConfigError: with what each of both is for.
    """
    if any(token.startswith("--") for token in rest):
        # A flag that is misspelled is reported first; the file may be its value.
        return
    if files := split_run_files(rest, ())[0]:
        remedy = f"use this file with: {launcher_command('plan', files[0])}; a file to write is named with --out"
        if not files[0].endswith(SUFFIXES):
            remedy = f"name rows with: --data {files[0]}"
        message = "init writes a run's file and begins with none"
        raise ConfigError(message, where="command line", value=redact(files[0]), remedy=remedy)


def _rows_of(overrides: Sequence[str]) -> str | None:
    """Return the rows that overrides name, as --data would."""
    paths = [token.partition("=")[2].strip("'\"") for token in overrides if override_key(token) == "data.path"]
    return paths[-1] if paths else None


def _name_of(data: str | None) -> str:
    last = (data or "run").rstrip("/").rpartition("/")[2]
    while Path(last).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz", ".zst"):
        last = Path(last).stem
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "run"


def _require_free(out: Path) -> None:
    """Refuse to overwrite a file, to write into a folder that does not exist, or a name that no command takes as a run's file.

    Raises:
        ConfigError: with a name that is free.
    """
    if not out.name.endswith(SUFFIXES):
        remedy = f"write --out {shlex.quote(str(out.with_suffix(SUFFIXES[0])))}"
        raise ConfigError(f"the file of a run ends in {' or '.join(SUFFIXES)}", where="--out", value=str(out), remedy=remedy)
    if out.exists() or out.is_symlink():
        names = (out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(2, 1000))
        free = next(name for name in names if not name.exists())
        remedy = f"choose another name, such as --out {free}, or remove the file"
        raise ConfigError("the file exists, and init overwrites nothing", where="--out", value=str(out), remedy=remedy)
    if not out.parent.is_dir():
        remedy = f"create it with: mkdir -p {out.parent}"
        raise ConfigError("the folder of the file does not exist", where="--out", value=str(out), remedy=remedy)


def _compose(model: str | None, data: str | None, rest: Sequence[str]) -> Composed:
    """Return the settings of model, data and overrides.

    Raises:
        ConfigError: with what is wrong in them.
    """
    tokens = [_model_token(model)] if model else []
    tokens += ["data=jsonl", f"data.path={_quoted(data)}"] if data else []
    keys = [override_key(token) for token in rest]
    if "data.path" in keys and "data" not in keys and not data:
        tokens.append("data=jsonl")
    jobs: list[Composed] = []
    run_hydra([*tokens, *rest], jobs.append, ("--data", "--model", "--out", *COMMON_FLAGS))
    if len(jobs) != 1:
        remedy = "leave out -m and Hydra's own flags"
        raise ConfigError("init writes the settings of one run", where="command line", value=" ".join(rest), remedy=remedy)
    return jobs[0]


def _with_name(composed: Composed, out: Path) -> Composed:
    """Return the settings with a name for the run, after the file, where every machine must find the same run."""
    config = composed.config
    if not config.cluster.runs_on_every_node or config.run.name is not None:
        return composed
    return replace(composed, config=_changed(config, {"run.name": _name_of(out.stem)}))


def _model_token(model: str) -> str:
    options = sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml"))
    if model in options:
        return f"model={model}"
    if not (is_local_path(model) or is_run(model) or HUB_ID_PATTERN.fullmatch(model) or ":" in model or Path(model).is_dir()):
        problem = no_such_option("model", model, options, "")
        remedy = f"{problem.remedy}; or name a folder (./NAME) or a Hub id (owner/name)"
        raise ConfigError(replace(problem, where="--model", value=model, remedy=remedy))
    return f"model.path={_quoted(f'./{model}' if Path(model).is_dir() and '/' not in model else model)}"


def _quoted(value: str) -> str:
    """Return a value as Hydra takes it: in quotation marks where it has other characters than names have."""
    if re.fullmatch(r"[\w./:@-]+", value):
        return value
    # `${` begins a reference.
    escaped = value.replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'


def _look(composed: Composed, data: str | None) -> _Look:
    """Look at the data, the model and the machine, and suggest settings.

    Raises:
        ConfigError, DataError: for a model or data that a run would refuse.
    """
    config = composed.config
    cluster = cluster_for(config.cluster.kind)
    node = cluster.device(config.cluster)
    config = facts.resolve(config, lambda: node)
    facts.check(config)
    sample_report = run_worker_module("launcher.worker.data_sample", config, timeout_s=_LOOK_TIMEOUT_S)
    raise_reported(sample_report)
    changes: dict[str, Any] = {}
    assumptions = []
    if not sample_report["is_measured"]:
        assumptions.append(f"{sample_report['note']}: the length of documents is estimated from characters")
    if sample_report["config"] is not None and config.model.config is None:
        changes["model.config"] = sample_report["config"]
        config = _changed(config, changes)
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
    machine = Machine(topology.world_size, topology.device, device_gib(config, gathered))
    chosen = _chosen(composed)
    suggestions = suggest(num_params, max_positions, sample, machine, chosen) if data else _of_demo(config)
    changes |= {one.key: one.value for one in suggestions}
    config = _changed(config, changes)
    split = _splits_text(config, sample_report, chosen) if data else []
    config = _changed(config, {one.key: one.value for one in split})
    config, offload = _offloaded(config, gathered, machine, composed.overrides)
    # The file may be used on a machine for which `auto` means another type.
    config = _changed(config, {"model.dtype": composed.config.model.dtype})
    reasons = {one.key: one.reason for one in (*suggestions, *split, *offload)}
    reasons["model"] = "a preset (listed by plan --help), or `path:` with a folder or a Hub id below `model:`"
    machines = _machines(machine, node, config)
    reasons["cluster"] = f"fitted to {machines}. Number of nodes and site settings are keys of this section; {_backends(config)}"
    warnings = data_warnings(config, sample_report) if data else []
    return _Look(config, reasons, _head(sample_report, data), assumptions, warnings, machines)


def _splits_text(config: RunConfig, sample_report: dict[str, Any], chosen: dict[str, Any]) -> list[Suggestion]:
    """Return the setting that trains every part of long texts; they have no answer whose beginning is in another row."""
    is_text = all(source["format"] == "text" for source in sample_report["sources"])
    if not is_text or "data.long_documents" in chosen or sample_report["longest"] <= config.data.max_length:
        return []
    return [
        Suggestion(
            "data.long_documents", "split", "all of a text that is longer than a row is trained; truncate cuts its end off"
        )
    ]


def _model_size(config: RunConfig, overrides: Sequence[str], node: DeviceFacts) -> tuple[int, int | None, Facts, str]:
    """Return the parameters and positions of the model, the facts for the plan, and what was assumed; empty if nothing was."""
    if model_source.is_config_known(config.model):
        gathered = facts.gather(config, overrides, node)
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
    """Return the settings of the demonstration that a reader may want to change; its file chooses the others."""
    reason = "a demonstration of a few minutes; with rows of your own: init --data FILE"
    return [Suggestion("train.max_steps", config.train.max_steps, reason)] if config.train.max_steps else []


def _chosen(composed: Composed) -> dict[str, Any]:
    """Return the settings that overrides set, with their values."""
    values = composed.config.model_dump(mode="json")
    keys = [override_key(token) for token in composed.overrides]
    return {
        key: values[key.partition(".")[0]][key.partition(".")[2]] for key in keys if key in settings() and key.count(".") == 1
    }


def _changed(config: RunConfig, changes: dict[str, Any]) -> RunConfig:
    values = config.model_dump(mode="json")
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    if "train.epochs" in changes:
        values["train"]["max_steps"] = None
    return RunConfig.model_validate(values)


def _offloaded(
    config: RunConfig, gathered: Facts, machine: Machine, overrides: Sequence[str]
) -> tuple[RunConfig, list[Suggestion]]:
    """Return the settings with optimizer states in main memory where a GPU has too little for them."""
    if any(override.lstrip("+").startswith("deepspeed") for override in overrides):
        return config, []
    states_gib = _states_gib(config, gathered)
    if states_gib is not None and not needs_offload(states_gib, machine):
        return config, []
    if machine.device != "cuda" or machine.memory_gib is None:
        return config, []
    changed = _changed(
        config, {"deepspeed.name": _OFFLOAD, "deepspeed.offload_optimizer": "cpu", "deepspeed.offload_params": "cpu"}
    )
    reason = f"model states would fill the {machine.memory_gib:.0f} GiB of a GPU; more GPUs make steps faster, without offload"
    return changed, [Suggestion("deepspeed", _OFFLOAD, reason)]


def _states_gib(config: RunConfig, gathered: Facts) -> float | None:
    """Return the model states of a rank in GiB; None where the plan refuses them."""
    try:
        return make_plan(config, gathered).memory.per_rank_gib
    except ConfigError:
        return None


def _machines(machine: Machine, node: DeviceFacts, config: RunConfig) -> str:
    """Return the machines that the settings are for, such as `16 GPUs of type H100-80GB on 2 nodes (slurm)`."""
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


def _backends(config: RunConfig) -> str:
    """Return the names of the backends other than that of the settings."""
    return f"other clusters: {', '.join(kind for kind in BACKENDS if kind != config.cluster.kind)}"


def _values(look: _Look, composed: Composed) -> dict[str, Any]:
    """Return the content of the file: what differs from the options, and everything that has a reason."""
    values = values_to_print(look.config, conf_dir())
    dumped = look.config.model_dump(mode="json")
    # What the data and the model are named by stands in their sections already.
    for key in (*look.reasons, *_chosen(composed)):
        section, _, name = key.partition(".")
        content = values.setdefault(section, {} if name else dumped[section].get("kind", {}))
        if name and not isinstance(content, dict):
            content = values[section] = {"base": content}
        if name and name not in content:
            content[name] = dumped[section][name]
    for section, content in values.items():
        if isinstance(content, dict) and list(content) == ["base"]:
            values[section] = content["base"]
    return values


def _require_plan(text: str, out: Path) -> LaunchPlan | None:
    """Refuse what `plan` would refuse, before the file is written; returns the plan, None for a model that is not known yet.

    Raises:
        LauncherError: with the problems.
    """
    config = _compose_text(text, out)
    node = cluster_for(config.cluster.kind).device(config.cluster)
    config = facts.resolve(config, lambda: node)
    if not model_source.is_config_known(config.model):
        return None
    try:
        return make_plan(config, facts.gather(config, (), node))
    except LauncherError as error:
        raise type(error)(
            replace(problem, remedy=f"{problem.remedy}; or add overrides to init, such as cluster.nodes=2")
            for problem in error.problems
        ) from error


def _compose_text(text: str, out: Path, *overrides: str) -> RunConfig:
    composed: list[Composed] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / out.name
        file.write_text(text, encoding="utf-8")
        run_hydra([str(file), *overrides], composed.append)
    return composed[0].config


def _plans_on_slurm(text: str, out: Path, plan: LaunchPlan | None) -> bool:
    """Return whether the file, fitted to the GPUs of this machine, plans for two nodes of them."""
    if plan is None or plan.topology.device != "cuda":
        return False
    try:
        config = _compose_text(text, out, *slurm_overrides(plan.topology.ranks_per_node))
        node = cluster_for("slurm").device(config.cluster)
        config = facts.resolve(config, lambda: node)
        make_plan(config, facts.gather(config, (), node))
    except LauncherError:
        return False
    return True
