"""The findings of checks: the result of one, a machine's report, and the lines in which `doctor` receives reports."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from launcher.errors import DamagedRun, Problem
from launcher.runs import json_records

OK, WARNING, FAILURE = "ok", "warning", "failure"
# Worst first.
VERDICTS = (FAILURE, WARNING, OK)

# This module runs the checks on one machine and prints the report.
NODE_MODULE = "launcher.worker.checks.node_check"
# The file that the submitting machine wrote beside the runs, as PATH=CONTENT: machines that can read it see the same storage.
SHARED_FILE_VARIABLE = "LAUNCHER_DOCTOR_FILE"
# Failures with this beginning concern the disk that all nodes share, whichever node reports them.
NO_ROOM = "the disk of the run directory has no room"

# Slurm truncates task output lines after 1,024 characters.
_CHUNK_CHARS = 600
_LINE = re.compile(r"launcher-doctor (\S+) (\d+)/(\d+) (.*)")


@dataclass(frozen=True)
class CheckResult:
    """The result of one check. Warnings and failures have a remedy: a command or a setting.

    With `must_match`, all nodes of a run must show the same text in `seen`. `machine` is the one that is to blame, if that is not
    the one that reports.
    """

    name: str
    verdict: str
    seen: str
    remedy: str = ""
    must_match: bool = False
    machine: str = ""


@dataclass(frozen=True)
class MachineReport:
    """One machine's results."""

    machine: str
    results: tuple[CheckResult, ...] = ()

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The failures, each with the machine in `where`."""
        failures = (result for result in self.results if result.verdict == FAILURE)
        return tuple(Problem(result.seen, where=result.machine or self.machine, remedy=result.remedy) for result in failures)


def ok(seen: str, *, must_match: bool = False) -> CheckResult:
    """Return a result without a name; the table of checks adds it."""
    return CheckResult("", OK, seen, must_match=must_match)


def warning(seen: str, remedy: str) -> CheckResult:
    """Return a warning without a name."""
    return CheckResult("", WARNING, seen, remedy)


def failure(seen: str, remedy: str) -> CheckResult:
    """Return a failure without a name."""
    return CheckResult("", FAILURE, seen, remedy)


def from_problem(problem: Problem, name: str) -> CheckResult:
    """Convert a problem that another check found, with its message and remedy, to a failure."""
    where = f" ({problem.where})" if problem.where and problem.where not in problem.value else ""
    value = f": {problem.value}" if problem.value else ""
    return CheckResult(name, FAILURE, f"{problem.message}{where}{value}", problem.remedy)


def worst(results: Iterable[CheckResult]) -> str:
    """Return the worst verdict, ok for no results."""
    return min((result.verdict for result in results), key=VERDICTS.index, default=OK)


def to_lines(report: MachineReport) -> list[str]:
    """Return the lines that a machine prints; `ReportReader` finds them in other output, in any order."""
    text = json.dumps(json_records.encode(report))
    chunks = [text[start : start + _CHUNK_CHARS] for start in range(0, len(text), _CHUNK_CHARS)]
    machine = re.sub(r"\s", "_", report.machine)
    return [f"launcher-doctor {machine} {i}/{len(chunks)} {chunk}" for i, chunk in enumerate(chunks, 1)]


class ReportReader:
    """Assembles reports, keyed by machine, from the lines of one or several machines."""

    def __init__(self) -> None:
        self.reports: dict[str, MachineReport] = {}
        self._chunks: dict[str, dict[int, str]] = {}

    def feed(self, line: str) -> None:
        """Add this line's part of a report; ignores other lines, and those of a complete report."""
        match = _LINE.search(line.rstrip("\n"))
        if match is None or match[1] in self.reports:
            return
        machine, chunks = match[1], self._chunks.setdefault(match[1], {})
        chunks[int(match[2])] = match[4]
        if len(chunks) == int(match[3]):
            text = "".join(chunk for _, chunk in sorted(chunks.items()))
            # A machine with a damaged report counts as not having reported.
            with suppress(ValueError, DamagedRun):
                self.reports[machine] = json_records.decode(MachineReport, json.loads(text), f"the report of {machine}")


def with_differences(reports: Sequence[MachineReport]) -> list[MachineReport]:
    """Return the reports with failures for what differs from most nodes; if no value is the most common, the first counts."""
    texts: dict[str, Counter[str]] = {}
    for result in (result for report in reports for result in report.results if result.must_match):
        texts.setdefault(result.name, Counter())[result.seen] += 1
    usual = {name: counter.most_common(1)[0][0] for name, counter in texts.items()}
    remedy = "use nodes of one kind, and start all of them from one environment or container on shared storage"
    compared = []
    for report in reports:
        results = []
        for result in report.results:
            if result.must_match and result.seen != usual[result.name]:
                # Show only the parts between commas that differ.
                own, others = result.seen.split(", "), usual[result.name].split(", ")
                here = ", ".join(part for part in own if part not in others) or "none"
                there = ", ".join(part for part in others if part not in own) or "none"
                seen = f"nodes differ in {result.name}: {here}; most nodes: {there}"
                result = CheckResult(result.name, FAILURE, seen, remedy)
            results.append(result)
        compared.append(MachineReport(report.machine, tuple(results)))
    return compared
