"""From which checkpoint an attempt begins, the same one on every rank; what is damaged is told, set aside and left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from launcher import run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import Checkpoint
from launcher.distributed import RankInfo, rank0_broadcast
from launcher.errors import CheckpointError, DamagedCheckpoint, UnreadableCheckpoint
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt

T = TypeVar("T")
_NONE = -1
_NOT_USABLE = "the checkpoint folder cannot be read or written"


@dataclass(frozen=True)
class Start:
    """`checkpoint` None starts from the initial weights; `restarts` counts the agents' restarts within the attempt."""

    checkpoint: Checkpoint | None
    restarts: int


@dataclass(frozen=True)
class Damage:
    """What is wrong with the checkpoint at `path`."""

    path: Path
    error: CheckpointError

    @property
    def words(self) -> str:
        return store.format_problems(self.error.problems)


def agree_on_start(run: RunDir, rank_info: RankInfo, device: torch.device) -> Start:
    """The newest checkpoint that this attempt has committed, else the one that it names. Collective.

    Where the attempts before have left a later one than an attempt names that no person started, it is that one. Where what
    it names can no longer be opened it is the one before, unless a person has asked for just that one. Rank 0 looks, because
    a shared file system shows a fresh folder to some nodes later than to others. Agents that restart only because another
    one does keep their own count: the highest is meant.

    Raises:
        UnreadableCheckpoint: where one that would be better cannot be read now.
        CheckpointError: where the checkpoint is not there: never a silent start from step 0.
    """
    chosen = rank0_broadcast(rank_info, _NOT_USABLE, lambda: _step_to_begin_from(run, rank_info.attempt))
    shared = torch.tensor(rank_info.restart, dtype=torch.int64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    checkpoint = None if chosen is None else store.get_at_step(run.checkpoints, chosen)
    return Start(checkpoint, int(shared))


def load_whole(
    run: RunDir, rank_info: RankInfo, first: Checkpoint, load: Callable[[Path], T], tell: Callable[[str], None]
) -> tuple[Checkpoint, T]:
    """Load `first`, or where that is damaged the newest before it that is whole, and return which one it was. Collective.

    `load` is collective, raises DamagedCheckpoint on every rank and has then changed nothing. What is damaged is set aside
    when another has been loaded in its place, and `tell` is given words for a person on each.

    Raises:
        DamagedCheckpoint: where none is whole, with all of them, or where a person has asked for just this step.
    """
    damaged: dict[int, Damage] = {}
    checkpoint = first
    while True:
        try:
            loaded = load(checkpoint.path)
            break
        except DamagedCheckpoint as error:
            damaged[checkpoint.step] = Damage(checkpoint.path, error)
            before = rank0_broadcast(rank_info, _NOT_USABLE, lambda: _before(run, rank_info.attempt, damaged))
            checkpoint = store.get_at_step(run.checkpoints, before)
    for words in rank0_broadcast(rank_info, _NOT_USABLE, lambda: _set_aside(run, rank_info.attempt, checkpoint.step, damaged)):
        tell(words)
    return checkpoint, loaded


def _step_to_begin_from(run: RunDir, number: int) -> int | None:
    checkpoint = _chosen(run, number)
    step = None if checkpoint is None else checkpoint.step
    _require_later_readable(run, number, _NONE if step is None else step)
    return step


def _chosen(run: RunDir, number: int) -> Checkpoint | None:
    attempt = _naming_the_newest(run, number)
    candidates = _candidates(run, number)
    if candidates and (candidates[0].manifest.attempt == number or candidates[0].step == attempt.resume_step):
        return candidates[0]
    if attempt.resume_step is None:
        if unusable := _unusable(run):
            raise _none_whole(run, unusable)
        return None
    try:
        return store.get_at_step(run.checkpoints, attempt.resume_step)
    except DamagedCheckpoint:
        if attempt.pinned:
            raise
        if not candidates:
            raise _none_whole(run, _unusable(run)) from None
        return candidates[0]


def _naming_the_newest(run: RunDir, number: int) -> Attempt:
    """The attempt, which names a later checkpoint from here on where whoever numbered it had not seen that one.

    A listing may be out of date, or storage away for a moment.

    Raises:
        CheckpointError: where an attempt that a person started names none, and there are some.
    """
    attempt = run_store.read_attempt(run, number)
    committed = store.list_checkpoints(run.checkpoints)
    newest = max((c.step for c in committed if c.manifest.attempt < number), default=_NONE)
    named = _NONE if attempt.resume_step is None else attempt.resume_step
    if newest <= named or attempt.pinned or any(c.manifest.attempt == number for c in committed):
        return attempt
    if attempt.automatic:
        run_store.fence(run, number, refresh=True)
        # Written down: it is what ranks that are started again look for, and what the attempt's progress is measured by.
        attempt = replace(attempt, resume_step=newest)
        run_store.write_attempt(run, number, attempt)
    elif attempt.resume_step is None:
        raise CheckpointError(
            f"attempt {number} was to begin at step 0, and there are checkpoints of the attempts before it",
            where=str(run.checkpoints),
            value=f"the newest is of step {newest}",
            remedy="continue from it with: python -m launcher resume RUN, or start a run of another name",
        )
    return attempt


def _candidates(run: RunDir, number: int) -> list[Checkpoint]:
    """What the attempt may begin from, the best first: its own checkpoints, then the one that it names and those before.

    What an attempt before has left beyond the step that is named counts for nothing.
    """
    attempt = run_store.read_attempt(run, number)
    named = _NONE if attempt.resume_step is None else attempt.resume_step

    def may_serve(checkpoint: Checkpoint) -> bool:
        earlier = checkpoint.step == named if attempt.pinned else checkpoint.step <= named
        return checkpoint.manifest.attempt == number or earlier

    found = [checkpoint for checkpoint in store.list_checkpoints(run.checkpoints) if may_serve(checkpoint)]
    return sorted(found, key=lambda c: (c.manifest.attempt == number, c.step), reverse=True)


def _before(run: RunDir, number: int, damaged: dict[int, Damage]) -> int:
    """The step of the candidate that comes next. What some rank calls damaged, rank 0 has to find so as well.

    A node with bad memory, or one that does not see all files yet, costs nobody a checkpoint.
    """
    step, damage = list(damaged.items())[-1]
    if not store.verify(damage.path, {Path(problem.where).name for problem in damage.error.problems}):
        raise CheckpointError(
            "some ranks read a checkpoint otherwise than rank 0, which finds it whole; it is left as it is",
            where=str(damage.path),
            value=damage.words,
            remedy="resume the run; where it is always the same node, take that out and check it",
        )
    if left := [candidate.step for candidate in _candidates(run, number) if candidate.step not in damaged]:
        _require_later_readable(run, number, left[0])
        return left[0]
    attempt = run_store.read_attempt(run, number)
    if attempt.pinned and step == attempt.resume_step:
        raise store.damaged_step_error(step, damage.error.problems, run.checkpoints)
    raise _none_whole(run, {**_unusable(run), **damaged})


def _require_later_readable(run: RunDir, number: int, step: int) -> None:
    """Refuse a step where a later one may be whole and cannot be read now; one that a person asked for is used all the same."""
    if not run_store.read_attempt(run, number).pinned:
        store.require_readable_after(run.checkpoints, step)


def _none_whole(run: RunDir, damaged: dict[int, Damage]) -> CheckpointError:
    said = [f"step {step}: {damage.words}" for step, damage in sorted(damaged.items())]
    # What can perhaps be read the next time is tried again.
    unread = any(isinstance(damage.error, UnreadableCheckpoint) for damage in damaged.values())
    return (UnreadableCheckpoint if unread else DamagedCheckpoint)(
        "no checkpoint of this run is whole, and it does not start again from step 0 by itself",
        where=str(run.checkpoints),
        value="; ".join(said),
        remedy="put back a copy of one of them, or start a run of another name",
    )


def _set_aside(run: RunDir, number: int, begun: int, damaged: dict[int, Damage]) -> list[str]:
    """Set aside what is damaged and later than what the attempt has begun from; returns what a person is told.

    Among it is what can no longer be opened, which therefore nobody has chosen.
    """
    later = {step: damage for step, damage in sorted({**_unusable(run), **damaged}.items()) if step > begun}
    # What has another format may be whole to another launcher.
    doomed = {step: damage for step, damage in later.items() if isinstance(damage.error, DamagedCheckpoint)}
    if not doomed:
        return []
    # An attempt that another has followed may see what that one is just writing.
    run_store.fence(run, number, refresh=True)
    attempt = run_store.read_attempt(run, number)
    if attempt.resume_step in doomed:
        # Before it is gone under its name: ranks that are started again look for what the attempt names.
        run_store.write_attempt(run, number, replace(attempt, resume_step=begun))
    told = []
    for step, damage in doomed.items():
        lies = store.set_aside(damage.path, store.DAMAGED_PREFIX).name
        what = f"the checkpoint of step {step} is damaged ({damage.words})"
        told.append(f"{what}; it is set aside as {lies}, step {begun} is used")
    return told


def _unusable(run: RunDir) -> dict[int, Damage]:
    unusable = store.find_unusable(run.checkpoints)
    return {step: Damage(run.checkpoints / store.step_name(step), error) for step, error in unusable.items()}
