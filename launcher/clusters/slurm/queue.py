"""Job states: from squeue while slurmctld remembers the job, then from accounting."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.clusters.slurm.commands import SEPARATOR, SlurmError, SlurmUnreachable, slurm, slurm_table, split_rows

# States of a job that has ended; in any other state, it runs or will run.
FINAL_STATES = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)

_SQUEUE_FIELDS = ("JobArrayID", "Name", "State", "Reason", "StartTime", "RestartCnt", "NodeList", "exit_code")
_SACCT_FIELDS = ("JobID", "JobName", "State", "Reason", "NodeList", "ExitCode", "Submit")
# The clocks of the login node and the controller may differ, and sacct's times have no time zone.
_CLOCK_SLACK_S = 86400.0
# Slurm checks time limits about twice a minute.
_NEAR_END_S = 60.0
# MUNGE, which Slurm authenticates with, refuses nodes whose clocks differ more.
_CLOCK_TOLERANCE_S = 300.0
# States of a node that Slurm cannot reach, as in DOWN+NOT_RESPONDING; older versions mark it with an asterisk.
_LOST_NODE = re.compile(r"\b(DOWN|FAIL|ERROR|NOT_RESPONDING|NO_RESPOND)\b|\*$")
# In `scontrol show job`, these fields come last on their line, and their values may contain anything.
_FREE_TEXT = ("JobName", "Comment", "AdminComment", "SystemComment", "Extra", "Command", "WorkDir", "StdErr", "StdIn", "StdOut")


@dataclass(frozen=True)
class Job:
    """A Slurm job; times are seconds since the epoch.

    `state` and `reason` are Slurm's; `reason` is empty if there is none. `queued` is True until the state is final.
    `start_estimate` is when Slurm expects a waiting job to start. `exit_signal` is the signal that ended the batch script, or 0.
    """

    id: str
    state: str
    reason: str
    start_estimate: float | None
    restarts: int
    node_list: str
    queued: bool
    exit_signal: int = 0


def read_job(job_id: str, submitted_at: float, name: str, retry_s: float = 0.0) -> Job | None:
    """Read the state of the job `job_id`, which was submitted as `name` at `submitted_at` seconds since the epoch.

    Returns None if Slurm has no record of it: it ended too long ago and there is no accounting, accounting has not recorded its
    end, or Slurm has reused its number for a job with another name.

    Raises:
        SlurmError: if Slurm does not answer within `retry_s` seconds; the state is then unknown.
    """
    return read_jobs({job_id: name}, retry_s).get(job_id) or _read_accounting(job_id, submitted_at, name, retry_s)


def read_jobs(names: Mapping[str, str], retry_s: float = 0.0) -> dict[str, Job]:
    """Read the states of several jobs in one call; `names` maps their numbers to their names.

    Returns, keyed by number, the jobs that slurmctld remembers: it forgets them a few minutes after their end (MinJobAge, 300 s
    by default).

    Raises:
        SlurmError: if slurmctld does not answer.
    """
    if not names:
        return {}
    try:
        # --array lists each task of a waiting array.
        options = ("--noheader", "--array", "--states=all", f"--jobs={','.join(names)}")
        rows = slurm_table("squeue", *options, fields=_SQUEUE_FIELDS, retry_s=retry_s)
    except SlurmError as error:
        # squeue fails for a single unknown number, but omits unknown numbers among several.
        if "Invalid job id specified" in error.problems[0].value:
            return {}
        raise
    known = {}
    for number, name, state, reason, start, restarts, nodes, exit_code in rows:
        if names.get(number) == name:
            is_waiting = state not in FINAL_STATES and not nodes
            known[number] = Job(
                id=number,
                state=state,
                reason=_parse_value(reason),
                # For a held job that was requeued, this is its earliest start time, not an estimate.
                start_estimate=_parse_time(start) if is_waiting and not re.search("held|hold", reason, re.IGNORECASE) else None,
                restarts=int(restarts),
                node_list=nodes,
                queued=state not in FINAL_STATES,
                exit_signal=_parse_signal(exit_code),
            )
    return known


def _read_accounting(job_id: str, submitted_at: float, name: str, retry_s: float) -> Job | None:
    """Read the end of a job from sacct, which has one record per start of the job."""
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(submitted_at - _CLOCK_SLACK_S))
    output_format = ("--noheader", "--parsable2", f"--delimiter={SEPARATOR}", f"--format={','.join(_SACCT_FIELDS)}")
    try:
        # Without --duplicates, a later job with the same number would hide this one.
        options = ("--allocations", "--duplicates", f"--jobs={job_id}", f"--starttime={since}", *output_format)
        output = slurm("sacct", *options, retry_s=retry_s)
    except SlurmError as error:
        if "accounting storage is disabled" in error.problems[0].value:
            return None
        raise
    rows = [row for row in split_rows(output, len(_SACCT_FIELDS)) if row[:2] == [job_id, name]]
    if not rows:
        return None
    _, _, state, reason, nodes, exit_code, _ = max(rows, key=lambda row: _parse_time(row[-1]) or 0)
    # The state may be followed by details, as in "CANCELLED by 1000".
    state = state.split()[0]
    if state not in FINAL_STATES:
        return None
    return Job(job_id, state, _parse_value(reason), None, len(rows) - 1, _parse_value(nodes), False, _parse_signal(exit_code))


def state_of_start(job_id: str, number: int, retry_s: float = 0.0) -> str:
    """Return how start `number` of a job, counted from 0, ended, such as REQUEUED or NODE_FAIL; "" without accounting."""
    options = ("--allocations", "--duplicates", f"--jobs={job_id}", "--noheader", "--parsable2", "--format=Submit,State")
    try:
        rows = [line.split("|") for line in slurm("sacct", *options, retry_s=retry_s).splitlines()]
    except SlurmError:
        return ""
    states = [row[1].split()[0] for row in sorted(rows) if len(row) == 2 and row[1].strip()]
    return states[number] if number < len(states) else ""


def find_lost_nodes(nodes: Iterable[str], since: float, retry_s: float = 0.0) -> list[str] | None:
    """Return the `nodes` that Slurm has lost, or that have booted since `since`, in seconds since the epoch.

    Cloud nodes are also booted for the next job after a preemption, so their boot does not count. None if Slurm does not answer
    or hides its nodes.
    """
    names = list(dict.fromkeys(nodes))
    try:
        output = slurm("scontrol", "--oneliner", "show", "node", ",".join(names), retry_s=retry_s)
    except SlurmError:
        return None
    known = re.findall(r"^NodeName=(\S+) .*?\bState=(\S+) (?:.*?\bBootTime=(\d+))?", output, re.MULTILINE)
    booted_since = {node for node, state, booted in known if not re.search(r"\bCLOUD\b", state) and float(booted or 0) > since}
    lost = booted_since | {node for node, state, _ in known if _LOST_NODE.search(state)}
    return [name for name in names if name in lost] if {node for node, *_ in known} >= set(names) else None


def read_details(job_id: str, retry_s: float = 0.0) -> Mapping[str, str]:
    """Read all fields of `scontrol show job`; times are seconds since the epoch.

    Raises:
        SlurmError: if slurmctld does not answer within `retry_s` seconds, or has no such job.
    """
    # Do not use --oneliner: in the long form, free text ends with its line.
    record = slurm("scontrol", "show", "job", job_id, retry_s=retry_s).strip().split("\n\n")[0]
    fields: dict[str, str] = {}
    for line in map(str.strip, record.splitlines()):
        while line:
            key, _, rest = line.partition("=")
            value, _, line = (rest, "", "") if key in _FREE_TEXT else rest.partition(" ")
            # The first value counts: a comment with a line break may contain text that looks like a key.
            fields.setdefault(key, value)
            line = line.lstrip()
    return fields


def state_beneath(job_id: str, restarts: int, ends_at: float | None, retry_s: float = 0.0) -> str:
    """Return the state that follows COMPLETING: CANCELLED after scancel, PENDING after a requeue, "" if unknown.

    Slurm reports it in its JSON output, which not all sites have; otherwise it is derived from the job's other fields.
    `restarts` is the number of restarts when this start began, `ends_at` the end of the job's time limit.
    """
    try:
        state = json.loads(slurm("scontrol", "show", "job", job_id, "--json", retry_s=retry_s))["jobs"][0]["job_state"]
    except SlurmUnreachable:
        return ""
    except (SlurmError, ValueError, LookupError):
        try:
            return _state_from_details(read_details(job_id, retry_s), restarts, ends_at)
        except SlurmError:
            return ""
    # A string in older versions, a list since 23.02.
    states = [state] if isinstance(state, str) else state
    return next((state for state in states if state != "COMPLETING"), "")


def _state_from_details(fields: Mapping[str, str], restarts: int, ends_at: float | None) -> str:
    """Return CANCELLED if the job's end time has passed for no other reason, PENDING after a requeue, else ""."""
    state = fields.get("JobState", "")
    if state == "CANCELLED":
        return state
    # slurmctld counts a requeue when it accepts the requeue.
    if fields.get("Restarts", "").isdigit() and int(fields["Restarts"]) > restarts:
        return "PENDING"
    start, end, limit_s = (
        _parse_time(fields.get("StartTime", "")),
        _parse_time(fields.get("EndTime", "")),
        _parse_duration(fields.get("TimeLimit", "")),
    )
    # Until the job is ended, EndTime is its start plus the time limit, which an administrator may change.
    latest = start + limit_s if start is not None and limit_s is not None else ends_at
    has_ended = state in ("RUNNING", "COMPLETING") and end is not None
    if has_ended and end is not None:
        # The controller's clock may be ahead of this node's.
        has_ended = end <= time.time() + _CLOCK_TOLERANCE_S if latest is None else end < latest - _NEAR_END_S
    # A lost node or the time limit appears as the reason; scancel sets no reason.
    has_cause = fields.get("PreemptTime") != "None" or fields.get("Reason") != "None"
    return "CANCELLED" if has_ended and not has_cause else ""


