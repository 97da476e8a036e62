"""The verb `rm`: remove runs with all their files, after a question."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from launcher import atomic_files, run_store
from launcher.cli import formatting
from launcher.cli.arguments import VerbParser
from launcher.cli.cleanup.removable_run import RemovableRun, aside, inspect, problems_of
from launcher.cli.cleanup.removal import add_flags, is_confirmed, remove_tree
from launcher.errors import EXIT_FAILED, EXIT_REFUSED, LauncherError, Problem, SubmitError, printable
from launcher.plan.quantities import format_count, format_size
from launcher.plan.run_dir import RunDir
from launcher.security import ownership
from launcher.security.trust import Trust
from launcher.shell_commands import launcher_command

_LABEL_WIDTH = 12
_STEPS_SHOWN = 8


def run(verb: str, tokens: list[str]) -> int:
    """Remove runs; returns 1 if any files could not be removed."""
    arguments = _parser().parse_args(tokens)
    root = Path(arguments.root)
    runs, interrupted = _find(arguments.runs, root)
    removable = _inspect(runs, root)
    _refuse(removable, arguments.even_if_needed)
    if not arguments.json:
        for one in removable:
            print("\n".join(_lines(one)) + "\n")
    total = format_size(sum(one.bytes for one in removable))
    count = format_count(len(removable), "run")
    if removable and not is_confirmed(arguments, f"remove {count}, {total}?", (verb, *tokens)):
        return EXIT_REFUSED
    left = [] if arguments.dry_run else _remove(removable, interrupted, arguments.runs, root)
    if arguments.json:
        values = {
            "runs": [one.as_json() for one in removable],
            "continued": [str(folder) for folder in interrupted],
            "removed": not arguments.dry_run,
            "left": left,
        }
        print(formatting.as_json(values))
    elif arguments.dry_run:
        print(f"{count}, {total}: nothing was removed, because of --dry-run")
    elif not left:
        for folder in interrupted:
            print(f"finished the removal of {formatting.short(folder)}")
        if removable:
            print(f"removed {count}, {total}; data and models stay in the cache: {launcher_command('clean')}")
    for path in left:
        print(printable(f"not removed: {path}"), file=sys.stderr)
    if left:
        print("run the command again when these files can be removed", file=sys.stderr)
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


def _find(names: Sequence[str], root: Path) -> tuple[list[RunDir], list[Path]]:
    """Return the runs with these names, and the folders of interrupted removals.

    Raises:
        SubmitError: with every name that is not a run.
    """
    runs: dict[Path, RunDir] = {}
    interrupted: list[Path] = []
    problems: list[Problem] = []
    for name in names:
        leftovers = [folder for path in _candidates(name, root) if _is_leftover(folder := aside(Path(os.path.realpath(path))))]
        interrupted += leftovers[:1]
        if link_problem := _link_problem(name, root):
            problems.append(link_problem)
            continue
        try:
            run = _find_run(name, root)
        except LauncherError as error:
            problems += [] if leftovers else error.problems
            continue
        if problem := ownership.records_problem(run):
            problems.append(problem)
        runs.setdefault(run.root, run)
    if problems:
        raise SubmitError(problems)
    return list(runs.values()), interrupted


def _candidates(name: str, root: Path) -> tuple[Path, Path]:
    return root / name, Path(name).expanduser().absolute()


def _link_problem(name: str, root: Path) -> Problem | None:
    """Return why a name is not followed, whichever of its paths has the run, or None if it may be followed."""
    return next(filter(None, (ownership.link_problem(path, root) for path in _candidates(name, root))), None)


def _find_run(name: str, root: Path) -> RunDir:
    """Find a run that has a plan or a status; either may be damaged."""
    try:
        return run_store.find_run(name, root)
    except LauncherError as error:
        try:
            return run_store.find_run(name, root, marker="status.json")
        except LauncherError:
            raise error from None


def _is_leftover(folder: Path) -> bool:
    """Return whether a removal by this user was interrupted and left this folder."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    trusted = Trust.from_environ(os.environ)
    return folder.is_dir() and not folder.is_symlink() and trusted.accepts_owner(status.st_uid)


