"""A test that needs a missing program says how to install it."""

from __future__ import annotations

from pathlib import Path

import pytest
import testbed_config
from browser import show


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
