"""The weights that an evaluation compares: the run's initial weights and the step's weights.

`python -m launcher.worker.evaluation.weights PLAN_JSON STEP` exports a step for a later evaluation, because the run may remove
its checkpoint first. Does nothing if the export exists, or if a command is evaluating the step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from launcher import json_records, locks, run_store
from launcher.errors import ConfigError, LauncherError
from launcher.evaluate.task import EvaluatedExport, EvaluationFolder, Weights, digest_weights, read_exported
from launcher.models.weight_files import weight_files
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.run_records import read_export
from launcher.security.folders import private_files
from launcher.tracking.verdicts import digest_checkpoint
from launcher.worker.export import export_run
from launcher.worker.ranks.rank_env import die_with_parent
from launcher.worker.signals import exit_on_termination


def find_base(plan: LaunchPlan) -> Weights | None:
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


def export_tuned(plan: LaunchPlan, run: RunDir, folder: EvaluationFolder, step: int) -> Weights:
    """Return the step's exported weights: the run's own export, or one created now in the evaluation's folder if the
    run's is of another step."""
    record, digest = read_export(run), None
    path = run.export
    if record is None or record.step != step:
        path = folder.weights
        digest = _export(plan, run, folder, step)
    turn_ends = plan.data.turn_end_ids if plan.data is not None else ()
    return Weights.of(path, turn_ends, digest)


def _export(plan: LaunchPlan, run: RunDir, folder: EvaluationFolder, step: int) -> str:
    """Export the step unless the folder already has it; returns the digest of the weights."""
    checkpoint, dtype = digest_checkpoint(run, step), plan.config.model.dtype
    existing = read_exported(folder, checkpoint)
    if existing is not None and existing.dtype == dtype:
        return existing.digest
    folder.weights_record.unlink(missing_ok=True)
    with private_files():
        export_run(run.plan, step=step, dtype=dtype, out=folder.weights, check=False)
    digest = digest_weights(folder.weights)
    json_records.write(folder.weights_record, EvaluatedExport(checkpoint, dtype, digest))
    return digest


def count_context(plan: LaunchPlan) -> int:
    """Return the model's maximum number of tokens."""
    config = plan.model.config
    values = (config.get("text_config") or {}, config)
    lengths = [part[key] for part in values for key in ("max_position_embeddings", "n_positions") if part.get(key)]
    return int(lengths[0]) if lengths else plan.config.data.max_length


def main(plan_path: str, step: int) -> int:
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    run = RunDir(Path(plan_path).absolute().parent)
    folder = EvaluationFolder.of(run.root, step)
    try:
        with private_files():
            folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locks.hold(folder.lock, 0.0, f"export of step {step}", mode=0o600):
                export_tuned(run_store.load_plan(run), run, folder, step)
    except locks.LockTimeout:
        print(f"step {step} is evaluated by another command, which exports it", flush=True)
    except LauncherError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    exit_on_termination()
    die_with_parent(signal.SIGTERM)
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
