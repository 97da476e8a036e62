"""The errors that a user can meet, each with one exit code.

An error has four parts: what is wrong, where, the value, and the remedy. A value that may be a secret is never included.
"""

from __future__ import annotations

import difflib
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXIT_FAILED = 1
EXIT_REFUSED = 2
EXIT_CHECK_FAILED = 3
EXIT_INTERRUPTED = 130
# Of the process that leads an attempt, by the state in which it ends; others have failed.
EXIT_CODES = {"completed": 0, "cancelled": EXIT_INTERRUPTED, "preempted": EXIT_INTERRUPTED}


# Characters that move the cursor, color or hide text on a terminal, or cannot be printed: controls except tab and line feed,
# writing direction marks, and lone surrogates. File names and data rows may contain them.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return the text with escapes for characters that a terminal would interpret or could not print."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


@dataclass(frozen=True)
class Problem:
    """One mistake: `where` is a key, a file:line or the command line; `value` is as the user wrote it."""

    message: str
    where: str = ""
    value: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        parts = {"where:  ": self.where, "value:  ": self.value, "remedy: ": self.remedy}
        return printable("\n".join([self.message, *(f"  {label}{text}" for label, text in parts.items() if text)]))


def did_you_mean(word: str, options: Sequence[str]) -> str:
    """Return `did you mean X?` for a mistyped word, or an empty string.

    For a dotted key, names in the same section come first, then the same name in other sections.
    """
    section, _, leaf = word.rpartition(".")
    neighbors = {option.rpartition(".")[2]: option for option in options if option.rpartition(".")[0] == section}
    if close := difflib.get_close_matches(leaf, neighbors, n=1, cutoff=0.7):
        return f"did you mean {neighbors[close[0]]}?"
    # A key on the command line cannot address a list item.
    same = [option for option in options if option.rpartition(".")[2] == leaf and "[]" not in option][:3]
    # `train` is close to `train.x`, but does not help.
    distant = difflib.get_close_matches(word, [o for o in options if not word.startswith(f"{o}.")], n=1, cutoff=0.75)
    candidates = same or distant
    return f"did you mean {' or '.join(candidates)}?" if candidates else ""


class LauncherError(Exception):
    """The base class; carries one or more problems. A text and its `parts` make one, as in Problem."""

    exit_code = EXIT_FAILED

    def __init__(self, problem: Problem | str | Iterable[Problem], *parts: str, **named_parts: str) -> None:
        if isinstance(problem, str):
            problem = Problem(problem, *parts, **named_parts)
        self.problems: tuple[Problem, ...] = (problem,) if isinstance(problem, Problem) else tuple(problem)
        super().__init__("\n".join(str(p) for p in self.problems))

    def to_report(self) -> dict[str, Any]:
        """Return the problems and the exit code as JSON values, for the process that reads this one's output."""
        return {"problems": [[p.message, p.where, p.value, p.remedy] for p in self.problems], "exit_code": self.exit_code}


class ConfigError(LauncherError):
    """The settings are wrong; nothing was started."""

    exit_code = EXIT_REFUSED


class DataError(LauncherError):
    """A data file, a template or a loss mask is wrong; no GPU was requested."""

    exit_code = EXIT_REFUSED


class SubmitError(LauncherError):
    """The backend cannot accept this run, or no such run exists."""

    exit_code = EXIT_REFUSED


class CheckpointError(LauncherError):
    """A checkpoint is missing or damaged, or does not fit the run."""


class DamagedCheckpoint(CheckpointError):
    """A committed checkpoint is damaged, and no other can be used without a user's decision."""


class UnreadableCheckpoint(CheckpointError):
    """A checkpoint cannot be read right now. It may be intact, so nothing is deleted or skipped."""


class RunError(LauncherError):
    """A started run failed."""


class DamagedRun(RunError):
    """A file of a run is missing or damaged, so a command on this run starts nothing."""

    exit_code = EXIT_REFUSED


class UnreadableRun(DamagedRun):
    """A file of a run cannot be read right now. It may be intact, so nothing takes its place."""


class Superseded(RunError):
    """The process belongs to an attempt that is no longer the run's newest."""


class DivergedError(RunError):
    """Loss or gradients are not finite; another attempt would end in the same way."""


class OutOfMemory(RunError):
    """A GPU ran out of memory before any step was completed; another attempt would end in the same way."""


class ProofError(RunError):
    """The first step of an attempt is not what its references say; another attempt would end in the same way."""


class ExportError(RunError):
    """Training is complete and saved, but its Hugging Face folder could not be written."""


class PushError(LauncherError):
    """The exported folder is complete on this machine, but the Hub did not accept it."""


def causes(error: BaseException, with_suppressed: bool = True) -> Iterator[BaseException]:
    """Yield an error and the chain of its causes; `with_suppressed` includes those that `raise ... from None` hides.

    Each is yielded once: an error that is raised again from what happened while it was handled is its own cause.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (cause.__context__ if with_suppressed or not cause.__suppress_context__ else None)


def raise_reported(report: Mapping[str, Any]) -> None:
    """Raise the problems, if any, that another process reported with `LauncherError.to_report`.

    Raises:
        DataError: if nothing was started because of them.
        RunError: otherwise.
    """
    if "problems" in report:
        kind = DataError if report["exit_code"] == EXIT_REFUSED else RunError
        raise kind([Problem(*parts) for parts in report["problems"]])


def describe_exit(code: int) -> str:
    """Return how a process ended, by an exit code as in subprocess: `ended with exit code 1`, `was killed by SIGKILL`."""
    if code >= 0:
        return f"ended with exit code {code}"
    # Most real-time signals have no name.
    return f"was killed by {signal.Signals(-code).name if -code in set(signal.Signals) else f'signal {-code}'}"


def describe(error: BaseException) -> str:
    """Describe any error in one message: the first problem of a launcher error, or else the exception's type and text."""
    return error.problems[0].message if isinstance(error, LauncherError) else f"{type(error).__name__}: {error}"


# Another attempt would end the same way, so neither ranks nor jobs are restarted after one of these.
WOULD_REPEAT = (ConfigError, DataError, DamagedCheckpoint, Superseded, DivergedError, OutOfMemory, ProofError, ExportError)
