"""The layout of checkpoints on disk: begin, commit, list, verify, prune. Needs no torch, so that login nodes can use it.

    checkpoints/step-00000100/
      manifest.json          step, world size, plan digest, and the size and digest of every other file
      state.json             shapes, optimizer step, counters, and what the training loop adds
      rank-00000.safetensors one per rank
      probe.safetensors      a few tokens and the trained model's logits for them (optional)

A save fills `.saving-step-00000100-001` (the last number is the attempt), writes the manifest last and renames the
directory into place. What has no valid manifest, or files that differ from it in size, does not exist.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationError

from launcher.checkpoint import durable
from launcher.errors import CheckpointError, Problem
from launcher.plan.launch_plan import Record

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PROBE = "probe.safetensors"

_STEP = re.compile(r"step-(\d{8,})")
_SAVING = re.compile(r"\.saving-step-\d{8,}-(\d{3,})")

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


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def saving_path(root: Path, step: int, attempt: int) -> Path:
    """Where a save is written before it is committed; the same on every rank."""
    return root / f".saving-{step_name(step)}-{attempt:03d}"


def partition(num_elements: int, world_size: int, rank: int) -> tuple[int, int]:
    """The elements [start, stop) of a flattened parameter that lie on `rank`, without padding.

    ZeRO-3 gives each rank ceil(n / world size) elements (deepspeed partition_parameters.py, `_aligned_size`).
    """
    per_rank = -(-num_elements // world_size)
    return min(rank * per_rank, num_elements), min((rank + 1) * per_rank, num_elements)


def require_free_bytes(root: Path, needed: int) -> None:
    """CheckpointError when the file system of `root` has less than `needed` bytes for this user."""
    available = shutil.disk_usage(root).free
    if available < needed:
        raise CheckpointError(
            "there is not enough free disk space for a checkpoint",
            where=str(root),
            value=f"needed {needed:,} bytes, available {available:,} bytes",
            remedy="free space on this disk, lower train.keep_last, or put run.root on a larger disk",
        )


def begin(root: Path, *, step: int, attempt: int, needed_bytes: int) -> Path:
    """Sweep what unfinished saves left behind, check the free space, and make the directory of a save (mode 0700)."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    _sweep(root, attempt)
    require_free_bytes(root, needed_bytes)
    saving = saving_path(root, step, attempt)
    saving.mkdir(mode=0o700)
    return saving


def commit(saving: Path, manifest: Manifest) -> Path:
    """Write the manifest, move `saving` into place and return the checkpoint's path.

    Every file that the manifest names must be written and fsynced. A committed checkpoint of the same step is found by
    `list_checkpoints` until the new one has taken its name.
    """
    partial = saving / f".{MANIFEST}.partial"
    durable.write_file(partial, [manifest.to_json().encode()])
    os.replace(partial, saving / MANIFEST)
    durable.fsync_directory(saving)
    durable.passing("manifest")
    target = saving.parent / step_name(manifest.step)
    if target.exists() and durable.aside_of(target).exists():
        # The sweep has left a replaced checkpoint here only where the one in its place is damaged.
        durable.remove_directory(target)
    durable.replace_directory(saving, target)
    return target


def read_manifest(path: Path) -> Manifest:
    """The manifest of a checkpoint directory; CheckpointError when it is missing, damaged or of another format."""
    file = path / MANIFEST
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
    except OSError as error:
        raise CheckpointError("a checkpoint has no readable manifest", where=str(file), value=str(error.strerror)) from error
    except ValidationError as error:
        raise CheckpointError("a checkpoint's manifest is damaged", where=str(file), value=_first_error(error)) from error
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


def open_checkpoint(path: Path) -> Checkpoint:
    """The committed checkpoint at `path`; CheckpointError names the first thing that is wrong with it. Reads no shard."""
    manifest = read_manifest(path)
    name = path.name.removeprefix(durable.REPLACED)
    if name != step_name(manifest.step):
        raise CheckpointError("a manifest belongs to another step", where=str(path), value=f"step {manifest.step}")
    if problems := [p for name, entry in manifest.files.items() if (p := _size_problem(path / name, entry))]:
        raise CheckpointError(problems)
    return Checkpoint(path, manifest)


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """The committed checkpoints under `root`, by ascending step."""
    found: dict[int, Checkpoint] = {}
    for path in sorted(_step_directories(root)):  # a replaced directory sorts before the one that took its name
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError:
            continue
        found[checkpoint.step] = checkpoint
    return [found[step] for step in sorted(found)]


def newest_step(root: Path) -> int | None:
    """The step of the newest committed checkpoint, or None."""
    return max((checkpoint.step for checkpoint in list_checkpoints(root)), default=None)


