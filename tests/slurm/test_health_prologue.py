"""The health prologue drains a faulty node with a reason and leaves a healthy node alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from missing_program import skip_or_fail
from testbed_cluster import Testbed

pytestmark = pytest.mark.rest

PROLOGUE = Path(__file__).resolve().parents[2] / "slurm" / "health_prologue.sh"
TWO_GPUS = "printf '0, 0\\n1, 0\\n'"
NO_PROCESSES = "true"
STALE = 'case "$*" in *compute-apps*) printf "77, python\\n78, /opt/dcgm/dcgmi\\n" ;; *) printf "0, [N/A]\\n1, 0\\n" ;; esac'
XID = "[ 1234.5] NVRM: Xid (PCI:0000:3b:00): {code}, pid=4711, name=python, GPU has fallen off the bus."


@dataclass(frozen=True)
class Node:
    """A node whose programs a test defines; `drained` holds the updates that scontrol was asked for."""

    folder: Path

    def has(self, program: str, script: str) -> None:
        file = self.folder / program
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def check(self, **env: str) -> subprocess.CompletedProcess[str]:
        fixed = {"PATH": f"{self.folder}:/usr/bin:/bin:/usr/sbin:/sbin", "SLURMD_NODENAME": "gpu07", "HEALTH_SHM_MIB": "0"}
        quick = {"HEALTH_TIMEOUT_S": "1", "HEALTH_STALE_WAIT_S": "0"}
        return subprocess.run([PROLOGUE], env={**fixed, **quick, **env}, capture_output=True, text=True, timeout=60)

    @property
    def drained(self) -> list[str]:
        file = self.folder / "drained"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def node(tmp_path: Path) -> Node:
    """A healthy node with two GPUs."""
    healthy = Node(tmp_path)
    healthy.has("nvidia-smi", f'case "$*" in *compute-apps*) {NO_PROCESSES} ;; *) {TWO_GPUS} ;; esac')
    healthy.has("dmesg", "echo '[ 0.0] Linux version 6.12'")
    healthy.has("timedatectl", "echo yes")
    slurm = f"""case $1 in
        show) echo 'NodeName=gpu07 Arch=x86_64'; echo '   Gres=gpu:h100:2(S:0-1)' ;;
        listpids) echo 'No job steps exist on this node.' >&2; exit 1 ;;
        update) printf '%s\\n' "${{@:2}}" >> {tmp_path}/drained ;;
    esac"""
    healthy.has("scontrol", slurm)
    return healthy


def test_a_healthy_node_is_not_drained(node: Node) -> None:
    done = node.check(HEALTH_MOUNTS="/ /proc")
    assert (done.returncode, done.stderr) == (0, "")
    assert not node.drained


@pytest.mark.parametrize(
    "program, script, reason",
    [
        (
            "nvidia-smi",
            "echo 'Unable to determine the device handle for GPU1: Unknown Error'; exit 15",
            "nvidia-smi fails: Unable",
        ),
        ("nvidia-smi", "trap '' TERM; sleep 20", "nvidia-smi does not answer within 1 s"),
        # timeout itself hangs if SIGKILL does not end its child, as with a hung driver.
        ("timeout", 'case $4 in nvidia-smi) sleep 20 ;; *) exec /usr/bin/timeout "$@" ;; esac', "nvidia-smi does not answer"),
        ("nvidia-smi", "echo '0, 0'", "1 of 2 GPUs answer"),
        ("nvidia-smi", "printf '0, 0\\n1, 3\\n'", "uncorrectable ECC errors on GPU 1"),
        ("nvidia-smi", STALE, "processes of no job use a GPU: 77"),
        (
            "dmesg",
            f"echo '{XID.format(code=79)}'; echo '[ 1.2] [T7] NVRM: Xid (PCI:0000:3b:00 GPU-I:05): 48, DBE'",
            "Xid 48 79 in the kernel log",
        ),
        ("timedatectl", "echo no", "the clock is not synchronized"),
    ],
)
def test_a_fault_drains_the_node(node: Node, program: str, script: str, reason: str) -> None:
    node.has(program, script)
    start = time.monotonic()
    done = node.check()
    assert done.returncode == 1
    assert node.drained[:2] == ["NodeName=gpu07", "State=DRAIN"]
    assert node.drained[2].startswith(f"Reason=health: {reason}")
    assert reason in done.stderr
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "env, reason",
    [
        ({"HEALTH_GPUS": "8"}, "2 of 8 GPUs answer"),
        ({"HEALTH_SHM_MIB": "999999999"}, "of the 999999999 it should"),
        ({"HEALTH_MOUNTS": "/ /no/such/mount"}, "/no/such/mount is not mounted"),
        ({"HEALTH_MOUNTS": "/dev/shm", "HEALTH_MAX_FULL": "-1"}, "% full"),
    ],
)
def test_the_site_configures_the_expected_hardware(node: Node, env: dict[str, str], reason: str) -> None:
    assert node.check(**env).returncode == 1
    assert reason in node.drained[2]


def test_the_name_of_a_users_program_drains_no_node(node: Node) -> None:
    """The kernel logs the names of crashed processes and files, which users choose."""
    forged = XID.format(code=79).partition("] ")[2]
    node.has("dmesg", f"echo '[ 9.1] traps: NVRM: Xid (): 79[77] trap divide error ip:55c0 in {forged}[55c0+1000]'")
    assert (node.check().returncode, node.drained) == (0, [])
    # The driver's process list contains these names, which may have line breaks; process 78 belongs to a job.
    listed = (
        'case "$*" in *pid,process_name*) printf "78, a\\n4711, b\\n" ;; *compute-apps*) echo 78 ;; *) ' + TWO_GPUS + " ;; esac"
    )
    node.has("nvidia-smi", listed)
    node.has("scontrol", "case $1 in listpids) echo '78 1 0' ;; *) echo '   Gres=gpu:h100:2(S:0-1)' ;; esac")
    assert (node.check().returncode, node.drained) == (0, [])


MOUNTS = """printf '%s\\n' '/ ext4 rw' '/scratch xfs rw,relatime' '/scratch xfs ro,relatime' '/local xfs rw' \\
    '/home nfs4 rw,vers=4.2' '/work lustre rw' '/readonly nfs ro'"""
DF = """case "$*" in
    */local*|*/work*) printf 'Filesystem 1M Used Free Capacity Mounted\\nx 9 9 0 99%% /\\n' ;;
    */home*) sleep 20 ;;
    *) printf 'Filesystem 1M Used Free Capacity Mounted\\nx 9 1 8 1%% /\\n' ;;
