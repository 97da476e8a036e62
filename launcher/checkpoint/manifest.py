"""The files of a checkpoint that say what it is: manifest.json and state.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from launcher.checkpoint import durable
from launcher.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from launcher.plan.launch_plan import Record

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PROBE = "probe.safetensors"

FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Manifest(Record):
    """What commits a checkpoint. `files` names every file of the directory but the manifest itself.

    `eval_loss` is the held-out loss at that very step, where it was evaluated.
    """

    format_version: int = FORMAT_VERSION
    step: Annotated[int, Field(ge=0)]
    world_size: Annotated[int, Field(ge=1)]
    plan_digest: str
    attempt: Annotated[int, Field(ge=0)]
    eval_loss: float | None = None
    files: dict[FileName, durable.FileEntry]

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"


class State(Record):
    """state.json: `parameters` maps each name to its full shape; `extra` is the training loop's own."""

    parameters: dict[str, tuple[int, ...]]
    optimizer_step: int
    loss_scaler: dict[str, float]
    engine: dict[str, int]
    extra: dict[str, Any]

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=2) + "\n"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint directory.

    Raises:
        DamagedCheckpoint: when it is missing or damaged.
        UnreadableCheckpoint: when storage does not give it out now.
        CheckpointError: when it is of another format.
    """
    file = path / MANIFEST
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except FileNotFoundError as error:
        raise DamagedCheckpoint("a checkpoint has no readable manifest", where=str(file), value=str(error.strerror)) from error
    except OSError as error:
        raise unreadable(file, error) from error
    except ValidationError as error:
        raise DamagedCheckpoint("a checkpoint's manifest is damaged", where=str(file), value=_first_error(error)) from error
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(
            "this checkpoint has a format that this launcher does not read",
            where=str(file),
            value=f"format {manifest.format_version}; readable: {FORMAT_VERSION}",
            remedy="use the launcher that wrote it",
        )
    return manifest


def read_state(path: Path) -> State:
    """The state.json of a checkpoint directory; CheckpointError when it is missing or damaged."""
    file = path / STATE
    try:
        return State.model_validate(json.loads(file.read_bytes()))
    except (OSError, ValueError) as error:
        text = _first_error(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError("a checkpoint's state cannot be read", where=str(file), value=text) from error


def unreadable(file: Path, error: OSError) -> UnreadableCheckpoint:
    """Of a file that may be whole: a storage server that is down gives EIO or ESTALE, wrong rights give EACCES."""
    remedy = "try again; where it stays so, look at the storage and at who owns the file, or resume RUN --step an earlier one"
    what = "a checkpoint file cannot be read now"
    return UnreadableCheckpoint(what, where=str(file), value=error.strerror or str(error), remedy=remedy)


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
