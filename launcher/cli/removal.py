"""Shared by commands that remove files: the question beforehand, and a removal that names what it could not remove."""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from pathlib import Path

from launcher import atomic_files
from launcher.errors import SubmitError, printable
from launcher.shell_commands import launcher_command


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of verbs that remove files after a question."""
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--dry-run", action="store_true", help="show what would be removed; remove nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def is_confirmed(arguments: argparse.Namespace, question: str, command: tuple[str, ...]) -> bool:
    """Return whether a command continues, and report if it does not; --yes and --dry-run need no answer.

    `command` are the words of the command.

    Raises:
        SubmitError: if there is no terminal to ask on.
    """
    if arguments.yes or arguments.dry_run:
        return True
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        remedy = f"to remove it without a question: {launcher_command(*command, '--yes')}"
        raise SubmitError("nothing was removed: there is no terminal to ask on", where="command line", remedy=remedy)
    if read_yes(question):
        return True
    print("nothing was removed")
    return False


def read_yes(question: str) -> bool:
    """Ask on the terminal; no answer means no."""
    try:
        return input(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def remove_path(path: Path) -> list[str]:
    """Remove a file, a link or a folder without following links; a folder is renamed first.

    Returns the paths that could not be removed, with the reasons.
    """
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return []
    if not path.name.startswith(atomic_files.REMOVING_PREFIX):
        path = path.rename(path.with_name(f"{atomic_files.REMOVING_PREFIX}{secrets.token_hex(8)}"))
    left: list[str] = []

    def keep(_: object, failed: str, failure: tuple[type[BaseException], BaseException, object]) -> None:
        error = failure[1]
        # The content of a folder that could not be removed is reported itself.
        if (
            isinstance(error, OSError)
            and not isinstance(error, FileNotFoundError)
            and not (os.path.isdir(failed) and os.listdir(failed))
        ):
            left.append(f"{failed}: {error.strerror}")

    shutil.rmtree(path, onerror=keep)
    return left
