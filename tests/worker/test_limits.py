"""A machine limit is recognized as the cause of a failure, and final records can be written even on a full disk."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import hand_made
import pytest
from unusual_files import small_disk

from launcher.clusters import limits
from launcher.clusters.limits import LimitEvents, cause_of
from launcher.clusters.local import LocalCluster
from launcher.errors import CheckpointError
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.journal import AttemptConcluded, NodeEnded
from launcher.runs.locks import pid_namespace
from launcher.runs.run_records import Attempt, Status
from launcher.worker import failure_record, postmortem
from launcher.worker.failure_record import ErrorRecord, RankExit

KILLED = "and the kernel killed a process"


@pytest.fixture(params=[1, 2])
def groups(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Control group files of both versions, by content."""
    memory = tmp_path / ("memory" if request.param == 1 else "") / "job"
    lines = "5:memory:/job\n4:pids:/job\n0::/\n" if request.param == 1 else "0::/job\n"
    memory.mkdir(parents=True)
    names = ("memory.oom_control", "memory.limit_in_bytes") if request.param == 1 else ("memory.events", "memory.max")
    files = {
        "own": tmp_path / "cgroup",
        "node": tmp_path / "vmstat",
        "oom": memory / names[0],
        "memory": memory / names[1],
    }
    texts = (lines, "oom_kill 3\n", "under_oom 0\noom_kill 1\n", f"{2 * 2**30}\n")
    for file, text in zip(files.values(), texts, strict=True):
        file.write_text(text)
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path)
    monkeypatch.setattr(limits, "OWN_CGROUPS", files["own"])
    monkeypatch.setattr(limits, "VMSTAT", files["node"])
    return files