def _parse_time(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def _parse_duration(text: str) -> float | None:
    """Return the seconds of a duration such as 1-02:30:00 or 10:00; None for UNLIMITED."""
    days, _, rest = text.rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in (days or "0", *parts)):
        return None
    seconds = 0.0
    for part in parts:
        seconds = 60 * seconds + int(part)
    return 86400 * int(days or 0) + seconds


def _parse_signal(exit_code: str) -> int:
    """Return the second number of an exit code such as 0:9."""
    _, _, number = exit_code.partition(":")
    return int(number) if number.isdigit() else 0


def _parse_value(text: str) -> str:
    return "" if text in ("None", "None assigned", "(null)") else text


# Patterns for the beginning of Slurm's reasons, and the text to show; the first match counts. {id} is the job's number.
_TOO_MUCH = "the job will not start; cancel it and request less, or another"
_REASONS: tuple[tuple[str, str], ...] = (
    (r"Resources", "waiting for nodes"),
    (r"Priority", "waiting for nodes, behind jobs of higher priority"),
    (
        r"DependencyNeverSatisfied",
        "a job that it depends on did not end as required, so it will never start; cancel it, or remove the dependency with: "
        "scontrol update JobId={id} Dependency=",
    ),
    (r"Dependency", "waiting for the jobs that it depends on"),
    (r"JobHeldAdmin", "held by an administrator; ask them for the reason"),
    (
        r"launch.failed.requeued.held",
        "Slurm could not start it on its nodes and holds it; ask the administrators for the cause, then release it with: "
        "scontrol release {id}",
    ),
    (r"JobHeld|JobHoldMaxRequeue|job.requeued.in.held", "held; release it with: scontrol release {id}"),
    (r"BeginTime", "its earliest start time has not come; after a requeue Slurm waits about two minutes"),
    (r"PartitionTimeLimit", f"cluster.time exceeds the partition's limit (sinfo -o '%P %l'); {_TOO_MUCH} partition"),
    (r"PartitionNodeLimit", f"cluster.nodes exceeds what the partition allows or has in service; {_TOO_MUCH} partition"),
    (r"Partition", "the partition is closed; wait for the administrators, or use another cluster.partition"),
    (
        r"ReqNodeNotAvail|Nodes required for job are|NodeDown",
        "nodes that it needs are down, drained or reserved; sinfo -R shows the reasons; wait, or request other nodes",
    ),
    (
        r"(QOS|Assoc).*(PerJob|PerNode|Min|TimeLimit|WallDuration)",
        f"it requests more than its QOS or account allows one job; {_TOO_MUCH} account or QOS",
    ),
    (r"QOS|Assoc|Max", "other jobs use up the limit of its QOS or account; wait until some end, or use another one"),
)


def explain(job: Job) -> str:
    """Explain a job's state: the reason, the remedy, and when Slurm expects the job to start."""
    explanation = job.state.lower().replace("_", " ")
    for pattern, meaning in _REASONS:
        if job.queued and re.match(pattern, job.reason):
            explanation = meaning.format(id=job.id)
            break
    if job.reason:
        explanation = f"{explanation} ({job.reason})"
    # Slurm renews its estimates in the background, so an estimate may be in the past.
    if job.start_estimate is None or job.start_estimate <= time.time():
        return explanation
    start, now = time.localtime(job.start_estimate), time.localtime()
    at = time.strftime("%H:%M" if start[:3] == now[:3] else "%Y-%m-%d %H:%M", start)
    return f"{explanation}; Slurm expects it to start at {at}"
