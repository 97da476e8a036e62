"""Chooses and loads the checkpoint that an attempt starts from, the same on every rank; sets damaged checkpoints aside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.distributed import RankInfo, rank0_broadcast
from launcher.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import Attempt
from launcher.shell_commands import launcher_command

T = TypeVar("T")
_NONE = -1
_NOT_USABLE = "the checkpoint folder cannot be read or written"


@dataclass(frozen=True)
class StartPoint:
    """Where an attempt starts: a checkpoint, or None for the initial weights; and how often node agents restarted it."""

    checkpoint: Checkpoint | None
    num_restarts: int


@dataclass(frozen=True)
class Damage:
    """A checkpoint that cannot be loaded, and why."""

    path: Path
    error: CheckpointError

    @property
    def summary(self) -> str:
        """The problems in one line."""
        return store.format_problems(self.error.problems)


def agree_on_start_point(run: RunDir, rank_info: RankInfo, device: torch.device) -> StartPoint:
    """Choose where this attempt starts, the same on every rank. Collective.

    This is the newest checkpoint that the attempt has committed itself, else its `resume_step`. An attempt that started
    automatically takes the newest checkpoint of earlier attempts if that is later. If a `resume_step` can no longer be opened,
    the checkpoint before it is used, unless a person asked for exactly that step.

    Rank 0 chooses, because a shared file system may show a new folder later on some nodes than on others. Node agents count
    restarts separately; the highest count is used.

    Raises:
        UnreadableCheckpoint: if a later checkpoint exists but cannot be read right now.
        CheckpointError: if the checkpoint is missing: an attempt never silently starts from step 0.
    """
    step = rank0_broadcast(rank_info, _NOT_USABLE, lambda: _choose_step(run, rank_info.attempt))
    num_restarts = torch.tensor(rank_info.restart, dtype=torch.int64, device=device)
    dist.all_reduce(num_restarts, op=dist.ReduceOp.MAX)
    checkpoint = None if step is None else store.get_at_step(run.checkpoints, step)
    return StartPoint(checkpoint, int(num_restarts))


def load_newest_intact(
    run: RunDir, rank_info: RankInfo, first: Checkpoint, load: Callable[[Path], T], report: Callable[[str], None]
) -> tuple[Checkpoint, T]:
    """Load `first`, or the newest intact checkpoint before it, and return it with the result of `load`. Collective.

    `load` is collective; if it raises DamagedCheckpoint, it does so on every rank and has changed nothing. Damaged checkpoints
    are set aside once another one is loaded, and `report` receives a message about each.

    Raises:
        DamagedCheckpoint: if no checkpoint is intact, listing all of them, or if a person asked for exactly this step.
    """
    damaged: dict[int, Damage] = {}
    checkpoint = first
    while True:
        try:
            loaded = load(checkpoint.path)
            break
        except DamagedCheckpoint as error:
            damaged[checkpoint.step] = Damage(checkpoint.path, error)
            step = rank0_broadcast(rank_info, _NOT_USABLE, lambda: _choose_next(run, rank_info.attempt, damaged))
            checkpoint = store.get_at_step(run.checkpoints, step)
    for message in rank0_broadcast(
        rank_info, _NOT_USABLE, lambda: _set_aside_damaged(run, rank_info.attempt, checkpoint.step, damaged)
    ):
        report(message)
    return checkpoint, loaded


def _choose_step(run: RunDir, number: int) -> int | None:
    attempt = _update_resume_step(run, number)
    candidates, step = _list_candidates(run, number, attempt), attempt.resume_step
    if candidates and (candidates[0].manifest.attempt == number or candidates[0].step == step):
        step = candidates[0].step
    elif step is not None:
        try:
            store.get_at_step(run.checkpoints, step)
        except DamagedCheckpoint:
            if attempt.pinned:
                raise
            if not candidates:
                raise _explain_no_intact(run, _find_unusable(run)) from None
            step = candidates[0].step
    elif unusable := _find_unusable(run):
        raise _explain_no_intact(run, unusable)
    if not attempt.pinned:
        store.require_readable_after(run.checkpoints, _NONE if step is None else step)
    return step


def _update_resume_step(run: RunDir, number: int) -> Attempt:
    """Return the attempt, with a later `resume_step` if its submitter did not see the newest checkpoint.

    A directory listing may be stale, or storage briefly unavailable.

    Raises:
        CheckpointError: if a person started the attempt at step 0, and the attempts before it have checkpoints.
    """
    attempt = run_store.read_attempt(run, number)
    committed = store.list_checkpoints(run.checkpoints)
    newest = max((c.step for c in committed if c.manifest.attempt < number), default=_NONE)
    named = _NONE if attempt.resume_step is None else attempt.resume_step
    if newest <= named or attempt.pinned or any(c.manifest.attempt == number for c in committed):
        return attempt
    if attempt.automatic:
        run_store.fence(run, number, refresh=True)
        # Restarted ranks read this, and the progress of the attempt is measured from here.
        attempt = replace(attempt, resume_step=newest)
        run_store.write_attempt(run, number, attempt)
    elif attempt.resume_step is None:
        raise CheckpointError(
            f"attempt {number} would begin at step 0, but the attempts before it have checkpoints",
            where=str(run.checkpoints),
            value=f"the newest is at step {newest}",
            remedy=f"continue from it with: {launcher_command('resume', run.root)}, or start a run with another name",
        )
    return attempt


def _list_candidates(run: RunDir, number: int, attempt: Attempt) -> list[Checkpoint]:
    """Return checkpoints that the attempt may start from, best first: its own, then those up to its `resume_step`.

    Later checkpoints of earlier attempts are ignored.
    """
    named = _NONE if attempt.resume_step is None else attempt.resume_step

    def is_candidate(checkpoint: Checkpoint) -> bool:
        is_earlier = checkpoint.step == named if attempt.pinned else checkpoint.step <= named
        return checkpoint.manifest.attempt == number or is_earlier

    candidates = [checkpoint for checkpoint in store.list_checkpoints(run.checkpoints) if is_candidate(checkpoint)]
    return sorted(candidates, key=lambda c: (c.manifest.attempt == number, c.step), reverse=True)


def _choose_next(run: RunDir, number: int, damaged: dict[int, Damage]) -> int:
    """Return the step of the best undamaged candidate. Rank 0 verifies the latest damage that any rank has reported.

    So a node with bad memory, or one that does not see all files yet, cannot discard a checkpoint.
    """
    step, damage = list(damaged.items())[-1]
    if not store.verify(damage.path, {Path(problem.where).name for problem in damage.error.problems}):
        raise CheckpointError(
            "some ranks find a checkpoint damaged that rank 0 finds intact; it was not changed",
            where=str(damage.path),
            value=damage.summary,
            remedy="resume the run; if it is always the same node, exclude that node and check its memory and storage",
        )
    attempt = run_store.read_attempt(run, number)
    if remaining := [candidate.step for candidate in _list_candidates(run, number, attempt) if candidate.step not in damaged]:
        if not attempt.pinned:
            store.require_readable_after(run.checkpoints, remaining[0])
        return remaining[0]
    if attempt.pinned and step == attempt.resume_step:
        raise store.damaged_step_error(step, damage.error.problems, run.checkpoints)
    raise _explain_no_intact(run, {**_find_unusable(run), **damaged})


def _explain_no_intact(run: RunDir, damaged: dict[int, Damage]) -> CheckpointError:
    summaries = [f"step {step}: {damage.summary}" for step, damage in sorted(damaged.items())]
    # Storage errors may be temporary, so this error type makes the launcher retry.
    is_unread = any(isinstance(damage.error, UnreadableCheckpoint) for damage in damaged.values())
    return (UnreadableCheckpoint if is_unread else DamagedCheckpoint)(
        "no checkpoint of this run is intact, and a run does not restart from step 0 automatically",
        where=str(run.checkpoints),
        value="; ".join(summaries),
        remedy="restore a copy of one of them, or start a run with another name",
    )


def _set_aside_damaged(run: RunDir, number: int, start_step: int, damaged: dict[int, Damage]) -> list[str]:
    """Set aside the damaged checkpoints after step `start_step`, and return a message about each.

    This includes checkpoints that cannot be opened and were never candidates.
    """
    later = {step: damage for step, damage in sorted({**_find_unusable(run), **damaged}.items()) if step > start_step}
    # Another version of the launcher may be able to read a checkpoint in another format.
    damaged_later = {step: damage for step, damage in later.items() if isinstance(damage.error, DamagedCheckpoint)}
    if not damaged_later:
        return []
    # A superseded attempt may see a checkpoint that its successor is still writing.
    run_store.fence(run, number, refresh=True)
    attempt = run_store.read_attempt(run, number)
    if attempt.resume_step in damaged_later:
        # Write this before renaming the checkpoint, because restarted ranks look for `resume_step`.
        run_store.write_attempt(run, number, replace(attempt, resume_step=start_step))
    messages = []
    for step, damage in damaged_later.items():
        name = store.set_aside(damage.path, store.DAMAGED_PREFIX).name
        problem = f"the checkpoint of step {step} is damaged ({damage.summary})"
        messages.append(f"{problem}; it is set aside as {name}, and training continues from step {start_step}")
    return messages


def _find_unusable(run: RunDir) -> dict[int, Damage]:
    unusable = store.find_unusable(run.checkpoints)
    return {step: Damage(run.checkpoints / store.step_name(step), error) for step, error in unusable.items()}
