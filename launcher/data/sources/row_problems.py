"""Counts problems of rows: one pass over the data reports all unusable rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from launcher.config.sections.data import ChecksSection
from launcher.errors import DataError, Problem

# Reading stops after this many unusable rows.
MAX_COUNTED = 10_000
_NUM_SHOWN, _NUM_PLACES = 50, 3
# The parts that differ between messages of the same mistake: numbers, and text in parentheses.
_LEAVE_OUT = "or skip such rows with data.checks.bad_rows=drop, which counts them"
_OF_ONE_ROW = re.compile(r"\([^()]*\)|\d+")


@dataclass
class _ProblemGroup:
    first: Problem
    places: list[str]
    count: int
    is_row: bool


class RowProblems:
    """Problems grouped by message; each group has its first problem, its first places and its count. Picklable.

    `num_usable` counts the rows without a problem.
    """

    def __init__(self) -> None:
        self.num_usable = 0
        self._groups: dict[tuple[str, bool], _ProblemGroup] = {}

    def __len__(self) -> int:
        return sum(group.count for group in self._groups.values())

    @property
    def is_full(self) -> bool:
        """True if there are so many problems that reading on would reveal nothing new."""
        return len(self) >= MAX_COUNTED

    @property
    def num_rows(self) -> int:
        """The number of unusable rows; an unreadable file has none."""
        return sum(group.count for group in self._groups.values() if group.is_row)

    def add_row(self, error: DataError) -> None:
        """Add the problem of a row."""
        for problem in error.problems:
            self._add(_ProblemGroup(problem, [problem.where], 1, is_row=True))

    def add_file(self, error: DataError) -> None:
        """Add the problem of a file or a source."""
        for problem in error.problems:
            self._add(_ProblemGroup(problem, [problem.where], 1, is_row=False))

    def merge(self, later: RowProblems) -> None:
        """Add the problems and the count of later rows."""
        self.num_usable += later.num_usable
        for group in later._groups.values():
            self._add(group)

    def refused(self, checks: ChecksSection) -> RowProblems:
        """Return the problems that refuse a run: all, or only those of files if the settings leave out bad rows."""
        if checks.bad_rows == "fail":
            return self
        refused = RowProblems()
        refused.num_usable = self.num_usable
        refused._groups = {key: group for key, group in self._groups.items() if not group.is_row}
        return refused

    def examples(self) -> list[tuple[str, str]]:
        """Return places of unusable rows and the problem there; the first of each kind come first."""
        rows = [group for group in self._groups.values() if group.is_row]
        later = [(place, group.first.message) for group in rows for place in group.places[1:]]
        return [(group.first.where, group.first.message) for group in rows] + later

    def to_list(self) -> list[Problem]:
        """Return one problem per group, with its first places and its number of rows."""
        groups = list(self._groups.values())
        shown = [_describe(group) for group in groups[:_NUM_SHOWN]]
        if self.num_usable and (rows := [i for i, group in enumerate(groups[:_NUM_SHOWN]) if group.is_row]):
            last = shown[rows[-1]]
            shown[rows[-1]] = replace(last, remedy=f"{last.remedy}; {_LEAVE_OUT}" if last.remedy else _LEAVE_OUT)
        if self.is_full:
            stopped = f"reading stopped after {len(self):,} rows that cannot be used, so there may be more"
            shown[-1] = replace(shown[-1], message=f"{shown[-1].message}; {stopped}")
        return shown

    def _add(self, group: _ProblemGroup) -> None:
        key = (_OF_ONE_ROW.sub("", group.first.message), group.is_row)
        known = self._groups.setdefault(key, _ProblemGroup(group.first, [], 0, group.is_row))
        known.places = (known.places + group.places)[:_NUM_PLACES]
        known.count += group.count


def _describe(group: _ProblemGroup) -> Problem:
    if group.count == 1:
        return group.first
    more = group.count - len(group.places)
    where = "; ".join(group.places) + (f" and {more:,} more" if more else "")
    return replace(group.first, message=f"{group.first.message} ({group.count:,} times)", where=where)