@pytest.mark.parametrize(
    ("file", "text", "cause"),
    [
        ("oom", "oom_kill 2\n", f"the memory limit of 2.00 GiB of this job or container was exceeded, {KILLED}"),
        ("node", "oom_kill 4\n", f"the node ran out of memory, {KILLED}"),
        ("oom", "oom_kill 1\n", ""),
    ],
)
def test_a_limit_that_the_kernel_enforced_is_named_before_the_signal(
    groups: dict[str, Path], tmp_path: Path, file: str, text: str, cause: str
) -> None:
    before = LimitEvents.read()
    groups[file].write_text(text)
    found = LimitEvents.read().cause_since(before)
    assert found == cause
    first = failure_record.from_rank_exits([RankExit(1, -9, 9.0, None)], RunDir(tmp_path), 1, limit=found)
    assert first.line == f"rank 1: {cause}: killed by SIGKILL" if cause else "rank 1: killed by SIGKILL"
    # A kill by the watchdog has the watchdog's reason.
    stalls = ["rank 1 (pid 7) is stopped"]
    assert failure_record.from_rank_exits([RankExit(1, -9, 9.0, None)], RunDir(tmp_path), 1, stalls, found).line == (
        "rank 1: (pid 7) is stopped"
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run on this machine whose agent recorded the counters and was then killed."""
    return hand_made.run(tmp_path / "demo", Attempt(None, nodes=("n1", "n2")))


MEMORY = f"the memory limit of 2.00 GiB of this job or container was exceeded, {KILLED}"


@pytest.mark.parametrize(
    ("file", "text", "limit"),
    [
        ("oom", "oom_kill 2\n", MEMORY),
        # This counter also counts processes of other users.
        ("node", "oom_kill 4\n", ""),
        ("oom", "oom_kill 1\n", ""),
    ],
)
def test_a_limit_that_killed_the_agent_itself_is_named_by_who_notices(
    groups: dict[str, Path], run: RunDir, file: str, text: str, limit: str
) -> None:
    limits.record_limits(run, 1, 0)
    status = Status("running", 1, job={"host": os.uname().nodename, "space": pid_namespace(), "pid": 2**22, "started": 1.0})
    run_store.write_status(run, status)
    groups[file].write_text(text)
    shown = LocalCluster().status(run)
    end = "the node agent ended without recording a result"
    assert (shown.state, shown.message) == (
        "failed",
        f"{limit}: {end}" if limit else f"{end}: it was killed, or the machine restarted",
    )
    # The job's conclusion and the run's next start judge this too; the agent of n2 ran on another machine.
    attempt = Attempt(None, job="41", nodes=("n1", "n2"))
    killed = postmortem.Evidence(exit_code=9)
    ended = postmortem.judge(run, 1, attempt, 0.0, killed)
    assert ended.message == ": ".join(filter(None, (limit, "no record from n1, n2 (srun ended with 9)")))
    journal.append(run, 1, NodeEnded(node=0))
    assert postmortem.judge(run, 1, attempt, 0.0, killed).message == "no record from n2 (srun ended with 9)"


def test_an_agent_of_another_machine_or_container_is_not_judged_by_the_counters_here(
    groups: dict[str, Path], run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "pid_namespace", lambda: "another boot")
    limits.record_limits(run, 1, 0)
    monkeypatch.undo()
    groups["oom"].write_text("oom_kill 2\n")
    assert limits.limit_that_killed_agents(run, 1, [0, 1]) == ""


JOB = "/system.slice/slurmstepd.scope/job_41"
# The process's path in /proc/self/cgroup, the group with the limit, and a group above it that other jobs share.
HIERARCHIES = {
    "Slurm": (f"{JOB}/step_0/user/task_0", JOB, "/system.slice/slurmstepd.scope"),
    "systemd": ("/user.slice/user-1000.slice/run-u12.scope", "/user.slice/user-1000.slice/run-u12.scope", "/user.slice"),
    # A container with its own cgroup namespace.
    "container": ("/", "/", None),
}


class Hierarchy:
    """A tree of version 2 control groups as files; a kill counts in the process's group and in all groups above it."""

    def __init__(self, root: Path, own: str, limited: str) -> None:
        self.root = root
        self.add(own)
        (self.folder(limited) / "memory.max").write_text(f"{2 * 2**30}\n")

    def folder(self, group: str) -> Path:
        return self.root / group.lstrip("/")

    def add(self, group: str) -> None:
        for level in (Path(group), *Path(group).parents):
            folder = self.folder(str(level))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cgroup.procs").touch()
            # The machine's root group has neither file.
            if (str(level) != "/" or group == "/") and not (folder / "memory.max").exists():
                (folder / "memory.max").write_text("max\n")
                (folder / "memory.events").write_text("low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\noom_group_kill 0\n")

    def kill(self, group: str) -> None:
        for level in (Path(group), *Path(group).parents):
            file = self.folder(str(level)) / "memory.events"
            if file.exists():
                file.write_text(re.sub(r"oom_kill (\d+)", lambda match: f"oom_kill {int(match[1]) + 1}", file.read_text()))


@pytest.fixture(params=HIERARCHIES)
def hierarchy(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Hierarchy, str, str | None]:
    """The tree, this process's group in it, and the shared group."""
    own, limited, shared = HIERARCHIES[request.param]
    (tmp_path / "self").write_text(f"0::{own}\n")
    monkeypatch.setattr(limits, "OWN_CGROUPS", tmp_path / "self")
    monkeypatch.setattr(limits, "VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(limits, "_CGROUPS", tmp_path / "sys")
    return Hierarchy(tmp_path / "sys", own, limited), own, shared


def test_kills_are_found_by_the_path_of_the_process_and_not_those_of_other_jobs(
    hierarchy: tuple[Hierarchy, str, str | None], run: RunDir
) -> None:
    tree, own, shared = hierarchy
    before = LimitEvents.read()
    assert before.memory_bytes == 2 * 2**30
    for attempt in (1, 2):
        run.attempt(attempt).mkdir(exist_ok=True)
        limits.record_limits(run, attempt, 0)
    if shared is not None:
        other = f"{shared}/other/step_0"
        tree.add(other)
        tree.kill(other)
        assert LimitEvents.read().cause_since(before) == ""
        assert limits.limit_that_killed_agents(run, 1, [0]) == ""
    tree.kill(own)
    assert LimitEvents.read().cause_since(before) == MEMORY
    assert limits.limit_that_killed_agents(run, 2, [0]) == MEMORY


@pytest.mark.parametrize("hierarchy", ["Slurm"], indirect=True)
def test_a_job_tells_of_its_step_that_is_gone_and_the_node_tells_nothing_of_a_job(
    hierarchy: tuple[Hierarchy, str, str | None], run: RunDir
) -> None:
    tree, own, shared = hierarchy
    assert shared is not None
    tree.add(f"{JOB}/step_batch/user/task_0")
    tree.add(f"{shared}/job_42/step_0/user/task_0")
    for node in (0, 1, 2):
        limits.record_limits(run, 1, node)
    shutil.rmtree(tree.folder(f"{JOB}/step_0"))
    tree.kill(f"{shared}/job_42/step_0/user/task_0")
    assert limits.limit_that_killed_agents(run, 1, [0]) == ""
    tree.kill(own)
    assert limits.limit_that_killed_agents(run, 1, [1]) == MEMORY
    shutil.rmtree(tree.folder(JOB))
    assert limits.limit_that_killed_agents(run, 1, [2]) == ""


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/no-such-file"),
            r"the disk of /tmp is full \([\d.]+ \S+ of [\d.]+ \S+ free\)",
        ),
        (
            CheckpointError(
                "the checkpoint could not be written", where="rank 1, /tmp/no-such-file", value="No space left on device"
            ),
            r"the disk of /tmp is full \(.* free\)",
        ),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), r"the limit of [\d,]+ open files \(ulimit -n\) was reached"),
        (RuntimeError("can't start new thread"), r"the limit on processes and threads \(pids.max, ulimit -u\) was reached"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), r"there was no main memory left.*"),
        (RuntimeError("[pair.cc:553] Connection closed by peer"), ""),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), ""),
    ],
)
def test_exceptions_that_come_from_a_limit_name_it(tmp_path: Path, error: Exception, cause: str) -> None:
    assert re.fullmatch(cause, cause_of(error, tmp_path))
    wrapped = RuntimeError("as it says")
    wrapped.__cause__ = error
    assert re.fullmatch(cause, cause_of(wrapped, tmp_path))


