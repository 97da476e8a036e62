"""The verb init: write a starter file that fits the data, the model and the machine, and say what to run next."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher import facts, model_source
from launcher.cli.arguments import COMMON_FLAGS, VerbParser
from launcher.cli.starter_file import starter_text
from launcher.cli.worker_process import run_worker_module
from launcher.clusters.backends import BACKENDS, cluster_for
from launcher.config.command_line import override_key
from launcher.config.compose import Composed, conf_dir, run_hydra
from launcher.config.error_messages import no_such_option
from launcher.config.introspect import settings
from launcher.config.run_file.printing import values_to_print
from launcher.config.schema import RunConfig, is_local_path, is_run
from launcher.config.sections.fields import HUB_ID_PATTERN
from launcher.errors import ConfigError, DataError, LauncherError, Problem, RunError
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DeviceFacts, Facts
from launcher.plan.planner import choose_topology, device_gib
from launcher.plan.planner import plan as make_plan
from launcher.plan.suggested_settings import DataSample, Machine, Suggestion, needs_offload, suggest
from launcher.shell_commands import launcher_command

_OFFLOAD = "zero3_offload"
# Longer than a look at the largest data takes: all rows are counted.
_LOOK_TIMEOUT_S = 3600.0
_ASSUMED_SIZE = "the size of the model is not known: it is taken for one of 8 billion parameters"
_ASSUMED_PARAMS = 8_000_000_000
_SIZE_IN_NAME = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)\s*([bBmM])(?![a-zA-Z])")


@dataclass(frozen=True)
class _Look:
    """What was found: the settings to write, the facts behind them, and what had to be assumed."""

    config: RunConfig
    reasons: dict[str, str]
    head: list[str]
    assumptions: list[str]
    is_cluster_chosen: bool


def run(verb: str, tokens: list[str]) -> int:
    """Write the file, or refuse with what is in the way; nothing is overwritten."""
    arguments, rest = _parser().parse_known_args(tokens)
    out = Path(arguments.out or f"{_name_of(arguments.data)}.yaml")
    _require_free(out)
    composed = _compose(arguments.model, arguments.data, rest)
    with composed.located():
        look = _look(composed, arguments.data)
    values = _values(look, composed)
    text = starter_text(look.head, values, look.reasons)
    _require_plan(text, out)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _require_free(out)
        raise
    print("\n".join(_next_lines(out, look)))
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


def _name_of(data: str | None) -> str:
    last = (data or "run").rstrip("/").rpartition("/")[2]
    while Path(last).suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz", ".zst"):
        last = Path(last).stem
    return re.sub(r"[^\w.-]+", "-", last).strip(".-") or "run"


def _require_free(out: Path) -> None:
    """Refuse to overwrite a file, or to write into a folder that does not exist.

    Raises:
        ConfigError: with a name that is free.
    """
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
    jobs: list[Composed] = []
    run_hydra([*tokens, *rest], jobs.append, ("--data", "--model", "--out", *COMMON_FLAGS))
    if len(jobs) != 1:
        remedy = "leave out -m and Hydra's own flags"
        raise ConfigError("init writes the settings of one run", where="command line", value=" ".join(rest), remedy=remedy)
    return jobs[0]


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
    escaped = value.replace('"', '\\"')
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
    found = run_worker_module("launcher.worker.data_sample", config, timeout_s=_LOOK_TIMEOUT_S)
    if "problems" in found:
        kind = DataError if found["exit_code"] == DataError.exit_code else RunError
        raise kind([Problem(*parts) for parts in found["problems"]])
    changes: dict[str, Any] = {}
    assumptions = [f"{found['note']}: the length of documents is estimated from characters"] if not found["is_measured"] else []
    if found["config"] is not None and config.model.config is None:
        changes["model.config"] = found["config"]
        config = _changed(config, changes)
    num_params, max_positions, gathered, assumed = _model_size(config, composed.overrides, node)
    assumptions += [assumed] if assumed else []
    sample = DataSample(
        num_documents=sum(source["num_rows"] for source in found["sources"]),
        mean_tokens=found["mean"],
        p99_tokens=found["p99"],
        longest_tokens=found["longest"],
        is_measured=found["is_measured"],
    )
    topology = choose_topology(config, gathered)
    machine = Machine(topology.world_size, topology.device, device_gib(config, gathered))
    chosen = _chosen(composed)
    suggestions = suggest(num_params, max_positions, sample, machine, chosen) if data else _of_demo(config)
    changes |= {one.key: one.value for one in suggestions}
    config = _changed(config, changes)
    config, offload = _offloaded(config, gathered, machine, composed.overrides)
    # The file may be used on a machine for which `auto` means another type.
    config = _changed(config, {"model.dtype": composed.config.model.dtype})
    reasons = {one.key: one.reason for one in (*suggestions, *offload)}
    reasons["model"] = "a preset (listed by plan --help), or `path:` with a folder or a Hub id below `model:`"
    is_cluster_chosen = any(override_key(token) == "cluster" for token in composed.overrides)
    reasons["cluster"] = _about_machine(machine, node, config)
    return _Look(config, reasons, _head(found, data), assumptions, is_cluster_chosen)


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


def _about_machine(machine: Machine, node: DeviceFacts, config: RunConfig) -> str:
    kind = config.cluster.gpu_type or node.name
    ranks = f"{machine.world_size} rank{'s' * (machine.world_size > 1)} on {kind}"
    return f"{ranks}. The others are {', '.join(BACKENDS)}; nodes and what a site needs are keys of this section"


def _head(found: dict[str, Any], data: str | None) -> list[str]:
    lines = ["Settings of a run: docs/run-file.md. Every key is in docs/settings.md."]
    for source in found["sources"]:
        lines.append(f"{data or source['path']}: {source['num_rows']:,} rows of the format {source['format']}.")
    counted = "tokens" if found["is_measured"] else "tokens (estimated)"
    lines.append(
        f"Of {found['num_sampled']:,} documents, half have up to {found['p50']:,} {counted}, 90 of 100 up to {found['p90']:,}, "
        f"99 of 100 up to {found['p99']:,}; the longest has {found['longest']:,}."
    )
    return lines


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


def _require_plan(text: str, out: Path) -> None:
    """Refuse what `plan` would refuse: before the file is written.

    Raises:
        LauncherError: with the problems.
    """
    composed: list[Composed] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / out.name
        file.write_text(text, encoding="utf-8")
        run_hydra([str(file)], composed.append)
    config = composed[0].config
    node = cluster_for(config.cluster.kind).device(config.cluster)
    config = facts.resolve(config, lambda: node)
    if not model_source.is_config_known(config.model):
        return
    try:
        make_plan(config, facts.gather(config, (), node))
    except LauncherError as error:
        raise type(error)(
            replace(problem, remedy=f"{problem.remedy}; or add overrides to init, such as cluster.nodes=2")
            for problem in error.problems
        ) from error


def _next_lines(out: Path, look: _Look) -> list[str]:
    lines = [f"wrote {out}", *(f"assumed: {assumption}" for assumption in look.assumptions), "next:"]
    commands = [("data", str(out), "--show", "3"), ("plan", str(out)), ("train", str(out))]
    if not look.is_cluster_chosen:
        commands.append(("train", str(out), "+cluster=slurm", "cluster.nodes=2"))
    return [*lines, *(f"  {launcher_command(*words)}" for words in commands)]
