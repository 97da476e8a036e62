"""The question that a command asks before it removes something."""

from __future__ import annotations

import sys

from launcher.errors import SubmitError, printable
from launcher.shell_commands import launcher_command


def confirm(question: str, command: tuple[str, ...]) -> bool:
    """Ask on the terminal; only `y` and `yes` mean yes.

    `command` are the words of the command that does the same without asking.

    Raises:
        SubmitError: where there is no terminal to ask on.
    """
    if not sys.stdin.isatty() or not sys.stdout.isatty():
        remedy = f"to remove it without a question: {launcher_command(*command)}"
        raise SubmitError("nothing was removed: there is no terminal to ask on", where="command line", remedy=remedy)
    try:
        return input(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
