"""The verb `rm`: remove runs with all their files, after a question."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher import atomic_files, json_records, run_store
from launcher.checkpoint import store
from launcher.checkpoint.cleanup import disk_bytes
from launcher.cli import formatting
from launcher.cli.arguments import VerbParser
from launcher.cli.follow import wandb_page
from launcher.cli.liveness import require_ended
from launcher.cli.removal import add_flags, is_confirmed, remove_path
from launcher.clusters import detached_process
from launcher.clusters.backends import cluster_for
from launcher.errors import EXIT_FAILED, EXIT_REFUSED, LauncherError, Problem, SubmitError
from launcher.plan.quantities import format_count, format_size
from launcher.plan.run_dir import RunDir
from launcher.run_records import RUNNING_STATES, MirrorRecord
from launcher.security import owners
from launcher.shell_commands import launcher_command
from launcher.tracking.jsonl import read_events

_LABEL_WIDTH = 12
_STEPS_SHOWN = 8


@dataclass(frozen=True)
class RemovableRun:
    """What is removed with a run, in bytes, its copies elsewhere, and the runs that start from its weights."""

    name: str
    dir: str
    state: str
    bytes: int
    steps: tuple[int, ...]
    has_export: bool
    copies: tuple[str, ...]
    wandb: str | None
    needed_by: tuple[str, ...]


def run(verb: str, tokens: list[str]) -> int:
    """Remove runs; returns 1 if any files could not be removed."""
    arguments = _parser().parse_args(tokens)
    root = Path(arguments.root)
    runs = _find(arguments.runs, root)
    removable = [_inspect(one, root, {run.root for run in runs}) for one in runs]
    problems = [problem for one in runs if (problem := living_problem(one))]
    problems += [_need(one) for one in removable if one.needed_by and not arguments.even_if_needed]
    if problems:
        raise SubmitError(problems)
    if not arguments.json:
        for one in removable:
            print("\n".join(_lines(one)) + "\n")
    total = f"{format_count(len(removable), 'run')}, {format_size(sum(one.bytes for one in removable))}"
    if not is_confirmed(arguments, f"remove {total}?", (verb, *tokens)):
        return EXIT_REFUSED
    left = [] if arguments.dry_run else [path for one in runs for path in _remove(one)]
    for link in () if arguments.dry_run else (path for name in arguments.runs for path in (root / name, Path(name))):
        # A run was named by a link to its directory.
        if link.is_symlink() and os.path.realpath(link) in {one.dir for one in removable}:
            link.unlink()
    if arguments.json:
        print(formatting.as_json({"runs": [asdict(one) for one in removable], "removed": not arguments.dry_run, "left": left}))
    elif arguments.dry_run:
        print(f"{total}: nothing was removed, because of --dry-run")
    elif not left:
        print(f"removed {total}; data and models stay in the cache: {launcher_command('clean')}")
    for path in left:
        print(f"not removed: {path}", file=sys.stderr)
    return EXIT_FAILED if left else 0


def _parser() -> argparse.ArgumentParser:
    about = (
        "Remove runs: checkpoints, export, logs, metrics, plan and code. A live run is refused, and so is one whose weights "
        "other runs start from."
    )
    parser = VerbParser(prog="python -m launcher rm", description=about)
    parser.add_root()
    parser.add_argument("runs", metavar="RUN", nargs="+", help="name of the run, or path of its directory")
    add_flags(parser)
    needed = "remove a run even if other runs start from its weights"
    parser.add_argument("--even-if-needed", action="store_true", help=needed)
    return parser


def _find(names: list[str], root: Path) -> list[RunDir]:
    """Return the runs with these names; their plans may be damaged or missing.

    Raises:
        SubmitError: with every name that is not a run, or is the run of another user.
    """
    runs: dict[Path, RunDir] = {}
    problems: list[Problem] = []
    for name in names:
        try:
            run = run_store.find_run(name, root, marker="status.json")
        except LauncherError as error:
            problems += error.problems
            continue
        problems += filter(None, [owners.run_problem(run.root)])
        runs[run.root] = run
    if problems:
        raise SubmitError(problems)
    return list(runs.values())


def _inspect(run: RunDir, root: Path, together: Collection[Path]) -> RemovableRun:
    """Describe a run; `together` are the directories of the runs that the same command removes."""
    state, events = "unknown", read_events(run.events)
    with suppress(LauncherError):
        status = run_store.read_status(run)
        state = f"{status.state}, at step {status.step:,}" + (f" of {status.max_steps:,}" if status.max_steps else "")
    copies = []
    with suppress(LauncherError):
        records = (run.attempt(number) / "mirror.json" for number in reversed(run_store.attempt_numbers(run)))
        if mirror := next(filter(None, (json_records.read_if_present(MirrorRecord, path) for path in records)), None):
            copies.append(f"the mirror {mirror.url} has the steps {', '.join(map(str, mirror.steps[-_STEPS_SHOWN:])) or 'none'}")
    urls = [url for event in events if event["kind"] == "export" and (url := event["fields"].get("url"))]
    copies += [f"the Hub has the export: {url}" for url in urls[-1:]]
    folders = {folder.resolve(): folder for folder in (root, run.root.parent)}
    others = {other.root.resolve(): other for folder in folders.values() for other in run_store.list_runs(folder)}
    needed_by = (str(other.root) for path, other in others.items() if path not in together and _starts_from(other, run.root))
    return RemovableRun(
        name=run.root.name,
        dir=str(run.root),
        state=state,
        bytes=disk_bytes(run.root),
        steps=tuple(checkpoint.step for checkpoint in store.list_checkpoints(run.checkpoints)),
        has_export=run.export.is_dir(),
        copies=tuple(copies),
        wandb=wandb_page(run, events).get("url") or None,
        needed_by=tuple(needed_by),
    )


def _starts_from(other: RunDir, folder: Path) -> bool:
    """Return whether a run's initial weights or tokenizer come from the run in `folder`."""
    # The plan of another user's run may contain anything, even values that are not paths.
    with suppress(LauncherError, OSError, ValueError, TypeError, AttributeError):
        plan = run_store.read_plan_values(run_store.newest_plan_path(other))
        paths = ((plan.get("lineage") or {}).get("run_dir"), plan["model"].get("path"), plan["model"].get("tokenizer_path"))
        return any(Path(os.path.realpath(path)).is_relative_to(folder) for path in paths if path)
    return False


