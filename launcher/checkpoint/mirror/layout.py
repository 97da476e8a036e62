"""What a mirror holds of a run, as whoever reads it finds it (launcher.checkpoint.mirror.upload says how it lies there)."""

from __future__ import annotations

import re

from pydantic import Field, ValidationError

from launcher.atomic_files import FileEntry
from launcher.checkpoint.manifest import FORMAT_VERSION, MANIFEST, Manifest
from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.config.fields import Name
from launcher.errors import CheckpointError
from launcher.plan.launch_plan import Record

RUN = "run.json"
CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step-(\d{8,})")


class Owner(Record):
    """Which attempt of which run sends to the mirror, from where."""

    wandb_id: str
    attempt: int
    run_dir: str
    host: str


class MirroredRun(Record):
    """run.json. `files` are those that do not change while an attempt runs, by their names in the mirror."""

    format_version: int = 1
    run_name: Name
    owner: Owner
    files: dict[str, FileEntry] = Field(default_factory=dict)


def read_run(remote: RemoteFolder) -> MirroredRun | None:
    """What run.json says; None where there is none.

    Raises:
        CheckpointError: where it cannot be understood.
    """
    content = remote.read(RUN)
    if content is None:
        return None
    try:
        return MirroredRun.model_validate_json(content)
    except ValidationError as error:
        what = "the mirror's run.json is damaged, or of a launcher that this one does not read"
        raise CheckpointError(what, where=f"{remote.url}/{RUN}", value=str(error).splitlines()[0]) from None


def read_complete_checkpoints(remote: RemoteFolder) -> dict[int, Manifest]:
    """The manifests of the checkpoints that are complete in the mirror of a run, by ascending step."""
    found = {}
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
            found[step] = manifest
    return dict(sorted(found.items()))


def parse_step(name: str) -> int | None:
    """The step of a checkpoint's folder; None for another name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None
