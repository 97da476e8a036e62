"""Print a line of progress about every 15 seconds, such as `3:10 elapsed, 61%, about 2:00 left`.

Each test is weighted by its duration in the last run, which pytest's cache stores. Without one, for example on a fresh machine,
it gets its file's mean from durations.json. `python tests/progress.py` writes that file from the last run.
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest

INTERVAL_S = 15.0
CACHE_KEY = "progress/durations"
# Mean seconds per test, by file as in test IDs.
MEANS = Path(__file__).with_name("durations.json")


class Estimate:
    """The share of tests that are done, weighted by their durations in an earlier run.

    A test without a duration gets its file's mean from `means`, or else the mean of all other tests.
    """

    def __init__(self, durations: Mapping[str, float], means: Mapping[str, float] | None = None) -> None:
        self._durations, self._means = durations, means or {}
        self._weights: dict[str, float] = {}
        self._done: set[str] = set()

    def expect(self, tests: Iterable[str]) -> None:
        tests = [*tests]
        expected = {test: self._expected(test) for test in tests}
        known = [seconds for seconds in expected.values() if seconds is not None]
        mean = statistics.fmean(known) if known else 1.0
        # A test with weight 0 would never count as done.
        self._weights = {test: max(mean if seconds is None else seconds, 0.001) for test, seconds in expected.items()}

    def finish(self, test: str) -> None:
        if test in self._weights:
            self._done.add(test)

    def _expected(self, test: str) -> float | None:
        return self._durations.get(test, self._means.get(file_of(test)))

    def line(self, elapsed_s: float) -> str:
        """The line to print after `elapsed_s` seconds."""
        total = sum(self._weights.values())
        done = sum(self._weights[test] for test in self._done)
        share = done / total if total else 0.0
        line = f"{_minutes(elapsed_s)} elapsed, {share:.0%}"
        # With few tests done, their durations say little about the rest.
        return f"{line}, about {_minutes(elapsed_s * (1 - share) / share)} left" if share >= 0.02 else line


def file_of(test: str) -> str:
    """Return the file of a test id."""
    return test.partition("::")[0]


def means_by_file(durations: Mapping[str, float]) -> dict[str, float]:
    """Return the mean seconds of the tests of each file, sorted by file."""
    by_file: dict[str, list[float]] = {}
    for test, seconds in durations.items():
        by_file.setdefault(file_of(test), []).append(seconds)
    return {file: round(statistics.fmean(by_file[file]), 3) for file in sorted(by_file)}


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Progress:
    """The pytest plugin, in the process that prints."""

    def __init__(self, config: pytest.Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        # There is no cache with `-p no:cacheprovider`.
        self._cache: pytest.Cache | None = getattr(config, "cache", None)
        self._before: dict[str, float] = self._cache.get(CACHE_KEY, {}) if self._cache else {}
        self._took: dict[str, float] = {}
        self._estimate = Estimate(self._before, json.loads(MEANS.read_text()))
        self._began = self._printed = clock()
        self._ended = threading.Event()
        self._runs_in_nodes = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self._begin(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        # All nodes collect the same tests.
        if not self._runs_in_nodes:
            self._runs_in_nodes = True
            self._begin(ids)
            # This process runs no tests, so a thread cannot disturb one. It prints even while all nodes run long tests.
            threading.Thread(target=self._print_in_background, daemon=True).start()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._took[report.nodeid] = self._took.get(report.nodeid, 0.0) + report.duration
        if report.when == "teardown":
            self._estimate.finish(report.nodeid)
            if not self._runs_in_nodes:
                self._print_when_due()

    def pytest_sessionfinish(self) -> None:
        self._ended.set()
        if self._cache and self._took:
            self._cache.set(CACHE_KEY, self._before | {test: round(took, 3) for test, took in self._took.items()})

    def _begin(self, tests: Iterable[str]) -> None:
        self._began = self._printed = self._clock()
        self._estimate.expect(tests)

    def _print_in_background(self) -> None:
        while not self._ended.wait(INTERVAL_S / 10):
            self._print_when_due()

    def _print_when_due(self) -> None:
        now = self._clock()
        terminal = self._config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and now - self._printed >= INTERVAL_S:
            self._printed = now
            # pytest's dots are on an unfinished line.
            terminal.write(f"\n{self._estimate.line(now - self._began)}\n")


def register(config: pytest.Config) -> None:
    """Show progress, except in pytest-xdist nodes and when only listing tests."""
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(Progress(config), "progress")


def main() -> None:
    """Write the mean duration per file, from the last run of each test."""
    durations = json.loads(Path(".pytest_cache/v", CACHE_KEY).read_text())
    MEANS.write_text(json.dumps(means_by_file(durations), indent=1) + "\n")


if __name__ == "__main__":
    main()
