"""What removing a run deletes, what keeps a copy, and why a run may not be removed."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher import atomic_files, json_records, run_store
from launcher.checkpoint import store
from launcher.checkpoint.cleanup import disk_bytes
from launcher.cli.follow import wandb_page
from launcher.cli.liveness import require_ended
from launcher.clusters import detached_process
from launcher.clusters.backends import cluster_for
from launcher.errors import LauncherError, Problem, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, MirrorRecord, Status, read_export
from launcher.shell_commands import launcher_command
from launcher.tracking.jsonl import read_events


@dataclass(frozen=True)
class RemovableRun:
    """The content of a run directory, in bytes, and its copies elsewhere.

    `mirror` and `mirrored_steps` come from the newest record of uploads; `pushed_to` and `wandb` are addresses. Missing values
    are empty or None.
    """

    run: RunDir
    state: str
    step: int
    max_steps: int | None
    bytes: int
    checkpoint_bytes: int
    steps: tuple[int, ...]
    export: str | None
    mirror: str | None
    mirrored_steps: tuple[int, ...]
    pushed_to: str | None
    wandb: str | None
    needed_by: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {"name": self.run.root.name, "dir": str(self.run.root)} | {
            name: value for name, value in asdict(self).items() if name != "run"
        }


def inspect(run: RunDir, others: Iterable[RunDir], together_with: Collection[Path]) -> RemovableRun:
    """Describe a run whose records this user trusts.

    `others` are runs that may need it; `together_with` are the directories of the runs that the same command removes.
    """
    status, events = _last_status(run), read_events(run.events)
    exported, mirror = read_export(run), _mirror(run)
    urls = [url for event in events if event["kind"] == "export" and (url := event["fields"].get("url"))]
    page = wandb_page(run, events)
    return RemovableRun(
        run=run,
        state=status.state,
        step=status.step,
        max_steps=status.max_steps,
        bytes=disk_bytes(run.root),
        checkpoint_bytes=disk_bytes(run.checkpoints) if run.checkpoints.is_dir() and not run.checkpoints.is_symlink() else 0,
        steps=tuple(checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints)),
        export=None if exported is None else f"step {exported.step} in {exported.dtype}",
        mirror=None if mirror is None else mirror.url,
        mirrored_steps=() if mirror is None else mirror.steps,
        pushed_to=urls[-1] if urls else None,
        wandb=page.get("url") or None,
        needed_by=tuple(str(other.root) for other in _dependents(run, others) if other.root not in together_with),
    )


def _last_status(run: RunDir) -> Status:
    try:
        return run_store.read_status(run)
    except LauncherError:
        return Status(state="unknown", attempt=0)


def _mirror(run: RunDir) -> MirrorRecord | None:
    for number in reversed(run_store.attempt_numbers(run)):
        with suppress(LauncherError):
            if record := json_records.read_if_present(MirrorRecord, run.attempt(number) / "mirror.json"):
                return record
    return None


def _dependents(run: RunDir, others: Iterable[RunDir]) -> Iterator[RunDir]:
    """Yield the runs whose initial weights or tokenizer come from this one."""
    for other in others:
        if other.root.resolve() == run.root:
            continue
        # The plan of another user's run may contain anything, even values that are not paths.
        with suppress(LauncherError, OSError, ValueError):
            plan = run_store.read_plan_values(run_store.newest_plan_path(other))
            if any(_is_inside(path, run.root) for path in _model_paths(plan)):
                yield other


def _model_paths(plan: dict[str, Any]) -> Iterator[str]:
    lineage, model = plan.get("lineage"), plan.get("model")
    if isinstance(lineage, dict) and isinstance(folder := lineage.get("run_dir"), str):
        yield folder
    if isinstance(model, dict):
        yield from (path for name in ("path", "tokenizer_path") if isinstance(path := model.get(name), str))


def _is_inside(path: str, folder: Path) -> bool:
    return bool(path) and Path(os.path.realpath(path)).is_relative_to(folder)


def problems_of(removable: RemovableRun, even_if_needed: bool) -> list[Problem]:
    """Return why a run may not be removed: it is live, its state is unknown, or other runs need it."""
    problems, run = [], removable.run
    if problem := _living(run):
        problems.append(problem)
    if removable.needed_by and not even_if_needed:
        problems.append(
            Problem(
                f"other runs start from the weights of the run {run.root.name}",
                where=str(run.root),
                value=", ".join(removable.needed_by),
                remedy="remove them first, or name them in the same command; --even-if-needed removes this run anyway: "
                "they can then be resumed only from their own checkpoints",
            )
        )
    return problems


def _living(run: RunDir) -> Problem | None:
    """Return why a run counts as live, or None if its backend knows that it has ended."""
    cancel = f"stop it first: {launcher_command('cancel', run.root)}"
    try:
        recorded = run_store.read_status(run)
        # A final state is the same on every backend, so a damaged plan need not be read.
        status = recorded
        if recorded.state in RUNNING_STATES:
            status = cluster_for(run_store.read_placement(run).kind).status(run)
    except LauncherError as error:
        first = error.problems[0]
        message = f"it is unknown whether the run {run.root.name} has ended: {first.message}"
        remedy = f"{first.remedy}; or, if no process of it lives, remove its folder yourself".removeprefix("; or, ")
        return Problem(message, first.where or str(run.root), first.value, remedy)
    if status.state in RUNNING_STATES:
        return Problem(f"the run {run.root.name} is {status.state}", str(run.root), status.message, cancel)
    try:
        require_ended(run)
    except SubmitError as error:
        return error.problems[0]
    if (process := detached_process.find_process(recorded)) is not None:
        message = f"the run {run.root.name} is {status.state}, but its process is still uploading or closing files"
        return Problem(message, str(run.root), f"process {process.pid}", "wait until it has ended")
    return None


def aside(root: Path) -> Path:
    """Return the path, beside the original, of a run directory while it is being removed."""
    return root.parent / f"{atomic_files.REMOVING_PREFIX}{root.name}"
