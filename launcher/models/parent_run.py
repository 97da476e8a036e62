"""The parent of a run, whose checkpoint gives its initial weights: `model.path=run:NAME[@STEP]`. Only reads the disk.

`python -m launcher.worker.prepare` writes these weights as a Hugging Face folder before any GPU is allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST, Checkpoint
from launcher.checkpoint.state import read_state
from launcher.config.schema import RunConfig
from launcher.config.sections.model import RUN_PATTERN, RUN_PREFIX
from launcher.data.cache_dir import cache_root
from launcher.errors import CheckpointError, ConfigError, LauncherError, Problem
from launcher.plan.launch_plan import LaunchPlan, Lineage, Origin
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import read_export
from launcher.security import folders
from launcher.shell_commands import launcher_command


@dataclass(frozen=True)
class ParentCheckpoint:
    """A committed checkpoint of the parent run, and the run's plan."""

    run: RunDir
    plan: LaunchPlan
    checkpoint: Checkpoint

    @property
    def path(self) -> str:
        """The value of model.path that names this checkpoint wherever it is read: run:/absolute/path@STEP."""
        return f"{RUN_PREFIX}{self.run.root}@{self.checkpoint.step}"


def resolve_parent(config: RunConfig) -> ParentCheckpoint:
    """Find the checkpoint that `model.path` names, or the newest one. Raises ConfigError, also for the run to be started."""
    root = Path(config.run.root).expanduser()
    parent = find_parent(config.model.path or "", root)
    if config.run.name is not None and (root / config.run.name).resolve() == parent.run.root:
        raise _make_error(
            "a run cannot start from its own weights",
            config.model.path or "",
            f"continue it with: {launcher_command('resume', parent.run.root)}, or choose another run.name",
        )
    return parent


def find_parent(path: str, root: Path = Path("runs")) -> ParentCheckpoint:
    """Find the checkpoint of `run:NAME[@STEP]`; a NAME is searched for under `root`. Raises ConfigError with those that exist."""
    match = RUN_PATTERN.fullmatch(path)
    if match is None:
        raise _make_error("is not a run", path, "write run:NAME or run:NAME@STEP")
    try:
        run = run_store.find_run(match["run"], root)
        folders.require_run(run.root)
        plan = run_store.load_plan(run)
    except LauncherError as error:
        raise _make_error(error.problems[0].message, path, error.problems[0].remedy or "choose another run") from error
    try:
        step = match["step"]
        checkpoint = store.get_latest(run.checkpoints) if step is None else store.get_at_step(run.checkpoints, int(step))
    except CheckpointError as error:
        (problem,) = error.problems
        value = f": {problem.value}" if problem.value else ""
        remedy = problem.remedy or f"continue the run until it saves one: {launcher_command('resume', run.root)}"
        raise _make_error(f"run {run.root.name}: {problem.message}{value}", path, remedy) from error
    return ParentCheckpoint(run, plan, checkpoint)


def weights_folder(parent: ParentCheckpoint, dtype: str) -> Path:
    """Return the folder in the launcher's cache for the parent's weights in `dtype`; it need not exist yet."""
    import xxhash

    # The manifest holds the digest of every file. A deleted run that was created again has another W&B id.
    content = parent.plan.wandb_id.encode() + (parent.checkpoint.path / MANIFEST).read_bytes()
    name = f"{parent.run.root.name}-{store.step_name(parent.checkpoint.step)}-{dtype}-{xxhash.xxh3_64_hexdigest(content)}"
    return cache_root() / "models" / name


def find_export(parent: ParentCheckpoint, dtype: str) -> Path | None:
    """Return the parent run's export if it is of this checkpoint, in `dtype` or fp32."""
    record = read_export(parent.run)
    if record is None:
        return None
    is_same = (record.step, record.plan_digest) == (parent.checkpoint.step, parent.checkpoint.manifest.plan_digest)
    return parent.run.export if is_same and record.dtype in (dtype, "fp32") else None


def count_params(parent: ParentCheckpoint) -> int:
    """Count the elements of all parameters of the checkpoint; tied parameters count once."""
    return sum(math.prod(shape) for shape in read_state(parent.checkpoint.path).parameters.values())


def build_lineage(parent: ParentCheckpoint) -> Lineage:
    """Build the record of `parent`, and of the runs before it, for the plan of a run that starts from it."""
    grandparent = parent.plan.lineage
    return Lineage(
        run_name=parent.plan.run_name,
        run_dir=str(parent.run.root),
        step=parent.checkpoint.step,
        plan_digest=parent.checkpoint.manifest.plan_digest,
        wandb_id=parent.plan.wandb_id,
        ancestors=()
        if grandparent is None
        else (Origin(**grandparent.model_dump(exclude={"ancestors"})), *grandparent.ancestors),
    )


def _make_error(message: str, path: str, remedy: str) -> ConfigError:
    return ConfigError(Problem(f"model.path: {message}", where="model.path", value=path, remedy=remedy))
