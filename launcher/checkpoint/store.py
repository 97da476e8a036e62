"""Checkpoints on disk: begin, commit, list, verify, which are kept, leftovers of saves.

Needs neither torch nor the settings, so that login nodes and commands that show runs can use it.

    checkpoints/step-00000100/
      manifest.json          step, world size, plan digest, and the size and digest of every other file
      state.json             shapes, optimizer step, counters, and what the training loop adds
      rank-00000.safetensors one per rank
      probe.safetensors      a few tokens and the trained model's logits for them, for the parity check of an export (optional)
      evaluation.json        the loss of an evaluation that followed the commit; the manifest does not name it (optional)

A save fills `.saving-step-00000100-001` (the last number is the attempt), writes the manifest last and renames the
directory into place. A directory without a valid manifest, or with file sizes that differ from it, is not a checkpoint.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.checkpoint.manifest import (
    HELD_OUT,
    MANIFEST,
    Checkpoint,
    Manifest,
    read_later_evaluation,
    read_manifest,
    unreadable_error,
)
from launcher.errors import CheckpointError, DamagedCheckpoint, Problem, UnreadableCheckpoint
from launcher.plan.quantities import format_size
from launcher.plan.run_dir import RunDir, parse_step
from launcher.runs import atomic_files, json_records, run_store
from launcher.shell_commands import launcher_command

if TYPE_CHECKING:
    from launcher.config.sections.train import CheckpointSection
    from launcher.plan.launch_plan import LaunchPlan

# Checkpoints that were set aside, after the user resumed from an earlier step or because of damage, are never listed again.
SET_ASIDE_PREFIX = "aside-"
DAMAGED_PREFIX = "damaged-"

# Shown for the directory of a save in progress.
BEING_WRITTEN = "being written"
_DESCRIPTIONS = {
    ".saving-step-": "unfinished save",
    f"{atomic_files.REPLACED_PREFIX}step-": "replaced checkpoint",
    atomic_files.REMOVING_PREFIX: "unfinished removal",
    f"{SET_ASIDE_PREFIX}step-": "set aside when the run went back to an earlier step",
    f"{DAMAGED_PREFIX}step-": "set aside as damaged",
}

_SAVING = re.compile(r"\.saving-step-\d{8,}-(\d{3,})")


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def saving_path(root: Path, step: int, attempt: int) -> Path:
    """Return the directory of a save before it is committed; the same on every rank."""
    return root / f".saving-{step_name(step)}-{attempt:03d}"


def partition(num_elements: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the range [start, stop) of a flattened parameter's elements that are on `rank`, without padding.

    ZeRO-3 gives each rank ceil(n / world size) elements (deepspeed partition_parameters.py, `_aligned_size`).
    """
    per_rank = -(-num_elements // world_size)
    return min(rank * per_rank, num_elements), min((rank + 1) * per_rank, num_elements)


def require_free_bytes(root: Path, needed: int) -> None:
    """Check that the file system of `root` has `needed` bytes for this user.

    Checkpoints that retention will remove do not count: they stay until the next checkpoint is committed.

    Raises:
        CheckpointError: if there is less space.
    """
    available = shutil.disk_usage(root).free
    if available < needed:
        room = f"needed {format_size(needed)}, available {format_size(available)}"
        raise CheckpointError(
            "there is not enough free disk space for a checkpoint",
            where=str(root),
            value=f"{room}; an older one is removed only after the save",
            remedy=f"free {format_size(needed - available)} on this disk ({launcher_command('checkpoints', root.parent)} lists "
            "what this run has here; folders of old checkpoints may be deleted), or put run.root on a larger disk",
        )


def begin_save(root: Path, *, step: int, attempt: int, needed_bytes: int) -> Path:
    """Remove leftovers of saves, replacements and removals, check the free space, and create a save's directory (mode 0700)."""
    # Do not create the run directory itself: if it has been moved, the save fails.
    root.mkdir(mode=0o700, exist_ok=True)
    for path in list(root.iterdir()):
        unfinished = _SAVING.fullmatch(path.name)
        # A save of a later attempt stays.
        is_old_save = unfinished is not None and int(unfinished[1]) <= attempt
        is_replaced = path.name.startswith(atomic_files.REPLACED_PREFIX) and _is_replaced(path)
        if is_old_save or is_replaced or path.name.startswith(atomic_files.REMOVING_PREFIX):
            remove(path)
    require_free_bytes(root, needed_bytes)
    saving = saving_path(root, step, attempt)
    saving.mkdir(mode=0o700)
    return saving


def commit(saving: Path, manifest: Manifest) -> Path:
    """Write the manifest, rename `saving` into place and return the checkpoint's path.

    Every file that the manifest names must be written and fsynced. `list_checkpoints` returns a committed checkpoint of the same
    step until this one has taken its name.
    """
    atomic_files.write_text(saving / MANIFEST, manifest.to_json())
    atomic_files.fault_point("manifest")
    target = saving.parent / step_name(manifest.step)
    if target.exists() and atomic_files.replaced_path(target).exists():
        # `begin_save` leaves a replaced checkpoint only if its successor is damaged.
        atomic_files.remove_directory(target)
    atomic_files.replace_directory(saving, target)
    return target


def open_checkpoint(path: Path) -> Checkpoint:
    """Open the committed checkpoint at `path`: its manifest is read, and the sizes of its files are checked.

    Raises:
        DamagedCheckpoint: if the manifest, a name or a size is wrong.
        UnreadableCheckpoint: if storage cannot be read right now.
        CheckpointError: if this launcher cannot read its format.
    """
    manifest = read_manifest(path)
    if problem := _step_problem(path, manifest):
        raise DamagedCheckpoint(problem)
    if problems := [p for name, entry in manifest.files.items() if (p := _size_problem(path / name, entry))]:
        raise DamagedCheckpoint(problems)
    return Checkpoint(path, manifest, read_later_evaluation(path))


def list_checkpoints(root: Path) -> list[Checkpoint]:
    """List the committed checkpoints under `root`, by ascending step.

    Raises:
        UnreadableCheckpoint: if storage cannot list the directory right now.
    """
    return open_all(root)[0]


def find_unusable(root: Path) -> dict[int, CheckpointError]:
    """Return why checkpoints cannot be opened, keyed by step: damaged, in another format, or unreadable right now."""
    return open_all(root)[1]


def open_all(root: Path) -> tuple[list[Checkpoint], dict[int, CheckpointError]]:
    """Return what `list_checkpoints` and `find_unusable` return."""
    checkpoints: dict[int, Checkpoint] = {}
    errors: dict[int, CheckpointError] = {}
    for path in sorted(_step_directories(root)):  # a replaced directory sorts before the one that took its name
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            step = parse_step(path.name)
            # A running attempt may have pruned it meanwhile.
            if step is not None and (isinstance(error, UnreadableCheckpoint) or path.exists()):
                errors[step] = error
        else:
            checkpoints[checkpoint.step] = checkpoint
    return [checkpoints[step] for step in sorted(checkpoints)], errors


def require_readable_after(root: Path, step: int) -> None:
    """Check that no later checkpoint is unreadable but possibly intact: `step` would be mistaken for the newest.

    Raises:
        UnreadableCheckpoint: with the storage's error for the later one.
    """
    for later, error in find_unusable(root).items():
        if later > step and isinstance(error, UnreadableCheckpoint):
            raise error


def newest_step(root: Path) -> int | None:
    """Return the step of the newest committed checkpoint, None if there is none."""
    return max((checkpoint.step for checkpoint in list_checkpoints(root)), default=None)


def get_latest(root: Path, *, or_older: bool = False) -> Checkpoint:
    """Return the committed checkpoint with the highest step; with `or_older`, later ones that are damaged do not count.

    Raises:
        DamagedCheckpoint: if a later one is damaged.
        UnreadableCheckpoint: if a later one cannot be read right now.
        CheckpointError: if there is none; says what the directory holds instead.
    """
    committed, unusable = open_all(root)
    require_readable_after(root, committed[-1].step if committed else -1)
    if not committed:
        raise _none_usable("there is no committed checkpoint", root)
    newest = max((committed[-1].step, *unusable))
    return committed[-1] if or_older else get_at_step(root, newest)


def get_at_step(root: Path, step: int) -> Checkpoint:
    """Return the committed checkpoint of one step.

    Raises:
        DamagedCheckpoint: if it exists but is damaged.
        UnreadableCheckpoint: if it cannot be read right now.
        CheckpointError: if it does not exist; names the steps that do.
    """
    committed = list_checkpoints(root)
    for checkpoint in committed:
        if checkpoint.step == step:
            return checkpoint
    if (error := find_unusable(root).get(step)) is not None:
        raise damaged_step_error(step, error.problems, root) if isinstance(error, DamagedCheckpoint) else error
    if not committed:
        raise _none_usable(f"there is no committed checkpoint of step {step}", root)
    raise CheckpointError(
        f"there is no committed checkpoint of step {step}", where=str(root), remedy=f"choose one of: {_steps(committed)}"
    )


def damaged_step_error(step: int, problems: Sequence[Problem], root: Path) -> DamagedCheckpoint:
    """Build the error for a damaged checkpoint that the user asked for; names the other steps."""
    others = [checkpoint for checkpoint in list_checkpoints(root) if checkpoint.step != step]
    remedy = (
        f"name the step to use instead: {_steps(others)}; the newest intact one is {others[-1].step}"
        if others
        else "the run has no other checkpoint; restore this one from a copy"
    )
    return DamagedCheckpoint(
        f"the checkpoint of step {step} is damaged", where=problems[0].where, value=format_problems(problems), remedy=remedy
    )


def format_problems(problems: Sequence[Problem]) -> str:
    """Join problems with checkpoint files into one line for a message."""
    return "; ".join(
        " ".join(filter(None, (f"{Path(p.where).name}:", p.message, f"({p.value})" * bool(p.value)))) for p in problems
    )


def set_aside_after(root: Path, step: int) -> list[Path]:
    """Rename the checkpoints after `step`, so that no later resume starts from one of them; return their paths.

    This includes checkpoints that are unreadable right now: they would be the newest again once they are readable.
    """
    later = {checkpoint.step: checkpoint.path for checkpoint in list_checkpoints(root)}
    for unread, error in find_unusable(root).items():
        if isinstance(error, UnreadableCheckpoint):
            later.setdefault(unread, root / step_name(unread))
    return [set_aside(path, SET_ASIDE_PREFIX) for later_step, path in sorted(later.items()) if later_step > step]


def set_aside(path: Path, prefix: str) -> Path:
    """Rename a checkpoint so that it is never listed again; return its path.

    `prefix` is SET_ASIDE_PREFIX or DAMAGED_PREFIX. Further checkpoints of the same step end in -2, -3 and so on.
    """
    first = path.with_name(prefix + path.name.removeprefix(atomic_files.REPLACED_PREFIX))
    target, number = first, 1
    while target.exists():
        number += 1
        target = first.with_name(f"{first.name}-{number}")
    atomic_files.rename(path, target)
    return target


def verify(
    path: Path, only: Collection[str] | None = None, *, threads: int = 1, on_read: Callable[[int], None] | None = None
) -> list[Problem]:
    """Return every difference between a checkpoint directory and its manifest, digests included; empty if it is intact.

    `only` names the files to verify, None for all. Each of `threads` calls `on_read` with the number of bytes of each block.

    Raises:
        UnreadableCheckpoint: if storage cannot read a file right now.
    """
    try:
        manifest = read_manifest(path)
    except UnreadableCheckpoint:
        raise
    except CheckpointError as error:
        return list(error.problems)
    if problem := _step_problem(path, manifest):
        return [problem]
    names = [name for name in manifest.files if only is None or name in only]
    return verify_files(path, manifest, names, threads=threads, on_read=on_read)


def verify_files(
    path: Path,
    manifest: Manifest,
    names: Iterable[str],
    *,
    threads: int = 1,
    on_read: Callable[[int], None] | None = None,
) -> list[Problem]:
    """Verify the files `names` against a manifest that was read before; otherwise like `verify`."""

    def verify_file(name: str) -> Problem | None:
        file, expected = path / name, manifest.files[name]
        if problem := _size_problem(file, expected):
            return problem
        try:
            actual = atomic_files.digest_file(file, on_read)
        except FileNotFoundError as error:
            return _missing(file, error)
        except OSError as error:
            raise unreadable_error(file, error) from error
        if actual == expected:
            return None
        message = "a checkpoint file is damaged: its digest differs from the manifest's"
        return Problem(message, where=str(file), remedy="resume from another checkpoint, and check the disk")

    # xxhash releases the GIL while it digests a block.
    with ThreadPoolExecutor(threads) as pool:
        return [problem for problem in pool.map(verify_file, names) if problem]


def find_foreign_files(path: Path, manifest: Manifest) -> list[Problem]:
    """Return a problem for each file of a checkpoint that belongs neither to this user nor to root."""
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


@dataclass(frozen=True)
class Retention:
    """The newest `keep_last`, every step that `keep_every` divides, and the `keep_best` with the lowest loss of `best_set`.

    0 turns a rule off, except that the newest checkpoint is always kept. `rows` is the digest of the set's rows, and `other_rows`
    are the digests of plans in which the set has other rows: losses on those count only where too few are on these rows.
    """

    keep_last: int = 1
    keep_every: int = 0
    keep_best: int = 0
    best_set: str = HELD_OUT
    rows: str = ""
    other_rows: frozenset[str] = frozenset()

    @classmethod
    def of(cls, checkpoint: CheckpointSection, rows: str = "", other_rows: frozenset[str] = frozenset()) -> Retention:
        """Build the rules from a run's settings."""
        return cls(checkpoint.keep_last, checkpoint.keep_every, checkpoint.keep_best, checkpoint.best_set, rows, other_rows)

    def is_on_other_rows(self, checkpoint: Checkpoint) -> bool:
        """Return whether the loss of a checkpoint is of other rows of `best_set`."""
        later = checkpoint.later_evaluation
        if later is not None and later.eval_rows:
            return later.eval_rows != self.rows
        return checkpoint.manifest.plan_digest in self.other_rows


def retention_reasons(checkpoints: Sequence[Checkpoint], retention: Retention) -> dict[int, tuple[str, ...]]:
    """Return why each step is kept: any of `newest`, `every N` and `best`; an empty tuple if it would be pruned."""
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    newest = set(steps[-max(1, retention.keep_last) :])
    # The lowest losses; of equal losses, the later step. A step at which the set was not evaluated is no candidate.
    ranked = sorted(
        (retention.is_on_other_rows(checkpoint), checkpoint.eval_loss, -checkpoint.step)
        for checkpoint in checkpoints
        if checkpoint.eval_set == retention.best_set and checkpoint.eval_loss is not None and math.isfinite(checkpoint.eval_loss)
    )
    best = {-step for _, _, step in ranked[: retention.keep_best]}
    every = retention.keep_every
    return {
        step: (
            *(["newest"] if step in newest else []),
            *([f"every {every}"] if every and step % every == 0 else []),
            *(["best"] if step in best else []),
        )
        for step in steps
    }


def select_outdated(checkpoints: Sequence[Checkpoint], retention: Retention) -> list[Checkpoint]:
    """Return the checkpoints that no rule keeps, in the given order."""
    kept = retention_reasons(checkpoints, retention)
    return [checkpoint for checkpoint in checkpoints if not kept[checkpoint.step]]


def retention_of(run: RunDir, plan: LaunchPlan) -> Retention:
    """Return the rules of a plan of the run; `keep_best` prefers losses on the plan's evaluation rows."""
    from launcher.plan.launch_plan import LaunchPlan, digest_of

    section = plan.config.checkpoint
    if not section.keep_best:
        return Retention.of(section)
    rows, plans_with_other_rows = plan.eval_rows_digest(section.best_set), set()
    for path in (run.plan, *run_store.changed_plan_paths(run), *run.plans.glob("*.json")):
        # Nothing is known of the rows of a plan that cannot be read, so its checkpoints count.
        with suppress(OSError, ValueError):
            text = json_records.read_bytes(path).decode()
            if LaunchPlan.from_json(text).eval_rows_digest(section.best_set) != rows:
                plans_with_other_rows.add(digest_of(text))
    return Retention.of(section, rows, frozenset(plans_with_other_rows))


def prune(root: Path, retention: Retention, *, keep: Collection[Path] = ()) -> list[Path]:
    """Remove the committed checkpoints that neither `retention` nor `keep` keeps; return their paths."""
    removed = [
        checkpoint.path for checkpoint in select_outdated(list_checkpoints(root), retention) if checkpoint.path not in keep
    ]
    for path in removed:
        atomic_files.remove_directory(path)
    return removed


@dataclass(frozen=True)
class Leftover:
    """A directory beside the checkpoints: its path, a description for the user, and the bytes of its files."""

    path: Path
    what: str
    bytes: int

    def as_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "what": self.what, "bytes": self.bytes}


