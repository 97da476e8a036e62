"""The weights of another run as the beginning of a run: `model.path=run:NAME[@STEP]`.

Finds the run and its checkpoint, and tells where its weights lie as a Hugging Face folder. Reads disk and changes nothing:
`python -m launcher.worker.prepare` makes that folder, once, before any GPU is asked for.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from launcher import run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST, Checkpoint
from launcher.checkpoint.state import read_state
from launcher.config.schema import RUN_PATTERN, RUN_PREFIX, RunConfig
from launcher.data.cache_dir import cache_root
from launcher.errors import CheckpointError, ConfigError, LauncherError, Problem
from launcher.plan.launch_plan import LaunchPlan, Lineage, Origin
from launcher.plan.run_dir import RunDir

# Written by launcher.export.hf_folder, whose check of a folder needs torch: what an export holds.
_EXPORT_MARKER = "export.json"


@dataclass(frozen=True)
class Source:
    """A committed checkpoint of a run, and the run's plan."""

    run: RunDir
    plan: LaunchPlan
    checkpoint: Checkpoint

    @property
    def path(self) -> str:
        """As model.path, with nothing left open: neither the folder of runs nor the step."""
        return f"{RUN_PREFIX}{self.run.root}@{self.checkpoint.step}"


def settled(config: RunConfig) -> Source:
    """The source that `config` names, with the newest step where it names none.

    Raises:
        ConfigError: where there is no such run or checkpoint, or the run is the one that would be started.
    """
    root = Path(config.run.root).expanduser()
    source = open_source(config.model.path or "", root)
    if config.run.name is not None and (root / config.run.name).resolve() == source.run.root:
        raise _problem(
            "a run cannot begin with its own weights",
            config.model.path or "",
            f"continue it with: python -m launcher resume {source.run.root}, or choose another run.name",
        )
    return source


def open_source(path: str, root: Path = Path("runs")) -> Source:
    """What `run:NAME[@STEP]` names; a NAME is looked for under `root`.

    Raises:
        ConfigError: for model.path, with the runs or the steps that there are.
    """
    match = RUN_PATTERN.fullmatch(path)
    if match is None:
        raise _problem("is not a run", path, "write run:NAME or run:NAME@STEP")
    try:
        run = run_store.find(match["run"], root)
        plan = run_store.load_plan(run)
    except LauncherError as error:
        raise _problem(error.problems[0].what, path, error.problems[0].remedy or "choose another run") from error
    try:
        step = match["step"]
        checkpoint = store.latest(run.checkpoints) if step is None else store.at_step(run.checkpoints, int(step))
    except CheckpointError as error:
        (problem,) = error.problems
        said = f": {problem.value}" if problem.value else ""
        remedy = problem.remedy or f"let the run save one: python -m launcher resume {run.root}"
        raise _problem(f"run {run.root.name}: {problem.what}{said}", path, remedy) from error
    return Source(run, plan, checkpoint)


def folder(source: Source, dtype: str) -> Path:
    """Where the weights in `dtype` lie in the launcher's cache once they are there, by what the checkpoint holds."""
    import xxhash

    # The manifest has the digest of every file; a run that was made again under the same name has another id.
    content = source.plan.wandb_id.encode() + (source.checkpoint.path / MANIFEST).read_bytes()
    name = f"{source.run.root.name}-{store.step_name(source.checkpoint.step)}-{dtype}-{xxhash.xxh3_64_hexdigest(content)}"
    return cache_root() / "models" / name


def exported(source: Source, dtype: str) -> Path | None:
    """The run's own export, where it holds this very checkpoint in a type that loses nothing for weights in `dtype`."""
    try:
        marker = json.loads((source.run.export / _EXPORT_MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    same = (marker.get("step"), marker.get("plan_digest")) == (source.checkpoint.step, source.checkpoint.manifest.plan_digest)
    return source.run.export if same and marker.get("dtype") in (dtype, "fp32") else None


def num_params(source: Source) -> int:
    """Elements of all parameters of the checkpoint; tied ones count once."""
    total = 0
    for shape in read_state(source.checkpoint.path).parameters.values():
        count = 1
        for size in shape:
            count *= size
        total += count
    return total


def lineage(source: Source) -> Lineage:
    """What the plan of a run that begins with `source` records of it."""
    before = source.plan.lineage
    return Lineage(
        run_name=source.plan.run_name,
        run_dir=str(source.run.root),
        step=source.checkpoint.step,
        plan_digest=source.checkpoint.manifest.plan_digest,
        wandb_id=source.plan.wandb_id,
        ancestors=() if before is None else (Origin(**before.model_dump(exclude={"ancestors"})), *before.ancestors),
    )


def _problem(what: str, path: str, remedy: str) -> ConfigError:
    return ConfigError(Problem(f"model.path: {what}", where="model.path", value=path, remedy=remedy))
