"""A command on every node: Ctrl-C during its cleanup, and the nodes' reports, parsed from lines and compared."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from launcher.clusters.check_results import (
    FAILURE,
    OK,
    WARNING,
    CheckResult,
    MachineReport,
    ReportReader,
    to_lines,
    with_differences,
    worst,
)
from launcher.clusters.node_command import uninterrupted


@pytest.fixture
def another_thread() -> Iterator[None]:
    """A second thread that the kernel may deliver a signal to, like the threads that read a command's output."""
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
def test_signals_take_effect_after_the_cleaning_up() -> None:
    cleaned: list[int] = []

    def clean() -> None:
        with uninterrupted():
            for number in range(2):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
                cleaned.append(number)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        clean()
    assert cleaned == [0, 1]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_cleaning_up_in_another_thread_is_carried_out() -> None:
    cleaned = []

    def clean() -> None:
        with uninterrupted():
            cleaned.append(1)

    thread = threading.Thread(target=clean)
    thread.start()
    thread.join()
    assert cleaned == [1]


def report(machine: str, *results: CheckResult) -> MachineReport:
    return MachineReport(machine, results)


def test_reports_are_read_from_mixed_lines_of_several_machines() -> None:
    """Slurm breaks long lines, and mixes the lines of its tasks in the order they arrive."""
    sent = [report(name, CheckResult("limits", WARNING, "wenig: ü " * 300, "fix it")) for name in ("n1", "n2")]
    lines = [line for each in sent for line in to_lines(each)]
    assert len(lines) > 6
    assert max(map(len, lines)) < 1000
    random.Random(1).shuffle(lines)
    reader = ReportReader()
    for line in ["salloc: Granted job allocation 7", "", *(f"{line}\n" for line in lines)]:
        reader.feed(line)
    assert sorted(reader.reports.values(), key=lambda each: each.machine) == sent


def test_a_report_that_is_cut_off_does_not_count() -> None:
    reader = ReportReader()
    damaged = ['launcher-doctor n2 1/1 {"machine": "n2", "results"', 'launcher-doctor n3 1/1 {"machine": "n3", "results": 7}']
    for line in (*to_lines(report("n1", CheckResult("limits", OK, "x" * 2000)))[:-1], *damaged):
        reader.feed(line)
    assert reader.reports == {}


def test_a_node_that_differs_from_most_others_fails() -> None:
    def packages(version: str) -> CheckResult:
        return CheckResult("packages", OK, f"launcher 1, torch {version}", must_match=True)

    bandwidth = [CheckResult("all-reduce", OK, f"{number} GB/s") for number in (1, 2, 3)]
    reports = [report("n1", packages("2.8"), bandwidth[0]), report("n2", packages("2.9"), bandwidth[1])]
    reports.append(report("n3", packages("2.9"), bandwidth[2]))
    first, *others = with_differences(reports)
    assert [(problem.where, problem.message) for problem in first.problems] == [
        ("n1", "nodes differ in packages: torch 2.8; most nodes: torch 2.9")
    ]
    assert [each.results for each in others] == [each.results for each in reports[1:]]


def test_the_worst_verdict_is_that_of_all() -> None:
    results = [CheckResult("a", verdict, "") for verdict in (OK, WARNING, FAILURE)]
    assert [worst(results[:count]) for count in range(4)] == [OK, OK, WARNING, FAILURE]