def find_leftovers(root: Path, writing: int | None = None) -> list[Leftover]:
    """List the launcher's directories under `root` that are not checkpoints; directories with other names are ignored.

    `writing` is the number of the running attempt, None if no attempt runs: its save in progress is BEING_WRITTEN.
    """
    in_progress = set() if writing is None else set(root.glob(f".saving-step-*-{writing:03d}"))
    return [
        Leftover(path, BEING_WRITTEN if path in in_progress else what, disk_bytes(path))
        for path in (sorted(root.iterdir()) if root.is_dir() else ())
        for prefix, what in _DESCRIPTIONS.items()
        if path.name.startswith(prefix) and not _is_in_use(path) and path.is_dir()
    ]


def has_unfinished_saves(root: Path) -> bool:
    """Return whether a save is in progress or was interrupted."""
    return any(root.glob(".saving-step-*"))


def _is_in_use(path: Path) -> bool:
    """Return whether a replaced checkpoint still counts as committed, because its successor is not in place."""
    if not path.name.startswith(atomic_files.REPLACED_PREFIX):
        return False
    if _is_replaced(path):
        return False
    try:
        open_checkpoint(path)
    except CheckpointError as error:
        # A checkpoint that is unreadable right now may be intact.
        return not isinstance(error, DamagedCheckpoint)
    return True


