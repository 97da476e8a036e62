"""Check that `status`, the alert and the end of `logs` all name first what ended an attempt or a run."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from forked import Launch, require_exit
from hand_made import end_of

from launcher.tracking.jsonl import read_events

_CONSEQUENCE = r"(; no record from [\w, ]+)?(; as a consequence, .*)?( \(srun ended with \d+\))?"
_RESUME = r"; continue with: python -m launcher resume \S+"
# Each fault, with a pattern for the line that names it.
CAUSES = {
    # On this machine.
    "segv": r"rank 1: killed by SIGSEGV \(a segmentation fault; its log ends with the stacks\)",
    # Linux counts kills of memory limits for the whole machine: another test may fill a memory group of its own at this moment.
    "kill": r"rank 1: (the node ran out of memory, and the kernel killed a process: )?killed by SIGKILL",
    "stop": r"rank 1: \(pid \d+\) is stopped by a signal \(SIGSTOP\): no progress for \d+ s "
    r"(in step \d+; killed it; rank 0 waits in collective \d+ of process group \S+( \(\w+\))?, \w+ of [\d.]+ \w+; "
    r"rank 1 left no record|while saving after step \d+; killed it.*)",
    "memory": r"rank [01]: the memory limit of [\d.]+ [MG]iB of this job or container was exceeded, "
    r"and the kernel killed a process: killed by SIGKILL",
    "processes": r"rank [01]: the limit on processes and threads \(pids\.max, ulimit -u\) was reached: .*",
    "open_files": r"rank 1: the limit of \d+ open files \(ulimit -n\) was reached: .*",
    "disk": r"rank [01]: the disk of \S+ is full \([\d.]+ \S+ of [\d.]+ MiB free\): .*",
    "agent_memory": r"the memory limit( of [\d.]+ [MG]iB)? of this job or container was exceeded, "
    r"and the kernel killed a process: the node agent ended without recording a result",
    # On Slurm.
    "slurm_node": rf"n\d was lost \(Slurm: node failure\){_CONSEQUENCE}",
    "slurm_agent": rf"the agent of n\d was killed \(srun: Killed\){_CONSEQUENCE}",
    "slurm_batch_script": rf"the batch script of job \d+ was killed by SIGKILL{_RESUME}",
    "slurm_requeue": r"the job was requeued at step \d+ without saving",
    # On Ray.
    "ray_node": rf"Ray has lost n\d(; Ray has lost n\d)?{_CONSEQUENCE}",
    "ray_raylet": r"(the run's driver or )?the raylet of \S+ \(Ray's process on the driver's node\) was killed or has ended"
    + _RESUME,
    "ray_worker": r"Ray's worker on \S+ was killed or has ended",
}


def assert_run_named_first(launch: Launch, run: Path, fault: str, alert: str = "the attempt failed: ", **env: str) -> None:
    """Check that the run failed with this fault in all three places. `alert` is the alert's prefix, empty if none is sent."""
    shown = json.loads(launch("status", str(run), "--json", **env).stdout)
    line = shown["message"].partition("\n")[0]
    assert shown["state"] == "failed"
    assert re.fullmatch(CAUSES[fault], line), shown["message"]
    assert f"state       failed: {line}" in launch("status", str(run), **env).stdout
    if alert:
        assert _alerts(run)[-1][1].partition("\n")[0] == f"{alert}{line}"
    assert _last_line(launch("logs", str(run), **env)) == f"attempt {shown['attempt']} failed: {line}"


def assert_attempt_named_first(launch: Launch, run: Path, attempt: int, fault: str, **env: str) -> None:
    """Check that the attempt ended with this fault in all three places, and that the run goes on with another attempt."""
    ended = end_of(run, attempt)
    line = ended["message"].partition("\n")[0]
    assert re.fullmatch(CAUSES[fault], line), ended["message"]
    alert = f"the attempt ended ({ended['cause']}): {ended['message']}; runs again"
    assert (attempt, alert) in _alerts(run)
    shown = json.loads(launch("status", str(run), "--json", **env).stdout)
    assert alert in [entry["text"] for entry in shown["alerts"]]
    how = "failed" if ended["cause"] == "infrastructure" else f"ended ({ended['cause']})"
    assert _last_line(launch("logs", str(run), "--attempt", str(attempt), **env)) == f"attempt {attempt} {how}: {line}"


def _alerts(run: Path) -> list[tuple[int, str]]:
    # On a full disk the last line may be incomplete; read_events skips it.
    return [(event["attempt"], event["text"]) for event in read_events(run / "events.jsonl") if event["kind"] == "alert"]


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    require_exit(done)
    return done.stdout.splitlines()[-1]
