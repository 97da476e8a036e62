"""Checks before a submission, and `launcher doctor +cluster=slurm` on every node of an allocation, on a real Slurm."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import Launch, require_exit
from plan_fixtures import PlanOf
from testbed_cluster import Testbed

from launcher.cli import doctor as doctor_verb
from launcher.clusters.slurm import site
from launcher.clusters.slurm.commands import slurm
from launcher.config.sections.slurm import SlurmSection
from launcher.errors import Problem, SubmitError
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan

pytestmark = [pytest.mark.slurm, pytest.mark.rest]
Use = Callable[[Testbed], Testbed]
DEADLINE_S = 600.0


def problems(plan: LaunchPlan) -> tuple[Problem, ...]:
    try:
        site.check_job(plan)
    except SubmitError as error:
        return error.problems
    return ()


def gpus_of(**settings: Any) -> DeviceFacts:
    return site.gpus_of(SlurmSection.model_validate({"kind": "slurm", **settings}))


def options(**values: str) -> dict[str, Any]:
    """The settings that pass these options to sbatch."""
    return {"additional_parameters": values}


@pytest.fixture
def there(slurm_cluster: Testbed, use: Use) -> Testbed:
    """The session's Slurm cluster for tests that change nothing in it."""
    return use(slurm_cluster)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nodes": 3, "partition": "main", "account": "research", "cpus_per_task": 4} | options(qos="urgent", mem="4000M"),
        # One suitable partition is enough.
        {"partition": "short,main", "time": "1-00:00:00"},
    ],
)
def test_a_job_that_the_site_can_run_is_accepted(there: Testbed, plan_at: PlanOf, settings: dict[str, Any]) -> None:
    assert problems(plan_at(**settings)) == ()


@pytest.mark.parametrize(
    ("settings", "where", "remedy"),
    [
        ({"partition": "mian"}, "cluster.partition", "did you mean main?"),
        ({"account": "reserch"}, "cluster.account", "partition main has"),
        ({"account": "research", **options(qos="urgnt")}, "cluster.additional_parameters.qos", "partition main has"),
        # By default, Slurm accepts this job and never starts it.
        ({"partition": "short", "time": "01:00:00"}, "cluster.time", "continues in the next job"),
        ({"nodes": 4}, "cluster", "partition main has 3 nodes with 4 CPUs, 4000 MiB, no GPU"),
        (options(gres="gpu:h100:2"), "cluster", "no GPU"),
    ],
)
def test_a_job_that_the_site_cannot_run_is_refused(
    there: Testbed, plan_at: PlanOf, settings: dict[str, Any], where: str, remedy: str
) -> None:
    (problem,) = problems(plan_at(**settings))
    assert problem.where == where
    assert problem.value
    assert remedy in problem.remedy


def test_a_save_longer_than_the_signal_lead_is_refused(there: Testbed, plan_at: PlanOf) -> None:
    plan = plan_at(nodes=2, signal_lead_seconds=60)
    assert problems(plan.model_copy(update={"checkpoint_bytes": 120 * 2**30})) == ()
    (problem,) = problems(plan.model_copy(update={"checkpoint_bytes": 800 * 2**30}))
    assert (problem.where, problem.value) == ("cluster.signal_lead_seconds", "60")


def test_drained_nodes_are_named(here: Testbed, plan_at: PlanOf) -> None:
    slurm("scontrol", "update", "NodeName=n[2-3]", "State=DRAIN", "Reason=fan")
    (problem,) = problems(plan_at(nodes=2))
    assert "2 nodes with 4 CPUs, 4000 MiB, no GPU, out of service" in problem.remedy
    assert problems(plan_at(nodes=1)) == ()


def test_a_controller_that_does_not_answer_is_reported_with_the_other_problems(
    bare_slurm: Testbed, use: Use, plan_at: PlanOf
) -> None:
    use(bare_slurm)
    bare_slurm.stop_controller()
    try:
        result = problems(plan_at(signal_lead_seconds=1, time="10").model_copy(update={"checkpoint_bytes": 2**40}))
    finally:
        bare_slurm.start_controller()
    assert "Unable to contact slurm controller" in result[0].value
    assert result[1].where == "cluster.signal_lead_seconds"


