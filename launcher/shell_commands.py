"""Commands and paths that are printed for the user to copy."""

from __future__ import annotations

import shlex
from pathlib import Path


def launcher_command(*words: str | Path) -> str:
    """Return `python -m launcher WORDS` as typed in a shell: paths with spaces and other special characters are quoted."""
    return module_command("launcher", *words)


def module_command(module: str, *words: str | Path) -> str:
    """Return `python -m MODULE WORDS` as typed in a shell."""
    return shell_command("python", "-m", module, *words)


def shell_command(*words: str | Path) -> str:
    """Return a command as typed in a shell."""
    return shlex.join(map(str, words))


def short_path(path: str | Path) -> str:
    """Return a path relative to the working directory if that exists and contains the path; commands take it for no flag."""
    try:
        text = str(Path(path).relative_to(Path.cwd()))
    except (ValueError, FileNotFoundError):
        return str(path)
    return f"./{text}" if text.startswith("-") else text
