"""The weights of a score pass: a checkpoint's, as a Hugging Face folder in the launcher's cache, or the run's initial weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import xxhash

from launcher.checkpoint import store
from launcher.checkpoint.manifest import MANIFEST
from launcher.errors import SubmitError
from launcher.models import parent_run
from launcher.models.parent_run import ParentCheckpoint
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.security.folders import private_files
from launcher.worker.prepare import copy_parent_weights

_READ_BYTES = 1 << 24


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


def find_weights(run: RunDir, plan: LaunchPlan, step: int | None) -> ScoredWeights:
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
        return ScoredWeights(0, _digest_files(Path(folder)), None, Path(folder))
    checkpoint = store.get_latest(run.checkpoints) if step is None else store.get_at_step(run.checkpoints, step)
    digest = xxhash.xxh3_128_hexdigest((checkpoint.path / MANIFEST).read_bytes())
    return ScoredWeights(checkpoint.step, digest, ParentCheckpoint(run, plan, checkpoint), None)


def _digest_files(folder: Path) -> str:
    """Return the digest of a Hugging Face folder's weight files and config.json."""
    digest = xxhash.xxh3_128()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    return digest.hexdigest()
