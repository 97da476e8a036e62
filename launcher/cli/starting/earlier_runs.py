"""What the runs under run.root tell a plan: how fast this model trained, and whether the name is taken."""

from __future__ import annotations

import math
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli import formatting
from launcher.config.schema import RunConfig
from launcher.errors import LauncherError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import run_dir_of
from launcher.plan.run_dir import RunDir
from launcher.plan.throughput import MeasuredMfu, peak_tflops
from launcher.security import owners
from launcher.shell_commands import launcher_command
from launcher.tracking.metrics_tail import read_tail

# The number of newest runs to read for an MFU, and the fewest steps, after the first, that count as a measurement.
_NUM_RUNS, _FEWEST_STEPS = 50, 5
# A run's metrics do not name its GPU, but contain the peak FLOP/s with which they were computed.
_SAME_PEAK = 0.005
_ARCHITECTURE = (
    *("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"),
    *("intermediate_size", "vocab_size", "tie_word_embeddings"),
)


def find_measured_mfu(plan: LaunchPlan, gpu: str) -> MeasuredMfu | None:
    """Return the MFU of the newest run beside this one with the same model, dtype, offload and peak FLOP/s, or None."""
    peak = peak_tflops(plan, gpu)
    if plan.topology.device != "cuda" or peak is None:
        return None
    wanted = _training_settings(plan.model_dump(mode="json", include={"model", "config"}))
    for run in islice(filter(_is_trusted, run_store.list_runs(Path(plan.run_dir).parent)), _NUM_RUNS):
        try:
            values = run_store.read_plan_values(run.plan)
            if _training_settings(values) != wanted:
                continue
            num_ranks, name = int(values["topology"]["world_size"]), str(values["run_name"])
            steps = [step for step in read_tail(run.metrics).recent if step["trainer/step"] > 1]
            measured = [(mfu, step["perf/tflops_per_gpu"] / mfu) for step in steps if (mfu := step.get("perf/mfu"))]
            rates = [mfu for mfu, own_peak in measured if math.isclose(own_peak, peak, rel_tol=_SAME_PEAK)]
        except (LauncherError, OSError, KeyError, TypeError, ValueError):
            continue
        if len(rates) >= _FEWEST_STEPS:
            return MeasuredMfu(name, num_ranks, min(rates), max(rates))
    return None


def _is_trusted(run: RunDir) -> bool:
    """Return whether a run belongs to this or a trusted user: other users' files may be endless and their numbers misleading."""
    with suppress(OSError):
        return owners.accepts_owner(run.root.stat().st_uid)
    return False


def _training_settings(values: dict[str, Any]) -> list[Any]:
    """Return the values in a plan's JSON that determine the MFU."""
    model, config = values["model"], values["config"]
    deepspeed = [config["deepspeed"][key] for key in ("offload_optimizer", "offload_params")]
    layers = config["model"]["activation_checkpointing"]
    settings = [config["model"]["dtype"], {True: "all", False: "none"}.get(layers, layers)]
    return [model["config"].get("model_type"), *(model[key] for key in _ARCHITECTURE), *settings, *deepspeed]


def name_warning(config: RunConfig) -> str | None:
    """Describe the run with this run.name, which `train` would refuse to replace, or return None if the name is free."""
    if config.run.name is None:
        return None
    run = RunDir(run_dir_of(config, config.run.name, str(Path.cwd()), str(Path.home())))
    if not run.root.exists():
        return None
    remedy = f"look at it with {launcher_command('status', formatting.short(run.root))}, or choose another run.name"
    return f"train will be refused: the run {config.run.name} exists already; {remedy}"
