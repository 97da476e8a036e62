"""cluster.address=auto on a machine where other users run Ray, or have left files that Ray reads."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from missing_program import skip_or_fail
from pace import wait_for
from special_files import make_pipe

from launcher.clusters.ray import auto_address
from launcher.config.schema import RunConfig
from launcher.config.sections.ray import RaySection
from launcher.errors import SubmitError
from launcher.worker.ray import connection
from launcher.worker.ray import doctor as driver_of_doctor

pytestmark = pytest.mark.rest

DAEMON = 1
MINE, THEIRS = "127.0.0.1:7001", "127.0.0.1:7002"
StartRaylet = Callable[..., Path]


@pytest.fixture
def start_raylet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartRaylet]:
    """Start a process that looks like a user's raylet; other Rays on this machine are ignored."""
    if os.geteuid() != 0:
        skip_or_fail("only root can start processes of other users: run pytest as root")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS", raising=False)
    pids: list[int] = []
    all_processes = psutil.process_iter
    of_this_test = lambda attributes: (process for process in all_processes(attributes) if process.pid in pids)  # noqa: E731
    monkeypatch.setattr(auto_address.psutil, "process_iter", of_this_test)
    with ExitStack() as stack:

        def start(address: str, uid: int = 0) -> Path:
            session = tmp_path / f"session-{len(pids)}"
            session.mkdir()
            flags = [f"--gcs-address={address}", f"--session_dir={session}"]
            # A program that other users can run too; it waits for input.
            command = ["/ray/raylet", "-c", "read _", *flags]
            process = subprocess.Popen(command, executable="/bin/sh", user=uid, cwd="/", stdin=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            pids.append(process.pid)
            wait_for("the arguments", lambda: flags[0] in psutil.Process(process.pid).cmdline())
            return session

        yield start


def name_newest(tmp_path: Path, address: str) -> None:
    """Write the file that `ray start` leaves, which any user can write first."""
    folder = tmp_path / "tmp/ray"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ray_current_cluster").write_text(address)


def test_the_ray_of_another_user_is_not_joined(
    start_raylet: StartRaylet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_raylet(THEIRS, DAEMON)
    name_newest(tmp_path, THEIRS)
    with pytest.raises(SubmitError, match="the Ray on this machine belongs to daemon") as error:
        auto_address.find_address()
    assert "--trust-owner daemon" in error.value.problems[0].remedy
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "daemon")
    assert auto_address.find_address() == THEIRS
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS")
    start_raylet(MINE)
    assert auto_address.find_address() == MINE, "a file of another user names theirs"


@pytest.mark.timeout(300)
def test_the_newest_of_several_own_rays_is_joined(start_raylet: StartRaylet, tmp_path: Path) -> None:
    start_raylet(MINE)
    start_raylet(other := "127.0.0.1:7003")
    name_newest(tmp_path, THEIRS)
    with pytest.raises(SubmitError, match="several Rays run on this machine") as error:
        auto_address.find_address()
    assert error.value.problems[0].value == f"{MINE}, {other}"
    name_newest(tmp_path, other)
    assert auto_address.find_address() == other
    (tmp_path / "tmp/ray/ray_current_cluster").unlink()
    make_pipe(tmp_path / "tmp/ray/ray_current_cluster")
    with pytest.raises(SubmitError, match="several Rays run on this machine"):
        auto_address.find_address()


def test_a_session_folder_that_another_user_has_replaced_is_refused(start_raylet: StartRaylet) -> None:
    session = start_raylet(MINE)
    # The mode that Ray gives the folder.
    session.parent.chmod(0o777)
    assert auto_address.find_address() == MINE
    os.chown(session, DAEMON, -1)
    with pytest.raises(SubmitError, match="the folder of the Ray on this machine belongs to daemon"):
        auto_address.find_address()


@pytest.mark.parametrize("driver", ["run", "doctor"])
def test_a_driver_joins_the_ray_that_was_checked(
    start_raylet: StartRaylet,
    config_of: Callable[..., RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
) -> None:
    """Ray's own search would join the Ray that was started last, whoever started it."""
    import ray

    def init(address: str, **_: object) -> None:
        raise ConnectionError(address)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = config_of("cluster=ray", "cluster.address=auto")
    request = json.dumps({"config": config.model_dump(mode="json"), "environ": {}})
    section = RaySection.of(config.cluster)
    join = {"run": lambda: connection.join(section, {}), "doctor": lambda: driver_of_doctor.main(request, 60)}[driver]
    start_raylet(THEIRS, DAEMON)
    name_newest(tmp_path, THEIRS)
    with pytest.raises(SubmitError, match="the Ray on this machine belongs to daemon"):
        join()
    start_raylet(MINE)
    with pytest.raises(ConnectionError, match=MINE):
        join()
    monkeypatch.setenv("RAY_ADDRESS", other := "127.0.0.1:7004")
    with pytest.raises(ConnectionError, match=other):
        join()