def latest(root: Path) -> Checkpoint:
    """The committed checkpoint with the highest step; CheckpointError says what is there when there is none."""
    if committed := list_checkpoints(root):
        return committed[-1]
    raise _none_usable("there is no committed checkpoint", root)


def at_step(root: Path, step: int) -> Checkpoint:
    """The committed checkpoint of one step; CheckpointError names the steps that there are."""
    committed = list_checkpoints(root)
    for checkpoint in committed:
        if checkpoint.step == step:
            return checkpoint
    if not committed:
        raise _none_usable(f"there is no committed checkpoint of step {step}", root)
    steps = ", ".join(str(c.step) for c in committed)
    raise CheckpointError(f"there is no committed checkpoint of step {step}", where=str(root), remedy=f"choose one of: {steps}")


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, so that going back to it cannot end in one of them; returns where they lie."""
    aside = []
    for checkpoint in list_checkpoints(root):
        if checkpoint.step > step:
            target = root / f"aside-{checkpoint.path.name}"
            durable.replace_directory(checkpoint.path, target)
            aside.append(target)
    return aside


def verify(path: Path) -> list[Problem]:
    """Every difference between a checkpoint directory and its manifest, digests included; empty when it is whole."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return list(error.problems)
    return verify_files(path, manifest, manifest.files)


def verify_files(path: Path, manifest: Manifest, names: Iterable[str]) -> list[Problem]:
    """Like `verify`, for some of the files that the manifest names."""
    return list(_file_problems(path, manifest, names))


def foreign_files(path: Path, manifest: Manifest) -> list[Problem]:
    """The files of a checkpoint that belong neither to this user nor to root."""
    trusted = {os.geteuid(), 0}
    return [
        Problem(
            "a checkpoint file belongs to another user",
            where=str(path / name),
            value=f"owner uid {owner}, this user {os.geteuid()}",
            remedy="copy the checkpoint under your own user if you trust its origin",
        )
        for name in (MANIFEST, *manifest.files)
        if (owner := (path / name).stat().st_uid) not in trusted
    ]


def prune(root: Path, keep_last: int, *, keep: Collection[Path] = ()) -> list[Path]:
    """Remove all but the `keep_last` (at least 1) newest committed checkpoints and those in `keep`; returns what is gone."""
    outdated = [c.path for c in list_checkpoints(root)[:-keep_last] if c.path not in keep]
    for path in outdated:
        durable.remove_directory(path)
    return outdated


def _sweep(root: Path, attempt: int) -> None:
    """Remove leftovers of saves, replacements and removals that did not end; a later attempt's save is left alone."""
    for path in list(root.iterdir()):
        saving = _SAVING.fullmatch(path.name)
        replaced = path.name.startswith(durable.REPLACED) and _is_committed(
            path.with_name(path.name.removeprefix(durable.REPLACED))
        )
        if (saving and int(saving.group(1)) <= attempt) or replaced:
            durable.remove_directory(path)
        elif path.name.startswith(durable.REMOVING):
            shutil.rmtree(path, ignore_errors=True)


def _is_committed(path: Path) -> bool:
    try:
        open_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _step_directories(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [p for p in root.iterdir() if _STEP.fullmatch(p.name.removeprefix(durable.REPLACED))]


def _none_usable(what: str, root: Path) -> CheckpointError:
    if not root.is_dir():
        return CheckpointError(what, where=str(root), value="the folder does not exist")
    reasons = []
    for path in sorted(_step_directories(root)):
        try:
            open_checkpoint(path)
        except CheckpointError as error:
            reasons.append(f"{path.name}: {error.problems[0].what}")
    reasons += [f"{p.name}: a save that did not end" for p in sorted(root.iterdir()) if _SAVING.fullmatch(p.name)]
    return CheckpointError(what, where=str(root), value="; ".join(reasons) or "the folder is empty")


def _file_problems(path: Path, manifest: Manifest, names: Iterable[str]) -> Iterator[Problem]:
    for name in names:
        expected = manifest.files[name]
        if problem := _size_problem(path / name, expected):
            yield problem
        elif durable.file_entry(path / name) != expected:
            yield Problem(
                "a checkpoint file is damaged: its digest differs from the manifest's",
                where=str(path / name),
                remedy="resume from another checkpoint, and check the disk",
            )


def _size_problem(file: Path, expected: durable.FileEntry) -> Problem | None:
    try:
        size = file.stat().st_size
    except OSError as error:
        return Problem("a checkpoint file is missing", where=str(file), value=str(error.strerror))
    if size != expected.size:
        sizes = f"{size:,} bytes instead of {expected.size:,}"
        return Problem("a checkpoint file has the wrong size", where=str(file), value=sizes)
    return None


def _first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