def test_a_machine_without_sbatch_or_configuration_is_refused(
    plan_at: PlanOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if not Path("/etc/slurm/slurm.conf").exists():
        monkeypatch.delenv("SLURM_CONF", raising=False)
        with pytest.raises(SubmitError):
            gpus_of()
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = problems(plan_at())
    assert "is not on this machine" in problem.message
    with pytest.raises(SubmitError):
        gpus_of()


def test_a_partition_without_gpus_has_its_cpus_as_devices(there: Testbed) -> None:
    assert gpus_of() == DeviceFacts(kind="cpu", name="CPU", count=4, host_memory_gib=3.9)
    assert gpus_of(**options(mem="2G")).host_memory_gib == 2.0
    with pytest.raises(SubmitError, match="there is no partition mian"):
        gpus_of(partition="mian")


def test_requested_gpus_take_precedence_over_the_nodes_gpus(gpu_slurm: Testbed, use: Use) -> None:
    use(gpu_slurm)
    assert gpus_of() == DeviceFacts(kind="cuda", name="gpu", count=2, host_memory_gib=3.9)
    assert gpus_of(gpus_per_node=1).count == 1
    assert gpus_of(**options(gres="gpu:h100:1")) == DeviceFacts(
        kind="cuda", name="h100", count=1, memory_gib=79.1, host_memory_gib=3.9
    )
    assert gpus_of(gpus_per_node=0).kind == "cpu"
    assert gpus_of(**options(gres="nvme:1")).count == 2


def test_nodes_with_too_few_gpus_are_refused(gpu_slurm: Testbed, use: Use, plan_at: PlanOf) -> None:
    use(gpu_slurm)
    assert problems(plan_at(nodes=2, gpus_per_node=2)) == ()
    (problem,) = problems(plan_at(nodes=2, gpus_per_node=3))
    assert "2 nodes with 4 CPUs, 4000 MiB, gpu:2" in problem.remedy


def test_gpu_types_are_distinguished(
    other_slurm: Callable[..., Any], use: Use, plan_at: PlanOf, eventually: Callable[[Callable[[], Any]], Any]
) -> None:
    with other_slurm(nodes=2, gpus=2, accounting=False) as bed:
        use(bed)
        bed.stop_controller()
        conf = bed.root / "conf"
        gres = (conf / "gres.conf").read_text().replace("Name=gpu", "Name=gpu Type=h100")
        (conf / "gres.conf").write_text(gres)
        (conf / "slurm.conf").write_text((conf / "slurm.conf").read_text().replace("Gres=gpu:2", "Gres=gpu:h100:2"))
        bed.start_controller()
        for node in bed.names:
            bed.boot(node)
        eventually(bed.idle)
        assert gpus_of() == DeviceFacts(kind="cuda", name="h100", count=2, memory_gib=79.1, host_memory_gib=3.9)
        assert problems(plan_at(nodes=2, **options(gres="gpu:h100:2"))) == ()
        assert problems(plan_at(nodes=2, **options(gres="gpu:2"))) == ()
        (problem,) = problems(plan_at(nodes=1, **options(gres="gpu:h200:1")))
        assert "gpu:h100:2" in problem.remedy


def test_a_site_is_read_with_its_partitions_and_nodes(there: Testbed) -> None:
    main, _, short = site.read_partitions()
    assert (main.name, main.default, main.max_minutes, short.max_minutes) == ("main", True, math.inf, 2)
    assert [(node.name, node.cpus, node.memory_mib, node.gpus) for node in main.nodes] == [
        (name, 4, 4000, ()) for name in ("n1", "n2", "n3")
    ]


# The timeout suits a busy machine: two nodes import torch at the same time.
DOCTOR = (
    "doctor",
    "model=tiny",
    "+cluster=slurm",
    "cluster.exclusive=false",
    "cluster.ranks_per_node=1",
    "tracking.mode=offline",
)


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
    require_exit(done, 1)
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
    require_exit(done, 1)
    assert "2 of 2 nodes did not report in time (the job is PENDING (" in done.stdout
    assert "--timeout" in done.stdout
    await_no_job(slurm)


def test_what_the_site_cannot_run_is_reported_without_a_job(launch_here: Launch, slurm: Testbed, tmp_path: Path) -> None:
    done = launch_here(*DOCTOR, "cluster.nodes=9", f"run.root={tmp_path}/runs", **slurm.variables)
    assert done.returncode == 1
    assert "failure  Slurm" in done.stdout
    assert "Slurm refuses the job" in done.stdout
    assert os.listdir(tmp_path) == []
