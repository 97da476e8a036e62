""".ci/run_tests reruns tests that fail beside others, and names those that then pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
MAKEFILE = """
test:
\t{python} -m pytest -q -c /dev/null --rootdir . test_it.py $(ARGS)
"""
TESTS = """
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
        (tmp_path / "test_it.py").write_text(TESTS.format(always=always))
        command = [str(REPO / ".ci/run_tests"), "test"]
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100)

    headline = "=== test: these tests failed beside others and passed alone, so they depend on the machine's load: ==="
    done = run(always=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(f"{headline}\ntest_it.py::test_passes_alone\n")
    done = run(always=False)
    assert done.returncode != 0
    assert done.stdout.endswith(f"{headline}\ntest_it.py::test_passes_alone\n"), done.stdout
    assert "FAILED test_it.py::test_fails" in done.stdout
