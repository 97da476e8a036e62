"""A line of progress about every 15 seconds, such as `3:10 elapsed, 61%, about 2:00 left`.

Each test weighs what it took in the last run, which pytest's cache directory keeps.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping

import pytest

INTERVAL_S = 15.0
CACHE_KEY = "progress/durations"


class Estimate:
    """How much of the tests is done, weighed by their durations in an earlier run. Unknown ones weigh the mean of the others."""

    def __init__(self, durations: Mapping[str, float]) -> None:
        self._durations = durations
        self._weights: dict[str, float] = {}
        self._done: set[str] = set()

    def expect(self, tests: Iterable[str]) -> None:
        tests = [*tests]
        known = [self._durations[test] for test in tests if test in self._durations]
        mean = statistics.fmean(known) if known else 1.0
        # What weighs nothing would never count as done.
        self._weights = {test: max(self._durations.get(test, mean), 0.001) for test in tests}

    def finish(self, test: str) -> None:
        if test in self._weights:
            self._done.add(test)

    def line(self, elapsed_s: float) -> str:
        """The line to print after `elapsed_s` seconds."""
        total = sum(self._weights.values())
        done = sum(self._weights[test] for test in self._done)
        share = done / total if total else 0.0
        line = f"{_minutes(elapsed_s)} elapsed, {share:.0%}"
        # The first tests without known durations say little about the rest.
        return f"{line}, about {_minutes(elapsed_s * (1 - share) / share)} left" if share >= 0.02 else line


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


class Progress:
    """The plugin, in the process that prints."""

    def __init__(self, config: pytest.Config, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        # Absent with `-p no:cacheprovider`.
        self._cache: pytest.Cache | None = getattr(config, "cache", None)
        self._before: dict[str, float] = self._cache.get(CACHE_KEY, {}) if self._cache else {}
        self._took: dict[str, float] = {}
        self._estimate = Estimate(self._before)
        self._began = self._printed = clock()
        self._ended = threading.Event()
        self._runs_in_nodes = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self._begin(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        # Every node has collected the same tests.
        if not self._runs_in_nodes:
            self._runs_in_nodes = True
            self._begin(ids)
            # No test runs in this process, so that a thread harms none: it prints while all nodes have long tests.
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
            # The dots of the tests stand in a line without an end.
            terminal.write(f"\n{self._estimate.line(now - self._began)}\n")


def register(config: pytest.Config) -> None:
    """Show progress, unless this process is one of pytest-xdist's nodes or only lists the tests."""
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        config.pluginmanager.register(Progress(config), "progress")
