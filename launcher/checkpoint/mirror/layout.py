"""Read the content of a mirror; launcher.checkpoint.mirror.upload describes its layout."""

from __future__ import annotations

from pydantic import Field, ValidationError

from launcher.atomic_files import FileEntry
from launcher.checkpoint.manifest import (
    FORMAT_VERSION,
    LATER_EVALUATION,
    MANIFEST,
    LaterEvaluation,
    Manifest,
    parse_later_evaluation,
)
from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.checkpoint.store import step_name
from launcher.config.sections.fields import Name
from launcher.errors import CheckpointError
from launcher.plan.launch_plan import Record
from launcher.plan.run_dir import parse_step

RUN = "run.json"
CHECKPOINTS = "checkpoints"
CODE = "code.zip"


class Owner(Record):
    """The attempt that writes to the mirror: W&B id of its run, run directory and host."""

    wandb_id: str
    attempt: int
    run_dir: str
    host: str


class MirroredRun(Record):
    """Content of run.json. `files` maps names in the mirror to the files that do not change while an attempt runs."""

    format_version: int = 1
    run_name: Name
    owner: Owner
    files: dict[str, FileEntry] = Field(default_factory=dict)


def read_run(remote: RemoteFolder) -> MirroredRun | None:
    """Read run.json; None if there is none.

    Raises:
        CheckpointError: if it cannot be parsed.
    """
    content = remote.read(RUN)
    if content is None:
        return None
    try:
        return MirroredRun.model_validate_json(content)
    except ValidationError as error:
        message = "the mirror's run.json is damaged, or was written by an incompatible launcher"
        raise CheckpointError(message, where=f"{remote.url}/{RUN}", value=error.errors()[0]["msg"]) from None


def read_complete_checkpoints(remote: RemoteFolder) -> dict[int, Manifest]:
    """Read the manifests of the complete checkpoints in a run's mirror, by ascending step."""
    manifests = {}
    for name in remote.names(CHECKPOINTS):
        step = parse_step(name)
        content = remote.read(f"{CHECKPOINTS}/{name}/{MANIFEST}") if step is not None else None
        if step is None or content is None:
            continue
        try:
            manifest = Manifest.from_json(content)
        except ValueError:
            continue
        if manifest.step == step and manifest.format_version == FORMAT_VERSION:
            manifests[step] = manifest
    return dict(sorted(manifests.items()))


def read_later_evaluation(remote: RemoteFolder, step: int) -> LaterEvaluation | None:
    """Read the loss that was computed after the save of a checkpoint in a run's mirror, or None if there is none."""
    content = remote.read(f"{CHECKPOINTS}/{step_name(step)}/{LATER_EVALUATION}")
    return None if content is None else parse_later_evaluation(content)