esac"""


@pytest.mark.parametrize(
    ("mounts", "reason"),
    [
        ("/scratch", "/scratch is mounted read-only"),
        ("/local", "/local is 99% full"),
        ("/readonly", "/readonly is mounted read-only"),
        ("/home /work /local", "/local is 99% full"),
    ],
)
def test_a_faulty_mount_of_the_node_drains_it(node: Node, mounts: str, reason: str) -> None:
    node.has("findmnt", MOUNTS)
    node.has("df", DF)
    node.has("find", "printf '0 18432\\n'")
    assert node.check(HEALTH_MOUNTS=mounts).returncode == 1
    assert node.drained[2] == f"Reason=health: {reason}"


def test_a_shared_mount_that_a_user_fills_or_overloads_drains_no_node(node: Node) -> None:
    node.has("findmnt", MOUNTS)
    node.has("df", DF)
    node.has("logger", f"printf '%s\\n' \"$*\" >> {node.folder}/logged")
    done = node.check(HEALTH_MOUNTS="/home /work")
    assert (done.returncode, node.drained) == (0, [])
    reports = ["/home does not answer within 1 s", "/work is 99% full"]
    assert done.stderr.splitlines() == [f"health of gpu07: reported, not drained: {text}" for text in reports]
    assert (node.folder / "logged").read_text().splitlines() == [f"-t health_prologue gpu07: {text}" for text in reports]
    node.has("find", "printf '0 18432\\n'")
    assert node.check(HEALTH_MOUNTS="/work", HEALTH_LOCAL_TYPES="lustre").returncode == 1


@pytest.mark.parametrize(
    ("files", "holder"),
    [
        ("printf '0 18\\n1234 18000\\n1235 20\\n1234 2\\n'", "user 1234 holds 8 MiB"),
        ("printf '1000 18432\\n'", "the user of this job, 1000, holds 9 MiB"),
        # A user has deleted the file but keeps it open.
        ("true", "no file of a user has a name there"),
        # A user has created too many files to count.
        ("sleep 20", "too many files to tell whose"),
    ],
)
def test_space_that_users_fill_drains_no_node(node: Node, files: str, holder: str) -> None:
    node.has("findmnt", MOUNTS)
    node.has("df", DF.replace("*/local*", "*/local*|*/dev/shm*"))
    node.has("find", files)
    done = node.check(HEALTH_MOUNTS="/local", HEALTH_SHM_MIB="8", SLURM_JOB_UID="1000")
    assert (done.returncode, node.drained) == (0, [])
    assert done.stderr.splitlines() == [
        f"health of gpu07: reported, not drained: /local is 99% full: {holder}",
        f"health of gpu07: reported, not drained: /dev/shm has 0 MiB free of the 8 it should: {holder}",
    ]


def test_a_file_of_a_user_in_shared_memory_is_reported(node: Node) -> None:
    """Runs the real programs while a user's file fills shared memory."""
    if os.geteuid() != 0:
        skip_or_fail("only root can give files to other users: run pytest as root")
    free = shutil.disk_usage("/dev/shm").free >> 20
    with tempfile.NamedTemporaryFile(dir="/dev/shm", prefix="launcher-test-") as file:
        os.posix_fallocate(file.fileno(), 0, 128 << 20)
        os.fchown(file.fileno(), 4321, -1)
        done = node.check(HEALTH_SHM_MIB=str(free - 100), HEALTH_TIMEOUT_S="15")
    assert (done.returncode, node.drained) == (0, [])
    assert "user 4321 holds 128 MiB" in done.stderr


