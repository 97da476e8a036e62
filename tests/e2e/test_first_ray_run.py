"""A run with `+cluster=ray`, on its own Ray on this machine, has the losses of the same run with `cluster=local`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_tools import FIRST_RUN, FIRST_STEPS, losses, modes_of, status
from forked import Launch, require_exit
from ray_tools import DEADLINE_S, await_no_process, causes, kill_all

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A folder for runs; their processes are killed at the end."""
    folder = tmp_path / "runs"
    yield folder
    kill_all(folder)


@pytest.fixture
def temporary() -> Iterator[Path]:
    """The folder for temporary files, with a path short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="rt-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_run_on_ray_has_the_losses_of_a_local_run(
    request: pytest.FixtureRequest,
    launch: Launch,
    root: Path,
    temporary: Path,
    working_dir: Path,
) -> None:
    """The command and Ray's workers, which get the command's path, import nothing from the working directory."""
    env = {"TMPDIR": str(temporary), "PYTHONSAFEPATH": "1"}
    own = ("+cluster=ray", "cluster.ranks_per_node=2", "checkpoint.save_every=6", "export.enabled=false")
    done = launch(*FIRST_RUN, *own, f"run.root={root}", "run.name=alone", cwd=working_dir, timeout=DEADLINE_S, **env)
    require_exit(done)
    run = root / "alone"
    assert status(run)["state"] == "completed"
    assert sorted(losses(run)) == list(range(1, FIRST_STEPS + 1))
    # Request the fixture only here: another test process can make the run while this test's run trains.
    local = request.getfixturevalue("first_run")
    assert losses(run) == losses(local), "the same rows and bitwise the same losses"
    assert causes(run) == ["completed"]
    assert [modes_of(one) for one in (local, run)] == [(0o700, 0o600)] * 2
    assert not list((run / "ray").rglob("*.safetensors"))
    await_no_process(run)
    assert list(temporary.glob("ray-*")) == [], "a run that is completed leaves nothing of Ray's behind"
