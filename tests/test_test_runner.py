"""What runs the tests: lines of progress, reruns of failed tests by .ci/run_tests, and tests that need a missing program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import testbed_config
from forked import require_exit
from missing_program import show
from progress import Estimate, means_by_file

PLUGIN = """
import progress
progress.INTERVAL_S = 0.3
pytest_configure = progress.register
"""
TESTS = """
import time
import pytest

@pytest.mark.parametrize("seconds", [0.4, 0.1, 0.5])
def test_waits(seconds):
    time.sleep(seconds)
"""
REPO = Path(__file__).resolve().parents[1]
MAKEFILE = """
test:
\t{python} -m pytest -q -c /dev/null --rootdir . test_it.py $(ARGS)
"""


@pytest.mark.rest
def test_the_remaining_time_follows_from_the_last_durations() -> None:
    estimate = Estimate({"long": 90.0, "short": 10.0, "gone": 500.0})
    estimate.expect(["short", "long"])
    assert estimate.line(0.0) == "0:00 elapsed, 0%"
    estimate.finish("short")
    assert estimate.line(20.0) == "0:20 elapsed, 10%, about 3:00 left"
    estimate.finish("long")
    assert estimate.line(190.4) == "3:10 elapsed, 100%, about 0:00 left"


@pytest.mark.rest
def test_an_unknown_test_has_the_mean_duration_and_without_durations_tests_are_counted() -> None:
    estimate = Estimate({"a": 10.0, "b": 30.0})
    estimate.expect(["a", "b", "other"])
    estimate.finish("other")
    estimate.finish("unexpected")
    assert estimate.line(60.0) == "1:00 elapsed, 33%, about 2:00 left"
    counted = Estimate({})
    counted.expect(map(str, range(4)))
    counted.finish("0")
    assert counted.line(5.0) == "0:05 elapsed, 25%, about 0:15 left"


@pytest.mark.rest
def test_on_a_fresh_machine_a_test_has_the_mean_duration_of_its_file() -> None:
    means = means_by_file({"b.py::long[1]": 50.0, "b.py::long[2]": 70.0, "a.py::short": 20.0})
    assert means == {"a.py": 20.0, "b.py": 60.0}
    estimate = Estimate({"a.py::short": 10.0}, means)
    # 10 s from the last run, 60 s from the file, 35 s as the mean of both.
    estimate.expect(["a.py::short", "b.py::other", "c.py::unknown"])
    estimate.finish("b.py::other")
    assert estimate.line(60.0) == "1:00 elapsed, 57%, about 0:45 left"


@pytest.mark.rest
@pytest.mark.parametrize("nodes", [[], ["-n", "1"]], ids=["in-one-process", "xdist"])
def test_progress_lines_are_printed_and_durations_stored(tmp_path: Path, nodes: list[str]) -> None:
    (tmp_path / "conftest.py").write_text(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{PLUGIN}")
    (tmp_path / "test_it.py").write_text(TESTS)
    # Use a separate base folder: otherwise pytest removes those of earlier sessions when it ends, which may take minutes.
    folders = ["--rootdir", str(tmp_path), "--basetemp", str(tmp_path / "folders")]
    command = [sys.executable, "-m", "pytest", *folders, "-c", "/dev/null", *nodes, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    require_exit(done)
    assert len(re.findall(r"^\d:\d\d elapsed, \d+%", done.stdout, re.MULTILINE)) >= 2, done.stdout
    (file,) = tmp_path.glob(".pytest_cache/v/progress/durations")
    durations = json.loads(file.read_text())
    assert [took > seconds for took, seconds in zip(durations.values(), (0.4, 0.1, 0.5), strict=True)] == [True] * 3
    assert next(iter(durations)).endswith("test_it.py::test_waits[0.4]")


RERUN_TESTS = """
import pathlib

def test_passes_alone():
    marker = pathlib.Path("ran-before")
    ran_before = marker.exists()
    marker.touch()
    assert ran_before

def test_passes():
    pass

def test_fails():
    assert {always}
"""


@pytest.mark.rest
def test_tests_that_pass_only_alone_are_named_and_others_fail_the_target(tmp_path: Path) -> None:
    # A make that runs these tests passes its variables on.
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTEST_"))}

    def run(always: bool) -> subprocess.CompletedProcess[str]:
        (tmp_path / "ran-before").unlink(missing_ok=True)
        (tmp_path / "Makefile").write_text(MAKEFILE.format(python=sys.executable))
        (tmp_path / "test_it.py").write_text(RERUN_TESTS.format(always=always))
        command = [str(REPO / ".ci/run_tests"), "test"]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100)

    headline = "=== test: these tests failed beside others and passed alone, so they depend on the machine's load: ==="
    done = run(always=True)
    require_exit(done)
    assert done.stdout.endswith(f"{headline}\ntest_it.py::test_passes_alone\n")
    done = run(always=False)
    assert done.returncode != 0
    assert done.stdout.endswith(f"{headline}\ntest_it.py::test_passes_alone\n"), done.stdout
    assert "FAILED test_it.py::test_fails" in done.stdout


@pytest.fixture(params=["a-persons-machine", "ci"])
def outcome(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[BaseException]:
    """The outcome of the test when no program is on the PATH."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(testbed_config, "SEARCH_PATH", "/nowhere")
    if request.param == "ci":
        monkeypatch.setenv("CI", "true")
        return pytest.fail.Exception
    monkeypatch.delenv("CI", raising=False)
    return pytest.skip.Exception


def test_without_slurm(outcome: type[BaseException], other_slurm) -> None:
    packages = "iproute2 mariadb-client-core mariadb-server-core munge slurm-client slurmctld slurmd slurmdbd util-linux"
    with (
        pytest.raises(outcome, match=rf"needs slurmctld, .*: apt-get install --no-install-recommends {packages}$"),
        other_slurm(),
    ):
        pass


def test_without_chromium(outcome: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(outcome, match=r"apt-get install --no-install-recommends chromium$"):
        show(tmp_path / "page.html", tmp_path)