def test_every_fault_is_in_the_reason(node: Node) -> None:
    node.has("nvidia-smi", "exit 9")
    node.has("timedatectl", "echo no")
    node.check(HEALTH_MOUNTS="/no/such/mount")
    assert [part.split(" ")[0] for part in node.drained[2].removeprefix("Reason=health: ").split("; ")] == [
        "nvidia-smi",
        "/no/such/mount",
        "the",
    ]


def test_faults_of_programs_and_processes_of_jobs_are_none(node: Node) -> None:
    node.has("dmesg", f"echo '{XID.format(code=31)}'")
    node.has("nvidia-smi", STALE)
    node.has(
        "scontrol", f"case $1 in listpids) printf 'PID JOBID\\n77 5 0 0 0\\n' ;; update) touch {node.folder}/drained ;; esac"
    )
    done = node.check(HEALTH_GPUS="2")
    assert (done.returncode, node.drained) == (0, []), done.stderr


def test_an_unreachable_controller_drains_nothing(node: Node) -> None:
    node.has("scontrol", "echo 'Unable to contact slurm controller' >&2; exit 1")
    node.has("nvidia-smi", STALE)
    done = node.check()
    assert done.returncode == 0
    assert "not checked: number of GPUs" in done.stderr


def test_a_node_without_gpus_needs_no_driver(node: Node) -> None:
    node.has("nvidia-smi", "exit 9")
    assert node.check(HEALTH_GPUS="0").returncode == 0


@pytest.mark.slurm
def test_slurm_drains_the_node_and_runs_the_job_elsewhere(
    node: Node, other_slurm: Callable[..., AbstractContextManager[Testbed]], tmp_path: Path
) -> None:
    broken = f"[[ $SLURMD_NODENAME != n1 ]] || {{ echo 'GPU is lost'; exit 15; }}; {TWO_GPUS}"
    node.has("nvidia-smi", f'case "$*" in *compute-apps*) ;; *) {broken} ;; esac')
    os.remove(node.folder / "scontrol")
    site = tmp_path / "prologue"
    site.write_text(f"#!/bin/bash\nexport PATH={tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin HEALTH_SHM_MIB=1\nexec {PROLOGUE}\n")
    site.chmod(0o755)
    with other_slurm(nodes=2, gpus=2, accounting=False, prolog=str(site)) as bed:
        bed.run("sbatch", "-o", tmp_path / "where", "--wrap", "hostname")
        end = time.monotonic() + 60
        while not (tmp_path / "where").exists() or not (tmp_path / "where").read_text():
            assert time.monotonic() < end, bed.output("scontrol", "show", "node", "n1")
            time.sleep(0.2)
        assert (tmp_path / "where").read_text() == "n2\n"
        shown = bed.output("scontrol", "show", "node", "n1")
        assert "DRAIN" in shown
        assert "Reason=health: nvidia-smi fails: GPU is lost" in shown
