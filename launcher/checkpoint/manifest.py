"""manifest.json, whose presence commits a checkpoint. Every command that shows runs reads it, so the module loads fast."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import CheckpointError, DamagedCheckpoint, DamagedRun, UnreadableCheckpoint
from launcher.runs import atomic_files, json_records

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
REFERENCE_LOGITS = "probe.safetensors"
# Not listed in the manifest, whose digest identifies a checkpoint: a committed manifest never changes.
LATER_EVALUATION = "evaluation.json"
# The set whose loss a manifest holds if it names no set.
HELD_OUT = "held_out"

# Rejects paths that lead out of the directory, whoever wrote the file.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of manifest.json. `files` names every file of the directory except the manifest itself.

    `eval_loss` is the loss of the evaluation set `eval_set` in nats at exactly this step, None if it was not evaluated.
    """

    format_version: int = FORMAT_VERSION
    step: int
    world_size: int
    plan_digest: str
    attempt: int
    eval_loss: float | None = None
    eval_set: str = HELD_OUT
    files: dict[str, atomic_files.FileEntry]

    def __post_init__(self) -> None:
        for name in self.files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"files: {name!r} is not the name of a file")

    def to_json(self) -> str:
        values = asdict(self)
        if self.eval_loss is not None and not math.isfinite(self.eval_loss):
            # JSON cannot represent it.
            values["eval_loss"] = None
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def from_json(cls, content: bytes) -> Manifest:
        """Parse what `to_json` wrote.

        Raises:
            ValueError: if the content is anything else; says which field is wrong.
        """
        try:
            return json_records.loads(cls, content, MANIFEST)
        except DamagedRun as error:
            problem = error.problems[0]
            raise ValueError(f"{problem.message} ({problem.where})") from None


def describe_loss(loss: float | None, eval_set: str) -> str:
    """Return a checkpoint's evaluation loss, with its set unless that is the held-out rows; `-` if there is no loss."""
    if loss is None:
        return "-"
    return f"{loss:.4f}" if eval_set == HELD_OUT else f"{loss:.4f} ({eval_set})"


@dataclass(frozen=True)
class LaterEvaluation:
    """Content of evaluation.json: the loss of a set at the checkpoint's step, if it was computed after the commit.

    `eval_rows` is the digest of the set's rows.
    """

    eval_set: str
    eval_loss: float
    eval_rows: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    manifest: Manifest
    later_evaluation: LaterEvaluation | None = None

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def eval_set(self) -> str:
        return (self.later_evaluation or self.manifest).eval_set

    @property
    def eval_loss(self) -> float | None:
        """The loss of `eval_set` at the checkpoint's step; None if it was not evaluated."""
        return (self.later_evaluation or self.manifest).eval_loss


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint directory.

    Raises:
        DamagedCheckpoint: if it is missing or damaged.
        UnreadableCheckpoint: if storage cannot read it right now.
        CheckpointError: if it has a different format version.
    """
    file = path / MANIFEST
    try:
        manifest = Manifest.from_json(json_records.read_bytes(file))
    except FileNotFoundError as error:
        raise DamagedCheckpoint("a checkpoint has no readable manifest", where=str(file), value=str(error.strerror)) from error
    except OSError as error:
        raise unreadable_error(file, error) from error
    except ValueError as error:
        raise DamagedCheckpoint("a checkpoint's manifest is damaged", where=str(file), value=str(error)) from error
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(
            "this launcher cannot read the format of this checkpoint",
            where=str(file),
            value=f"format {manifest.format_version}; readable: {FORMAT_VERSION}",
            remedy="use the launcher that wrote it",
        )
    return manifest


def read_later_evaluation(path: Path) -> LaterEvaluation | None:
    """Read the evaluation.json of a checkpoint directory, or None if there is none, or it is damaged.

    Raises:
        UnreadableCheckpoint: if storage cannot read it right now.
    """
    file = path / LATER_EVALUATION
    try:
        content = json_records.read_bytes(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable_error(file, error) from error
    return parse_later_evaluation(content)


def parse_later_evaluation(content: bytes) -> LaterEvaluation | None:
    """Parse the content of an evaluation.json, or None if it is damaged."""
    try:
        return json_records.loads(LaterEvaluation, content, LATER_EVALUATION)
    except DamagedRun:
        return None


def record_evaluation(path: Path, evaluation: LaterEvaluation) -> bool:
    """Record the loss of a committed checkpoint that was saved without one; return False if its manifest has a loss.

    Raises:
        CheckpointError: if the manifest cannot be read.
        OSError: if the loss cannot be written.
    """
    manifest = read_manifest(path)
    if manifest.eval_loss is not None and manifest.eval_set == evaluation.eval_set:
        return False
    atomic_files.write_text(path / LATER_EVALUATION, evaluation.to_json())
    return True


def unreadable_error(file: Path, error: OSError) -> UnreadableCheckpoint:
    """Build the error for a file that may be intact: a storage server that is down gives EIO or ESTALE, permissions EACCES."""
    return UnreadableCheckpoint(
        "a checkpoint file cannot be read right now",
        where=str(file),
        value=error.strerror or str(error),
        remedy="try again; if it persists, check the storage and the file's owner, or resume from an earlier step with --step",
    )
