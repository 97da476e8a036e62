"""The findings of `launcher doctor`: the result of a check, the report of a machine, and the lines in which it is sent."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher import json_records
from launcher.errors import DamagedRun, Problem

OK, WARNING, FAILURE = "ok", "warning", "failure"
# Worst first.
VERDICTS = (FAILURE, WARNING, OK)

# This module runs the checks on one machine and prints the report.
NODE_MODULE = "launcher.worker.doctor.node"
# The file that the submitting machine wrote beside the runs, as PATH=CONTENT: machines that can read it see the same storage.
SHARED_FILE_VARIABLE = "LAUNCHER_DOCTOR_FILE"

# Slurm truncates task output lines after 1,024 characters.
_CHUNK_CHARS = 600
_LINE = re.compile(r"launcher-doctor (\S+) (\d+)/(\d+) (.*)")
# NTP keeps clocks within milliseconds, so files that a node wrote are older than the command that looks at them.
_CLOCK_WARNING_S = 5.0


@dataclass(frozen=True)
class CheckResult:
    """The result of one check. Warnings and failures have a remedy: a command or a setting.

    With `must_match`, all nodes of a run must show the same text in `seen`.
    """

    name: str
    verdict: str
    seen: str
    remedy: str = ""
    must_match: bool = False


@dataclass(frozen=True)
class MachineReport:
    """One machine's results; `clock` is its time, in seconds since the epoch, when it sent them."""

    machine: str
    results: tuple[CheckResult, ...]
    clock: float

    @property
    def verdict(self) -> str:
        """The worst verdict of its results."""
        return worst(self.results)


def ok(seen: str, *, must_match: bool = False) -> CheckResult:
    """Return a result without a name; the table of checks adds it."""
    return CheckResult("", OK, seen, must_match=must_match)


def warning(seen: str, remedy: str, *, must_match: bool = False) -> CheckResult:
    """Return a warning without a name."""
    return CheckResult("", WARNING, seen, remedy, must_match)


def failure(seen: str, remedy: str) -> CheckResult:
    """Return a failure without a name."""
    return CheckResult("", FAILURE, seen, remedy)


def from_problem(problem: Problem, verdict: str = FAILURE, name: str = "") -> CheckResult:
    """Convert a problem that another check found, with its message and remedy, to a result."""
    where = f" ({problem.where})" if problem.where and problem.where not in problem.value else ""
    value = f": {problem.value}" if problem.value else ""
    return CheckResult(name, verdict, f"{problem.message}{where}{value}", problem.remedy)


def worst(results: Iterable[CheckResult]) -> str:
    """Return the worst verdict, ok for no results."""
    verdicts = {result.verdict for result in results}
    return next((verdict for verdict in VERDICTS if verdict in verdicts), OK)


def to_lines(report: MachineReport) -> list[str]:
    """Return the lines that a machine prints; `ReportReader` finds them in other output, in any order."""
    text = json.dumps(json_records.encode(report))
    chunks = [text[start : start + _CHUNK_CHARS] for start in range(0, len(text), _CHUNK_CHARS)]
    machine = re.sub(r"\s", "_", report.machine)
    return [f"launcher-doctor {machine} {i}/{len(chunks)} {chunk}" for i, chunk in enumerate(chunks, 1)]


class ReportReader:
    """Assembles reports from the lines of one or several machines.

    Attributes:
        reports: by machine, in the order of arrival.
        clock_offsets: seconds by which each machine's clock was ahead of this one's when its report arrived; transfer time makes
        a clock look behind.
    """

    def __init__(self) -> None:
        self.reports: dict[str, MachineReport] = {}
        self.clock_offsets: dict[str, float] = {}
        self._chunks: dict[str, dict[int, str]] = {}

    def feed(self, line: str) -> None:
        """Add this line's part of a report; ignores other lines and lines of a complete report."""
        match = _LINE.search(line.rstrip("\n"))
        if match is None or match[1] in self.reports:
            return
        machine, index, count = match[1], int(match[2]), int(match[3])
        chunks = self._chunks.setdefault(machine, {})
        chunks[index] = match[4]
        if len(chunks) < count:
            return
        text = "".join(chunk for _, chunk in sorted(chunks.items()))
        try:
            report = json_records.decode(MachineReport, json.loads(text), f"the report of {machine}")
        except (ValueError, DamagedRun):
            # The node counts as not having reported.
            return
        self.clock_offsets[machine] = report.clock - time.time()
        self.reports[machine] = report


def with_differences(reports: Sequence[MachineReport], clock_offsets: Mapping[str, float]) -> list[MachineReport]:
    """Return the reports, with failures added for what differs from most nodes and warnings for clocks that are off."""
    usual = {
        name: Counter(result.seen for report in reports for result in report.results if _matches(result, name)).most_common(1)
        for name in dict.fromkeys(result.name for report in reports for result in report.results if result.must_match)
    }
    return [
        replace(report, results=(*_compared(report, usual), *_clock_results(report.machine, clock_offsets))) for report in reports
    ]


def _matches(result: CheckResult, name: str) -> bool:
    return result.must_match and result.name == name


def _compared(report: MachineReport, usual: Mapping[str, list[tuple[str, int]]]) -> Iterator[CheckResult]:
    for result in report.results:
        most_common = usual.get(result.name) if result.must_match else None
        if most_common and result.seen != most_common[0][0]:
            seen = f"{result.seen}; most nodes: {most_common[0][0]}"
            remedy = "use nodes of one kind, and start all of them from one environment or container on shared storage"
            yield CheckResult(result.name, FAILURE, seen, remedy)
        else:
            yield result


def _clock_results(machine: str, clock_offsets: Mapping[str, float]) -> Iterator[CheckResult]:
    # Reports arrive one after the other within seconds: an offset that all share comes from the transfer, not from the clocks.
    offset = clock_offsets.get(machine)
    if offset is None or len(clock_offsets) < 2:
        return
    if abs(offset) < _CLOCK_WARNING_S:
        yield CheckResult("clock", OK, f"within {_CLOCK_WARNING_S:g} s of this machine's")
    else:
        seen = f"{abs(offset):.0f} s {'ahead of' if offset > 0 else 'behind'} this machine's"
        remedy = "start time synchronization on the node: systemctl enable --now chronyd (or systemd-timesyncd)"
        yield CheckResult("clock", WARNING, seen, remedy)
