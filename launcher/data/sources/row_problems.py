"""Counts problems of rows: one pass over the data reports all unusable rows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from launcher.config.sections.data import ChecksSection
from launcher.errors import DataError, Problem

# Reading stops after this many unusable rows.
MAX_COUNTED = 10_000
_NUM_SHOWN, _NUM_PLACES = 50, 3
_LEAVE_OUT = "or skip such rows with data.checks.bad_rows=drop, which counts them"
# The parts that differ between messages of the same mistake: numbers, and text in parentheses.
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

    def add_row(self, error: DataError, is_row: bool = True) -> None:
        """Add the problem of a row."""
        for problem in error.problems:
            self._add(_ProblemGroup(problem, [problem.where], 1, is_row))

    def add_file(self, error: DataError) -> None:
        """Add the problem of a file or a source."""
        self.add_row(error, is_row=False)

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
        shown: list[Problem] = []
        last_row: int | None = None
        for i, group in enumerate([*self._groups.values()][:_NUM_SHOWN]):
            problem, more = group.first, group.count - len(group.places)
            if group.count > 1:
                where = "; ".join(group.places) + (f" and {more:,} more" if more else "")
                problem = replace(problem, message=f"{problem.message} ({group.count:,} times)", where=where)
            shown.append(problem)
            last_row = i if group.is_row else last_row
        if self.num_usable and last_row is not None:
            remedies = filter(None, (shown[last_row].remedy, _LEAVE_OUT))
            shown[last_row] = replace(shown[last_row], remedy="; ".join(remedies))
        if self.is_full:
            stopped = f"reading stopped after {len(self):,} rows that cannot be used, so there may be more"
            shown[-1] = replace(shown[-1], message=f"{shown[-1].message}; {stopped}")
        return shown

    def _add(self, group: _ProblemGroup) -> None:
        key = (_OF_ONE_ROW.sub("", group.first.message), group.is_row)
        known = self._groups.setdefault(key, _ProblemGroup(group.first, [], 0, group.is_row))
        known.places = (known.places + group.places)[:_NUM_PLACES]
        known.count += group.count