def test_the_rank_that_could_not_write_is_named_by_whichever_rank_reports_it(tmp_path: Path) -> None:
    text = "CheckpointError: the checkpoint could not be written\n  where:  rank 1, /runs/a\n  value:  Too many open files"
    other, own = (ErrorRecord(text, at=at, cause=cause) for at, cause in ((8.0, "of rank 0"), (9.0, "of rank 1")))
    exits = [RankExit(0, 1, 8.0, other), RankExit(1, 1, 9.0, own)]
    first = failure_record.from_rank_exits(exits, RunDir(tmp_path), 1)
    assert first.line == "rank 1: of rank 1: the checkpoint could not be written"
    assert failure_record.from_rank_exits(exits[:1], RunDir(tmp_path), 1).rank == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, "2m"):
        yield tmp_path


def test_a_full_disk_still_takes_the_records_of_an_end(disk: Path) -> None:
    run = RunDir(disk)
    run.attempt(1).mkdir(parents=True)
    postmortem.reserve_disk_space(run, 1)
    with pytest.raises(OSError, match="No space left"):
        (disk / "filler").write_bytes(b"x" * 2**21)
    postmortem.release_disk_space(run, 1)
    verdict = AttemptConcluded(state="failed", cause=Cause.FAILURE, message="x" * 50_000)
    journal.append(run, 1, verdict)
    assert journal.read_end(run, 1) == verdict
    assert [path.name for path in run.attempt(1).iterdir()] == ["journal"]
