"""User journeys with the installed wheel at realistic size; each is a shell script in this folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from e2e_tools import kill_all_of
from testbed_cluster import Testbed

HERE = Path(__file__).resolve().parent
DEADLINE_S = 1140

pytestmark = [pytest.mark.rest, pytest.mark.timeout(DEADLINE_S + 60)]

Journey = Callable[..., None]


@pytest.fixture
def journey(installed: Path, launcher_env: Mapping[str, str], tmp_path: Path) -> Iterator[Journey]:
    """Run a script in an empty folder, and kill whatever it left running."""
    # Ray's sockets need a short path.
    temporary = Path(tempfile.mkdtemp(prefix="j-", dir="/tmp"))

    def run(script: str, **variables: str) -> None:
        path = f"{installed}:{variables.get('PATH', os.environ['PATH'])}"
        environment = {name: value for name, value in launcher_env.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        with subprocess.Popen(
            ["bash", str(HERE / script)],
            cwd=tmp_path,
            env={**environment, **variables, "PATH": path, "TMPDIR": str(temporary), "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=DEADLINE_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                output, _ = process.communicate()
                output += f"ended after {DEADLINE_S} s"
        if process.returncode:
            pytest.fail(output, pytrace=False)
        print(output)

    yield run
    kill_all_of(tmp_path)
    shutil.rmtree(temporary, ignore_errors=True)


def test_first_day_on_one_machine(journey: Journey) -> None:
    journey("local.sh")


def test_first_day_with_a_sharded_model(journey: Journey) -> None:
    journey("sharded.sh")


@pytest.mark.slurm
def test_first_day_on_slurm(journey: Journey, slurm: Testbed) -> None:
    journey("slurm.sh", **slurm.variables)


@pytest.mark.ray
def test_first_day_on_ray(journey: Journey) -> None:
    journey("ray.sh")
