"""Every error a user can meet, each with one exit code.

An error is a block of plain words: what is wrong, where it stands, the value that was given, and the
remedy. A value that may be a secret never becomes part of a problem.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 130


# What moves the cursor, colours or hides text on a terminal, or cannot be printed: controls but for tab and line feed,
# marks of writing direction, halves of surrogate pairs. File names and rows of data may hold them.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with escape sequences in place of what a terminal would act upon, or could not print."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True)
class Problem:
    """One mistake: `where` is a key, a file:line or the command line; `value` is as the user wrote it.

    As text, what a terminal would not print stands as its escape sequence.
    """

    what: str
    where: str = ""
    value: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if self.value:
            lines.append(f"  value:  {self.value}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return printable("\n".join(lines))


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """Return `did you mean X?` for a mistyped word, or an empty text.

    For a dotted key the neighbours in its section come first, then the same last part in another section.
    """
    section, _, leaf = word.rpartition(".")
    neighbours = {option.rpartition(".")[2]: option for option in options if option.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(leaf, neighbours, n=1, cutoff=0.7):
        return f"did you mean {neighbours[close[0]]}?"
    # An item of a list is not what a key on the command line can name.
    same = [option for option in options if option.rpartition(".")[2] == leaf and "[]" not in option][:3]
    # `train` is close to `train.x` and no help to anyone who wrote that.
    distant = difflib.get_close_matches(word, [o for o in options if not word.startswith(f"{o}.")], n=1, cutoff=0.75)
    found = same or distant
    return f"did you mean {' or '.join(found)}?" if found else ""


class LauncherError(Exception):
    """The root of the hierarchy; carries one or more problems."""

    exit_code = EXIT_FAILED

    def __init__(self, problem: Problem | str | Iterable[Problem], **parts: str) -> None:
        if isinstance(problem, str):
            problem = Problem(problem, **parts)
        self.problems: tuple[Problem, ...] = (problem,) if isinstance(problem, Problem) else tuple(problem)
        super().__init__("\n".join(str(p) for p in self.problems))


class ConfigError(LauncherError):
    """The settings are wrong; nothing was started."""

    exit_code = EXIT_REFUSED


class DataError(LauncherError):
    """A data file, a template or a mask is wrong; no GPU was asked for."""

    exit_code = EXIT_REFUSED


class SubmitError(LauncherError):
    """The backend cannot take this run, or no such run exists."""

    exit_code = EXIT_REFUSED


class CheckpointError(LauncherError):
    """A checkpoint is missing, damaged, or does not belong to this plan."""


class DamagedCheckpoint(CheckpointError):
    """What was committed is on disk no longer as it was, and there is nothing else to go on from without asking a person."""


class UnreadableCheckpoint(CheckpointError):
    """What storage does not give out at present: that says nothing about what lies there, so nothing follows from it."""


class RunError(LauncherError):
    """A started run failed."""


class Superseded(RunError):
    """The process belongs to an attempt that is no longer the run's newest."""


class DivergedError(RunError):
    """The numbers of the training itself are not finite; a repetition would end in the same way."""


class ExportError(RunError):
    """Training is complete and saved, and its Hugging Face folder could not be made."""


class PushError(LauncherError):
    """An exported folder is complete on this machine, and the Hub did not take it."""


def describe(error: Exception) -> str:
    """Describe any error in one message: the first problem of a launcher error, or else the exception's type and text."""
    return error.problems[0].what if isinstance(error, LauncherError) else f"{type(error).__name__}: {error}"


# A repetition would end in the same way: neither ranks nor a job are started again after one of these.
WOULD_REPEAT = (ConfigError, DataError, DamagedCheckpoint, Superseded, DivergedError, ExportError)