def remove(path: Path) -> None:
    """Remove a checkpoint or a leftover of a run that no process writes to."""
    if path.name.startswith(atomic_files.REMOVING_PREFIX):
        shutil.rmtree(path, ignore_errors=True)
    else:
        atomic_files.remove_directory(path)


def disk_bytes(path: Path) -> int:
    """Return the bytes of all files under `path`, ignoring files that disappear meanwhile: a run may be writing there.

    Raises:
        OSError: if storage fails in another way.
    """

    def ignore_missing(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    num_bytes = 0
    for folder, _, names in os.walk(path, onerror=ignore_missing):
        for name in names:
            try:
                num_bytes += Path(folder, name).lstat().st_size
            except OSError as error:
                ignore_missing(error)
    return num_bytes


def _is_replaced(path: Path) -> bool:
    """Return whether the successor of a replaced checkpoint is committed."""
    try:
        open_checkpoint(path.with_name(path.name.removeprefix(atomic_files.REPLACED_PREFIX)))
    except CheckpointError:
        return False
    return True


def _step_directories(root: Path) -> list[Path]:
    try:
        return [p for p in root.iterdir() if parse_step(p.name.removeprefix(atomic_files.REPLACED_PREFIX)) is not None]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable_error(root, error) from error


def _none_usable(message: str, root: Path) -> CheckpointError:
    if not root.is_dir():
        return CheckpointError(message, where=str(root), value="the folder does not exist")
    reasons = [f"{step_name(step)}: {error.problems[0].message}" for step, error in find_unusable(root).items()]
    reasons += [f"{p.name}: unfinished save" for p in sorted(root.iterdir()) if _SAVING.fullmatch(p.name)]
    return CheckpointError(message, where=str(root), value="; ".join(reasons) or "the folder is empty")


def _steps(checkpoints: Iterable[Checkpoint]) -> str:
    return ", ".join(str(checkpoint.step) for checkpoint in checkpoints)


def _step_problem(path: Path, manifest: Manifest) -> Problem | None:
    if path.name.removeprefix(atomic_files.REPLACED_PREFIX) == step_name(manifest.step):
        return None
    return Problem("a manifest belongs to another step", where=str(path), value=f"step {manifest.step}")


def _size_problem(file: Path, expected: atomic_files.FileEntry) -> Problem | None:
    try:
        size = file.stat().st_size
    except FileNotFoundError as error:
        return _missing(file, error)
    except OSError as error:
        raise unreadable_error(file, error) from error
    if size != expected.size:
        sizes = f"{size:,} bytes instead of {expected.size:,}"
        return Problem("a checkpoint file has the wrong size", where=str(file), value=sizes)
    return None


def _missing(file: Path, error: OSError) -> Problem:
    return Problem("a checkpoint file is missing", where=str(file), value=str(error.strerror))