def living_problem(run: RunDir) -> Problem | None:
    """Return why a run counts as live, or None if its backend knows that it has ended."""
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
        cancel = f"stop it first: {launcher_command('cancel', run.root)}"
        return Problem(f"the run {run.root.name} is {status.state}", str(run.root), status.message, cancel)
    try:
        require_ended(run)
    except SubmitError as error:
        return error.problems[0]
    if (process := detached_process.find_process(recorded)) is not None:
        message = f"the run {run.root.name} is {status.state}, but its process is still uploading or closing files"
        return Problem(message, str(run.root), f"process {process.pid}", "wait until it has ended")
    return None


def _need(one: RemovableRun) -> Problem:
    return Problem(
        f"other runs start from the weights of the run {one.name}",
        where=one.dir,
        value=", ".join(one.needed_by),
        remedy="remove them first, or name them in the same command; --even-if-needed removes this run anyway: "
        "they can then be resumed only from their own checkpoints",
    )


def _lines(one: RemovableRun) -> list[str]:
    """Return what is removed and what stays, as lines of a label and a value."""
    more = f" and {len(one.steps) - _STEPS_SHOWN} older" if len(one.steps) > _STEPS_SHOWN else ""
    rows = [
        ("run", f"{one.name} in {formatting.short(Path(one.dir))}"),
        ("state", one.state),
        ("size", format_size(one.bytes)),
        ("checkpoints", f"{', '.join(map(str, one.steps[-_STEPS_SHOWN:])) or 'none'}{more}"),
        ("export", "yes" if one.has_export else "none"),
        ("copies", "; ".join(one.copies) or "none known: what is removed is gone"),
        *([("W&B", f"{one.wandb} stays")] if one.wandb else []),
        *([("needed by", ", ".join(one.needed_by))] if one.needed_by else []),
    ]
    return formatting.wrap([f"{label:<{_LABEL_WIDTH}}{value}" for label, value in rows], _LABEL_WIDTH)


def _remove(run: RunDir) -> Iterator[str]:
    """Remove a run, and what interrupted removals left beside it; yields the files that could not be removed.

    Raises:
        SubmitError: if it was resumed after it was shown, or is being started.
    """
    removing = run.root.with_name(f"{atomic_files.REMOVING_PREFIX}{run.root.name}")
    # The rename is under the lock with which attempts are started.
    with run_store.start_lock(run):
        if problem := living_problem(run):
            raise SubmitError(problem)
        yield from remove_path(removing)
        atomic_files.rename(run.root, removing)
        yield from remove_path(removing)
