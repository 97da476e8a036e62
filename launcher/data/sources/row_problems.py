"""Problems of rows, counted: one pass over the data reports all rows that cannot be used."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from launcher.errors import DataError, Problem

# Reading stops after so many rows that cannot be used.
MAX_COUNTED = 10_000
_NUM_SHOWN, _NUM_PLACES = 20, 3
# What differs between the messages of one mistake: numbers, and what stands in parentheses.
_OF_ONE_ROW = re.compile(r"\([^()]*\)|\d+")


@dataclass
class _ProblemGroup:
    first: Problem
    places: list[str]
    count: int


class RowProblems:
    """Problems grouped by their message; each group has its first problem, its first places and its count. Picklable."""

    def __init__(self) -> None:
        self._groups: dict[str, _ProblemGroup] = {}

    def __len__(self) -> int:
        return sum(group.count for group in self._groups.values())

    @property
    def is_full(self) -> bool:
        """True if there are so many that reading on tells nothing more."""
        return len(self) >= MAX_COUNTED

    def add(self, error: DataError) -> None:
        """Add the problems of a row or a file."""
        for problem in error.problems:
            self._add(_ProblemGroup(problem, [problem.where], 1))

    def merge(self, later: RowProblems) -> None:
        """Add the problems of later rows."""
        for group in later._groups.values():
            self._add(group)

    def to_list(self) -> list[Problem]:
        """Return a problem for each group, with its first places and its number of rows."""
        groups = list(self._groups.values())
        shown = [_describe(group) for group in groups[:_NUM_SHOWN]]
        if others := groups[_NUM_SHOWN:]:
            message = f"{sum(group.count for group in others):,} further rows cannot be used, for other reasons"
            shown.append(Problem(message, others[0].first.where, remedy="repair the rows above, and run the command again"))
        if self.is_full:
            stopped = f"reading stopped after {len(self):,} rows that cannot be used, so there may be more"
            shown[-1] = replace(shown[-1], message=f"{shown[-1].message}; {stopped}")
        return shown

    def _add(self, group: _ProblemGroup) -> None:
        known = self._groups.setdefault(_OF_ONE_ROW.sub("", group.first.message), _ProblemGroup(group.first, [], 0))
        known.places = (known.places + group.places)[:_NUM_PLACES]
        known.count += group.count


def _describe(group: _ProblemGroup) -> Problem:
    if group.count == 1:
        return group.first
    more = group.count - len(group.places)
    where = "; ".join(group.places) + (f" and {more:,} more" if more else "")
    return replace(group.first, message=f"{group.first.message} ({group.count:,} times)", where=where)