def _inspect(runs: Sequence[RunDir], root: Path) -> list[RemovableRun]:
    folders = dict.fromkeys(folder.resolve() for folder in (root, *(run.root.parent for run in runs)))
    others = [other for folder in folders for other in run_store.list_runs(folder)]
    together = {run.root for run in runs}
    return [inspect(run, others, together) for run in runs]


def _refuse(removable: Sequence[RemovableRun], even_if_needed: bool) -> None:
    """Reject the whole command if one of its runs may not be removed.

    Raises:
        SubmitError: with every reason.
    """
    if problems := [problem for one in removable for problem in problems_of(one, even_if_needed)]:
        raise SubmitError(problems)


def _lines(one: RemovableRun) -> list[str]:
    """Return what is removed and what stays, as lines of a label and a value."""
    of = f" of {one.max_steps:,}" if one.max_steps else ""
    shown = ", ".join(map(str, one.steps[-_STEPS_SHOWN:]))
    more = f" and {len(one.steps) - _STEPS_SHOWN} older" if len(one.steps) > _STEPS_SHOWN else ""
    rows = [
        ("run", f"{one.run.root.name} in {formatting.short(one.run.root)}"),
        ("state", f"{one.state}, at step {one.step:,}{of}"),
        ("size", format_size(one.bytes)),
        (
            "checkpoints",
            f"at {'step' if len(one.steps) == 1 else 'steps'} {shown}{more}: {format_size(one.checkpoint_bytes)}"
            if one.steps
            else "none",
        ),
        ("export", one.export or "none"),
        ("copies", "; ".join(_copies(one)) or "none known: what is removed is gone"),
    ]
    if one.wandb:
        rows.append(("W&B", f"{one.wandb} stays"))
    if one.needed_by:
        rows.append(("needed by", ", ".join(one.needed_by)))
    if links := _links(one.run):
        rows.append(("links", f"{', '.join(links)}: what they point to stays"))
    return formatting.wrap([printable(f"{label:<{_LABEL_WIDTH}}{value}") for label, value in rows], _LABEL_WIDTH)


def _copies(one: RemovableRun) -> list[str]:
    copies = []
    if one.mirror:
        steps = ", ".join(map(str, one.mirrored_steps[-_STEPS_SHOWN:]))
        copies.append(f"the mirror {one.mirror} has " + (f"steps {steps}" if steps else "no complete checkpoint"))
    if one.pushed_to:
        copies.append(f"the Hub has the export: {one.pushed_to}")
    return copies


def _links(run: RunDir) -> list[str]:
    return sorted(path.name for path in run.root.iterdir() if path.is_symlink())


def _remove_run(one: RemovableRun) -> list[str]:
    """Remove a run; returns the files that could not be removed.

    Raises:
        SubmitError: if it was resumed after it was shown, or is being started.
    """
    run, removing = one.run, aside(one.run.root)
    left = remove_tree(removing)
    with ExitStack() as stack:
        stack.enter_context(run_store.start_lock(run))
        if problems := problems_of(one, even_if_needed=True):
            raise SubmitError(problems)
        atomic_files.rename(run.root, removing)
    return left + remove_tree(removing)


def _remove(removable: Sequence[RemovableRun], interrupted: Sequence[Path], names: Sequence[str], root: Path) -> list[str]:
    """Remove runs, leftovers of interrupted removals, and the links by which the runs were named.

    A directory is renamed first, under the lock with which attempts are started. Returns the files that could not be removed.
    """
    links = _own_links(removable, interrupted, names, root)
    left = [path for folder in interrupted for path in remove_tree(folder)]
    for number, one in enumerate(removable):
        try:
            left += _remove_run(one)
        except (LauncherError, OSError):
            if number:
                names_before = ", ".join(before.run.root.name for before in removable[:number])
                print(printable(f"removed before this error: {names_before}"), file=sys.stderr)
            raise
    for path in links:
        if path.is_symlink() and not path.exists():
            path.unlink()
    return left


def _own_links(removable: Sequence[RemovableRun], interrupted: Sequence[Path], names: Sequence[str], root: Path) -> list[Path]:
    """Return the links to remove by which runs were named; another link of that name may lead to unavailable storage."""
    removed = {*(one.run.root for one in removable), *interrupted}
    links = [path for name in names for path in _candidates(name, root) if path.is_symlink()]
    return [path for path in links if not removed.isdisjoint((target := Path(os.path.realpath(path)), aside(target)))]
