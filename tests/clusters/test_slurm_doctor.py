"""`launcher doctor +cluster=slurm` on a real Slurm checks every node of an allocation and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
from testbed_cluster import Testbed

from launcher.cli import doctor as doctor_verb

pytestmark = [pytest.mark.slurm, pytest.mark.rest]

Launch = Callable[..., subprocess.CompletedProcess[str]]

# The timeout suits a busy machine: two nodes import torch at the same time.
DOCTOR = (
    "doctor",
    "model=tiny",
    "+cluster=slurm",
    "cluster.exclusive=false",
    "cluster.ranks_per_node=1",
    "tracking.mode=offline",
)
DEADLINE_S = 600.0


def jobs_of(bed: Testbed) -> list[str]:
    """The doctor's jobs that Slurm has not ended."""
    names = bed.output("squeue", "--noheader", "--format=%j").split()
    return [name for name in names if name.startswith("launcher-doctor-")]


def await_no_job(bed: Testbed) -> None:
    end = time.monotonic() + DEADLINE_S
    while jobs_of(bed):
        assert time.monotonic() < end, bed.output("squeue")
        time.sleep(0.2)


def test_every_node_of_the_allocation_reports_and_one_that_sees_other_storage_comes_first(
    launch_here: Launch, slurm: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failing cluster.setup command is reported too; a run would continue despite it."""
    if not slurm.layout.isolated:
        pytest.skip("this machine may not make network namespaces")
    slurm.private_mount("n2", tmp_path)
    reports = []
    to_sections = doctor_verb.to_sections
    monkeypatch.setattr(doctor_verb, "to_sections", lambda report: reports.append(report) or to_sections(report))
    command = (*DOCTOR, "cluster.nodes=2", "cluster.time=10:00", f"run.root={tmp_path}/runs", "cluster.setup=[ls /missing]")
    done = launch_here(*command, **slurm.variables)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    (failed,) = [line for line in lines if line.startswith("failure")]
    assert "n2: " in failed
    assert "is not the folder that the submitting machine sees" in failed

    report = json.loads(doctor_verb.to_json(*reports))
    assert report["verdict"] == "failure"
    assert sorted(report["nodes"]) == ["n1", "n2"]
    assert report["here"][0]["name"] == "Slurm"
    assert "nodes in service" in report["here"][0]["seen"]
    assert [(result["verdict"], result["seen"]) for result in report["here"] if result["name"] == "setup"] == [
        ("warning", "a command of cluster.setup failed: ls /missing")
    ]
    for name, node in report["nodes"].items():
        verdicts = {result["name"]: result["verdict"] for result in node["results"]}
        assert verdicts["torch"] == verdicts["all-reduce"] == "ok", node
        assert (verdicts["run.root"] == "failure") is (name == "n2"), node
    await_no_job(slurm)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_doctor_cancels_its_allocation(launcher_env: Mapping[str, str], slurm: Testbed, tmp_path: Path) -> None:
    """The doctor is interrupted while its job waits for a node that another job holds."""
    slurm.run("sbatch", "--parsable", "-o", "/dev/null", "--exclusive", "--nodes=3", "--time=10", "--wrap", "sleep 600")
    command = [sys.executable, "-m", "launcher", *DOCTOR, "cluster.nodes=3", f"run.root={tmp_path}/runs"]
    doctor = subprocess.Popen(
        command, env={**launcher_env, **slurm.variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + DEADLINE_S
        while not jobs_of(slurm):
            assert doctor.poll() is None, doctor.communicate()
            assert time.monotonic() < end
            time.sleep(0.2)
        (salloc,) = [p for p in psutil.Process(doctor.pid).children() if p.name() == "salloc"]
        doctor.send_signal(signal.SIGINT)
        _, errors = doctor.communicate(timeout=DEADLINE_S)
    finally:
        doctor.kill()
    assert doctor.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted"
    await_no_job(slurm)
    assert not salloc.is_running()
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_does_not_start_in_time_is_cancelled(launch_here: Launch, slurm: Testbed, tmp_path: Path) -> None:
    slurm.run("sbatch", "--parsable", "-o", "/dev/null", "--exclusive", "--nodes=3", "--time=10", "--wrap", "sleep 600")
    # The timeout, in minutes, is long enough for the job to reach the queue.
    command = (*DOCTOR, "cluster.nodes=2", f"run.root={tmp_path}/runs", "--timeout", "0.2")
    done = launch_here(*command, **slurm.variables)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 of 2 nodes did not report in time (the job is PENDING (" in done.stdout
    assert "--timeout" in done.stdout
    await_no_job(slurm)


def test_what_the_site_cannot_run_is_reported_without_a_job(launch_here: Launch, slurm: Testbed, tmp_path: Path) -> None:
    done = launch_here(*DOCTOR, "cluster.nodes=9", f"run.root={tmp_path}/runs", **slurm.variables)
    assert done.returncode == 1
    assert "failure  Slurm" in done.stdout
    assert "Slurm refuses the job" in done.stdout
    assert os.listdir(tmp_path) == []
