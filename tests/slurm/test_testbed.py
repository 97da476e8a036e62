"""The Slurm testbed works as documented: separate nodes, faults, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from testbed_cluster import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.rest]

TICK_S = 0.2
TICKING = f'while :; do touch "$0"; sleep {TICK_S}; done'


def until(test: Callable[[], object], deadline_s: float = 30) -> None:
    end = time.monotonic() + deadline_s
    while not test():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.1)


def grows(file: Path, within_s: float = 10) -> bool:
    """Check that a task still writes `file`."""
    before, end = file.stat().st_mtime_ns, time.monotonic() + within_s
    while file.stat().st_mtime_ns == before and time.monotonic() < end:
        time.sleep(0.1)
    return file.stat().st_mtime_ns != before


def submit(bed: Testbed, *arguments: object, script: str) -> str:
    job = bed.run("sbatch", "--parsable", "-o", "/dev/null", *arguments, "--wrap", script, stdout=subprocess.PIPE)
    return job.stdout.strip()


def state(bed: Testbed, job: str) -> str:
    return bed.output("squeue", "-h", "-j", job, "-o", "%T").strip()


@pytest.fixture
def nodes(slurm: Testbed) -> Testbed:
    """The cluster; its nodes must have separate networks."""
    if not slurm.layout.isolated:
        pytest.skip("this machine may not make network namespaces")
    return slurm


def test_each_node_has_its_own_address_and_name(nodes: Testbed) -> None:
    script = "echo $SLURM_PROCID $(hostname) $(ip -4 -o addr show eth0 | awk '{print $4}')"
    seen = nodes.output("srun", "-N2", "--ntasks-per-node=2", "bash", "-c", script)
    at = nodes.layout.addresses
    expected = [f"{rank} {node} {at[node]}/24" for rank, node in enumerate(["n1", "n1", "n2", "n2"])]
    assert sorted(seen.splitlines()) == expected


def test_a_killed_node_is_gone_at_once_and_boots_again(nodes: Testbed, tmp_path: Path) -> None:
    job = submit(nodes, "-N2", script=f"srun bash -c '{TICKING.replace('$0', str(tmp_path / '$SLURMD_NODENAME'))}'")
    until(lambda: (tmp_path / "n2").exists() and (tmp_path / "n1").exists())
    nodes.kill("n2")
    assert not nodes.processes("n2")
    assert not grows(tmp_path / "n2", within_s=5 * TICK_S)
    assert grows(tmp_path / "n1")
    nodes.run("scancel", job)
    nodes.boot("n2")
    until(lambda: nodes.states()["n2"] == "idle")
    assert nodes.output("srun", "-w", "n2", "hostname") == "n2\n"


def test_a_disconnected_node_keeps_running(nodes: Testbed, tmp_path: Path) -> None:
    submit(nodes, "-w", "n2", script=TICKING.replace("$0", str(tmp_path / "tick")))
    until((tmp_path / "tick").exists)
    address = nodes.layout.addresses["n2"]

    def reached() -> bool:
        probe = f"timeout 1 bash -c '</dev/tcp/{address}/{nodes.layout.port + 2}'"
        return nodes.exec("n1", "bash", "-c", probe, check=False, stderr=subprocess.DEVNULL).returncode == 0

    assert reached()
    nodes.cut("n2")
    assert not reached()
    assert grows(tmp_path / "tick")
    nodes.heal("n2")
    until(reached)


def test_tasks_outlive_a_crashed_slurmd(slurm: Testbed, tmp_path: Path) -> None:
    job = submit(slurm, "-w", "n2", script=TICKING.replace("$0", str(tmp_path / "tick")))
    until((tmp_path / "tick").exists)
    assert slurm.slurmd("n2")
    slurm.crash("n2")
    until(lambda: not slurm.slurmd("n2"), 2)
    assert grows(tmp_path / "tick")
    slurm.revive("n2")
    until(lambda: slurm.slurmd("n2"))
    until(lambda: slurm.output("srun", "--overlap", f"--jobid={job}", "hostname"))


def test_jobs_live_through_a_restart_of_the_controller(slurm: Testbed, tmp_path: Path) -> None:
    job = submit(slurm, script=f"until test -e {tmp_path}/end; do sleep 0.1; done")
    until(lambda: state(slurm, job) == "RUNNING")
    before = set(slurm.processes("slurmctld"))
    slurm.restart_controller()
    assert not before & set(slurm.processes("slurmctld"))
    assert state(slurm, job) == "RUNNING"
    (tmp_path / "end").touch()
    until(lambda: slurm.output("sacct", "-nXPj", job, "-o", "State").strip() == "COMPLETED")


def test_a_private_mount_hides_a_folder_from_one_node(nodes: Testbed, tmp_path: Path) -> None:
    shared = tmp_path / "a folder"
    shared.mkdir()
    nodes.private_mount("n2", shared)
    nodes.run("srun", "-N2", "bash", "-c", 'touch "$0/$SLURMD_NODENAME"', shared)
    assert os.listdir(shared) == ["n1"]
    nodes.private_unmount("n2", shared)
    assert nodes.exec("n2", "ls", shared, stdout=subprocess.PIPE).stdout == "n1\n"


def test_a_host_name_that_leads_to_the_loopback(nodes: Testbed) -> None:
    def resolved(inside: str, name: str) -> str:
        return nodes.exec(inside, "getent", "hosts", name, stdout=subprocess.PIPE).stdout.split()[0]

    nodes.own_loopback_name("n1")
    assert resolved("n1", "n1") == "127.0.1.1"
    assert resolved("n2", "n1") == nodes.layout.addresses["n1"]
    assert nodes.output("srun", "-N2", "hostname").split() in (["n1", "n2"], ["n2", "n1"])


def test_reset_mends_everything(nodes: Testbed, tmp_path: Path) -> None:
    first = submit(nodes, "-w", "n1", script="exit 1")
    submit(nodes, f"--dependency=afterok:{first}", script="true")
    stubborn = submit(nodes, "-N3", script="trap '' TERM; while :; do sleep 1; done")
    until(lambda: state(nodes, stubborn) == "RUNNING")
    nodes.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=test")
    nodes.private_mount("n1", tmp_path)
    nodes.own_loopback_name("n1")
    nodes.crash("n2")
    nodes.cut("n3")
    nodes.stop_controller()
    nodes.reset()
    assert not nodes.output("squeue", "-h")
    assert nodes.states() == {"n1": "idle", "n2": "idle", "n3": "idle"}
    assert str(tmp_path) not in nodes.exec("n1", "cat", "/proc/mounts", stdout=subprocess.PIPE).stdout
    assert "127.0.1.1" not in nodes.exec("n1", "cat", "/etc/hosts", stdout=subprocess.PIPE).stdout
    assert sorted(nodes.output("srun", "-N3", "hostname").split()) == ["n1", "n2", "n3"]


def test_testbeds_with_different_settings_run_at_once_and_leave_nothing(
    slurm: Testbed, other_slurm: Callable[..., AbstractContextManager[Testbed]], tmp_path: Path
) -> None:
    with other_slurm(nodes=1, accounting=False, requeue=False, kill_over_memory=True) as bed:
        assert bed.root != slurm.root
        assert not bed.output("sacct", "-n")
        grow = "x = bytearray(400 << 20); x[::4096] = b'x' * len(x[::4096]); import time; time.sleep(50)"
        script = f'srun python3 -c "{grow}"; echo $? > {tmp_path}/code'
        job = submit(bed, "--mem=100", script=script)
        until(lambda: state(bed, job) == "RUNNING")
        assert bed.run("scontrol", "requeue", job, check=False, stderr=subprocess.DEVNULL).returncode
        until((tmp_path / "code").exists)
        assert (tmp_path / "code").read_text() == "137\n"
        tag = bed.layout.tag
        assert tag in Path("/proc/net/dev").read_text()
    assert not bed.processes()
    assert not bed.root.exists()
    assert f"{tag}:" not in Path("/proc/net/dev").read_text()
    assert slurm.idle()
