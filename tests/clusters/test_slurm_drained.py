"""A run's state names drained nodes of its job and of the partition that it waits for."""

from __future__ import annotations

from pathlib import Path

import hand_made
import pytest

from launcher.clusters.slurm import commands, queue
from launcher.clusters.slurm.cluster import _correct_status
from launcher.clusters.slurm.queue import Job
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import Attempt


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return hand_made.run(tmp_path / "demo", state="running", attempt=1)


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str]]:
    """The nodes, states and reasons that sinfo lists, with one line for each partition of a node."""
    rows: list[tuple[str, str, str]] = []

    def answer(*argv: str, **_: object) -> str:
        if argv[0] == "scontrol":
            return "JobId=7 JobName=demo\n   Partition=gpu AllocNode:Sid=login:1\n"
        assert {"--nodes=n[1-2]", "--partition=gpu"} & {*argv}
        return "".join("\x1f".join([*row, ""]) + "\n" for row in rows)

    for module in (commands, queue):
        monkeypatch.setattr(module, "slurm", answer)
    return rows


def message(run: RunDir, state: str, reason: str = "", nodes: str = "") -> str:
    job = Job("7", state, reason, None, 0, nodes, queued=True)
    return _correct_status(run, run_store.read_status(run), job, "7", 0.0).message


def test_a_drained_node_of_a_running_job_is_named(run: RunDir, drained: list[tuple[str, str, str]]) -> None:
    assert message(run, "RUNNING", nodes="n[1-2]") == ""
    drained += [("n2", "draining", "bad fan"), ("n2", "draining", "bad fan")]
    note = "n2 is draining (bad fan): the job continues, and Slurm starts no other job there"
    assert message(run, "RUNNING", nodes="n[1-2]") == note


def test_drained_nodes_are_named_to_a_job_that_waits_for_nodes(run: RunDir, drained: list[tuple[str, str, str]]) -> None:
    drained += [(f"n{i}", "drained*", "dead") for i in range(1, 6)]
    shown = "n1 is drained (dead); n2 is drained (dead); n3 is drained (dead); and 2 more are drained"
    assert message(run, "PENDING", "Resources") == f"waiting for nodes (Resources); {shown}"
    assert message(run, "PENDING", "Dependency") == "waiting for the jobs that it depends on (Dependency)"


NODES = """\
NodeName=n1 Arch=x86_64 State=IDLE ThreadsPerCore=1 BootTime=100 SlurmdStartTime=1795552364
NodeName=n2 Arch=x86_64 State=DOWN+NOT_RESPONDING ThreadsPerCore=1 BootTime=None SlurmdStartTime=None
"""


@pytest.mark.parametrize(
    ("state", "exit_signal", "end"),
    [
        ("FAILED", 9, "the batch script of job 7 was killed by SIGKILL"),
        ("FAILED", 0, "job 7 ended as FAILED without recording a result"),
        (
            "OUT_OF_MEMORY",
            125,
            "a memory limit was exceeded (raise cluster.additional_parameters.mem): the batch script of job 7 was killed",
        ),
        ("NODE_FAIL", 0, "n2 was lost (Slurm: node failure), and the job could not run again"),
    ],
)
def test_the_end_of_a_job_whose_batch_script_could_not_record_it_is_described(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, state: str, exit_signal: int, end: str
) -> None:
    monkeypatch.setattr(queue, "slurm", lambda *argv, **_: NODES if argv[-1] == "n1,n2" else "")
    run.attempt(1).mkdir(parents=True)
    run_store.write_attempt(run, 1, Attempt(None, job="7", nodes=("n1", "n2"), begun_at=200.0))
    job = Job("7", state, "", None, 0, "", queued=False, exit_signal=exit_signal)
    shown = _correct_status(run, run_store.read_status(run), job, "7", 0.0)
    assert (shown.state, shown.message) == ("failed", f"{end}; continue with: python -m launcher resume {run.root}")


@pytest.mark.parametrize(
    ("state", "booted", "is_lost"),
    [
        ("IDLE", 300, True),
        ("IDLE", 100, False),
        ("IDLE+CLOUD+POWERED_DOWN", 300, False),
        ("DOWN+CLOUD+NOT_RESPONDING", 100, True),
    ],
)
def test_a_boot_is_a_lost_node_only_where_nodes_are_not_booted_for_each_job(
    monkeypatch: pytest.MonkeyPatch, state: str, booted: int, is_lost: bool
) -> None:
    node = f"NodeName=n1 Arch=x86_64 State={state} ThreadsPerCore=1 BootTime={booted} SlurmdStartTime=None\n"
    monkeypatch.setattr(queue, "slurm", lambda *argv, **_: node)
    assert queue.find_lost_nodes(["n1"], 200.0) == (["n1"] if is_lost else [])
