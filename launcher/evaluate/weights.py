"""The weights that are judged: a step's and the run's initial ones, exported for answers, or as a score pass loads them.

`python -m launcher.evaluate.weights PLAN_JSON STEP` exports a step for a later evaluation, because the run may remove
its checkpoint first. Does nothing if the export exists, or if a command is evaluating the step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST
from launcher.child_process import run_process
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError, LauncherError, SubmitError
from launcher.evaluate.evaluation_folder import EvaluatedExport, EvaluationFolder, Weights, digest_weights, read_exported
from launcher.model_folders import copy_parent_weights, export_run
from launcher.models import parent_run
from launcher.models.parent_run import ParentCheckpoint
from launcher.models.weight_files import weight_files
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, locks, run_store
from launcher.runs.run_records import read_export
from launcher.security.folders import private_files
from launcher.tracking.verdicts import digest_checkpoint


def find_base_weights(plan: LaunchPlan) -> Weights | None:
    """Return the model that the run started from, or None if its weights were random."""
    if plan.config.model.init != "pretrained" or plan.model.path is None:
        return None
    path = Path(plan.model.path)
    if not plan.model.has_weights or not path.is_dir() or not weight_files(path, plan.config.model.allow_pickled_weights):
        raise ConfigError(
            "the weights that the run began with no longer exist, so nothing can be compared with them",
            where=str(path),
            remedy="fetch them again with: python -m launcher data and the run's settings",
        )
    return Weights.of(path)


def export_tuned_weights(plan: LaunchPlan, run: RunDir, folder: EvaluationFolder, step: int) -> Weights:
    """Return the step's weights: the run's own export, or if that is of another step, an export in the evaluation's folder."""
    turn_ends = plan.data.turn_end_ids if plan.data is not None else ()
    if (record := read_export(run)) is not None and record.step == step:
        return Weights.of(run.export, turn_ends)
    checkpoint, dtype = digest_checkpoint(run, step), plan.config.model.dtype
    exported = read_exported(folder, checkpoint)
    if exported is None or exported.dtype != dtype:
        folder.weights_record.unlink(missing_ok=True)
        with private_files():
            export_run(run.plan, step=step, dtype=dtype, out=folder.weights, check=False)
        exported = EvaluatedExport(checkpoint, dtype, digest_weights(folder.weights))
        json_records.write(folder.weights_record, exported)
    return Weights.of(folder.weights, turn_ends, exported.digest)


def choose_dtype(config: RunConfig, device: str) -> str:
    """Return the dtype of the weights for answering on a device."""
    return config.model.dtype if device == "cuda" and config.model.dtype != "auto" else "bf16" if device == "cuda" else "fp32"


def count_context(plan: LaunchPlan) -> int:
    """Return the model's maximum number of tokens."""
    config = plan.model.config
    values = (config.get("text_config") or {}, config)
    lengths = [part[key] for part in values for key in ("max_position_embeddings", "n_positions") if part.get(key)]
    return int(lengths[0]) if lengths else plan.config.data.max_length


@dataclass(frozen=True)
class ScoredWeights:
    """Weights after `step` steps (0: initial weights). `digest` is that of the checkpoint's manifest or of the weight files."""

    step: int
    digest: str
    _parent: ParentCheckpoint | None
    _folder: Path | None

    def make_folder(self, plan: LaunchPlan) -> Path:
        """Return the Hugging Face folder of the weights in the run's dtype; writes it if it does not exist."""
        if self._parent is None:
            assert self._folder is not None
            return self._folder
        with private_files():
            copy_parent_weights(self._parent, plan.config.model)
        return parent_run.weights_folder(self._parent, plan.config.model.dtype)


def find_scored_weights(run: RunDir, plan: LaunchPlan, step: int | None) -> ScoredWeights:
    """Find a run's weights after `step` steps, by default those in its newest checkpoint.

    Raises:
        CheckpointError: if there is no such checkpoint; lists the existing steps.
        SubmitError: for step 0 of a run whose initial weights are random.
    """
    if step == 0:
        folder = plan.model.path
        if folder is None or plan.config.model.init != "pretrained" or not plan.model.has_weights:
            remedy = "name the step of a checkpoint with --step"
            raise SubmitError("the run began with random weights, which are not kept", where=str(run.root), remedy=remedy)
        if not Path(folder).is_dir():
            remedy = "fetch them again with: python -m launcher data and the run's settings"
            raise SubmitError("the weights that the run began with no longer exist", where=folder, remedy=remedy)
        root = Path(folder)
        digest = f"{digest_weights(root)}-{atomic_files.digest_file(root / 'config.json').xxh3_128}"
        return ScoredWeights(0, digest, None, root)
    checkpoint = store.get_latest(run.checkpoints) if step is None else store.get_at_step(run.checkpoints, step)
    digest = xxhash.xxh3_128_hexdigest((checkpoint.path / MANIFEST).read_bytes())
    return ScoredWeights(checkpoint.step, digest, ParentCheckpoint(run, plan, checkpoint), None)


def main(argv: Sequence[str]) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run, step = RunDir(Path(argv[0]).absolute().parent), int(argv[1])
    folder = EvaluationFolder.of(run.root, step)
    try:
        with private_files():
            folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locks.hold(folder.lock, 0.0, f"export of step {step}", mode=0o600):
                export_tuned_weights(run_store.load_plan(run), run, folder, step)
    except locks.LockTimeout:
        print(f"step {step} is evaluated by another command, which exports it", flush=True)
    except LauncherError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    run_process(main)
