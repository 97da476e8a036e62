"""What Slurm knows of a job: from squeue as long as slurmctld remembers it, then from the accounting."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.clusters.slurm.commands import SlurmError, SlurmSilent, slurm

# Slurm's words for a job that has ended for good; with any other it runs, waits, or is about to.
FINAL_STATES = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)

# No name of a job or a node can hold it, as any printable character could be in a name.
_SEPARATOR = "\x1f"
_SQUEUE_FIELDS = ("JobArrayID", "Name", "State", "Reason", "StartTime", "EndTime", "RestartCnt", "NodeList")
_SACCT_FIELDS = ("JobID", "JobName", "State", "Reason", "End", "NodeList", "Submit")
# Clocks of login nodes and controllers differ, and sacct's times have no zone.
_CLOCK_SLACK_S = 86400.0
# Slurm looks at time limits once in half a minute or so.
_NEAR_END_S = 60.0
# In `scontrol show job` these stand last on their line, and their value may hold anything.
_FREE_TEXT = ("JobName", "Comment", "AdminComment", "SystemComment", "Extra", "Command", "WorkDir", "StdErr", "StdIn", "StdOut")


@dataclass(frozen=True)
class Job:
    """A job as Slurm tells it; times are seconds since the epoch.

    `state` and `reason` are Slurm's own words, `reason` empty where there is none. While `queued` is True, nothing the
    state says is final. `start_estimate` is when Slurm expects a waiting job to start. `end_time` is when an ended job
    ended, and when a running one reaches its time limit.
    """

    id: str
    state: str
    reason: str
    start_estimate: float | None
    end_time: float | None
    restarts: int
    node_list: str
    queued: bool


def job(job_id: str, submitted_at: float, name: str, patience_s: float = 0.0) -> Job | None:
    """The job `job_id` that was submitted under `name`, at `submitted_at` seconds since the epoch.

    None where Slurm knows nothing of it: it is too long ago and there is no accounting, or the accounting has not got its
    end, or Slurm has given its number to a job of another name.

    Raises:
        SlurmError: where Slurm does not answer within the patience, so that the job's state is unknown.
    """
    return jobs({job_id: name}, patience_s).get(job_id) or _accounted(job_id, submitted_at, name, patience_s)


def jobs(names: Mapping[str, str], patience_s: float = 0.0) -> dict[str, Job]:
    """Those of the jobs, given as number and name, that slurmctld remembers, by their numbers; one call for all.

    Slurm forgets a job some minutes after its end (MinJobAge, 300 s by default).

    Raises:
        SlurmError: where slurmctld does not answer.
    """
    if not names:
        return {}
    columns = ",".join(f"{field}:{_SEPARATOR}" for field in _SQUEUE_FIELDS)
    try:
        # --array: a task of an array is a job of its own also while it waits.
        asked = ("--noheader", "--array", "--states=all", f"--jobs={','.join(names)}", f"--Format={columns}")
        shown = slurm("squeue", *asked, patience_s=patience_s)
    except SlurmError as error:
        # Said of a single number only; among several, those it does not know are left out.
        if "Invalid job id specified" in error.problems[0].value:
            return {}
        raise
    found = {}
    for row in _rows(shown, len(_SQUEUE_FIELDS)):
        number, name, state, reason, start, end, restarts, nodes = row
        if names.get(number) == name:
            waits = state not in FINAL_STATES and not nodes
            found[number] = Job(
                id=number,
                state=state,
                reason=_said(reason),
                # A held job that was requeued brings the time before which it may not start.
                start_estimate=None if _held(reason) or not waits else _time(start),
                end_time=None if waits else _time(end),
                restarts=int(restarts),
                node_list=nodes,
                queued=state not in FINAL_STATES,
            )
    return found


def _held(reason: str) -> bool:
    """True where the job waits for a person to release it."""
    return re.search("held|hold", reason, re.IGNORECASE) is not None


def _accounted(job_id: str, submitted_at: float, name: str, patience_s: float) -> Job | None:
    """The job's end from sacct, which has a record of each time that the job was run."""
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(submitted_at - _CLOCK_SLACK_S))
    form = ("--noheader", "--parsable2", f"--delimiter={_SEPARATOR}", f"--format={','.join(_SACCT_FIELDS)}")
    try:
        # Without --duplicates a later job with the same number would hide this one.
        asked = ("--allocations", "--duplicates", f"--jobs={job_id}", f"--starttime={since}", *form)
        shown = slurm("sacct", *asked, patience_s=patience_s)
    except SlurmError as error:
        if "accounting storage is disabled" in error.problems[0].value:
            return None
        raise
    rows = [row for row in _rows(shown, len(_SACCT_FIELDS)) if row[:2] == [job_id, name]]
    if not rows:
        return None
    _, _, state, reason, end, nodes, _ = max(rows, key=lambda row: _time(row[-1]) or 0)
    # "CANCELLED by 1000"
    state = state.split()[0]
    if state not in FINAL_STATES:
        return None
    return Job(job_id, state, _said(reason), None, _time(end), len(rows) - 1, _said(nodes), queued=False)


def details(job_id: str, patience_s: float = 0.0) -> Mapping[str, str]:
    """Everything that slurmctld knows of a job, under the names of `scontrol show job`; times in seconds since the epoch.

    Raises:
        SlurmError: where slurmctld does not answer within the patience or has no such job.
    """
    # A line per group, and not --oneliner: only there does a free text end where its line ends.
    record = slurm("scontrol", "show", "job", job_id, patience_s=patience_s).strip().split("\n\n")[0]
    found: dict[str, str] = {}
    for line in record.splitlines():
        for key, value in _pairs(line.strip()):
            # The first counts: a comment may hold a line break, and then what looks like a key.
            found.setdefault(key, value)
    return found


def state_beneath(job_id: str, restarts: int, ends_at: float | None, patience_s: float = 0.0) -> str:
    """What a job that is COMPLETING will be: CANCELLED after scancel, PENDING after a requeue; empty where it is not told.

    The JSON form tells it, which some sites build without; else it is told from what else is known of the job. `restarts`
    is how often it had been started again when this start began, `ends_at` when its time is over.
    """
    try:
        found = json.loads(slurm("scontrol", "show", "job", job_id, "--json", patience_s=patience_s))["jobs"][0]["job_state"]
    except SlurmSilent:
        return ""
    except (SlurmError, ValueError, LookupError):
        try:
            return _told_by_details(details(job_id, patience_s), restarts, ends_at)
        except SlurmError:
            return ""
    # A word in older versions, a list since 23.02.
    words = [found] if isinstance(found, str) else found
    return next((word for word in words if word != "COMPLETING"), "")


def _told_by_details(found: Mapping[str, str], restarts: int, ends_at: float | None) -> str:
    """CANCELLED where Slurm has put the job's end behind us and nothing else explains it, PENDING after a requeue."""
    state = found.get("JobState", "")
    if state == "CANCELLED":
        return state
    # slurmctld counts a requeue as it accepts it.
    if found.get("Restarts", "").isdigit() and int(found["Restarts"]) > restarts:
        return "PENDING"
    now, end = time.time(), _time(found.get("EndTime", ""))
    ended = state in ("RUNNING", "COMPLETING") and end is not None and end <= now
    preempted = found.get("PreemptTime") != "None"
    # A lost node or the time limit is given as the reason; scancel gives none.
    explained = preempted or found.get("Reason") != "None" or (ends_at is not None and now > ends_at - _NEAR_END_S)
    return "CANCELLED" if ended and not explained else ""


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    while line:
        key, _, rest = line.partition("=")
        value, _, line = (rest, "", "") if key in _FREE_TEXT else rest.partition(" ")
        yield key, value
        line = line.lstrip()


def _rows(shown: str, width: int) -> Iterator[list[str]]:
    for line in shown.split("\n"):
        row = line.split(_SEPARATOR)
        # squeue ends the last column with a separator as well.
        if len(row) >= width:
            yield row[:width]


def _time(text: str) -> float | None:
    return float(text) if text.isdigit() else None


def _said(text: str) -> str:
    return "" if text in ("None", "None assigned", "(null)") else text


# Beginnings of Slurm's reasons; the first that fits counts. {id} is the job's number.
_RELEASE = "let it go with: scontrol release {id}"
_TOO_MUCH = "it will not start; cancel it and ask for less or for another"
_REASONS: tuple[tuple[str, str], ...] = (
    (r"Resources", "waiting for nodes"),
    (r"Priority", "waiting for nodes, behind jobs of higher priority"),
    (
        r"DependencyNeverSatisfied",
        "a job that it depends on did not end as it had to, so it will never start; cancel it, or drop the dependency with: "
        "scontrol update JobId={id} Dependency=",
    ),
    (r"Dependency", "waiting for the jobs that it depends on"),
    (r"JobHeldUser", f"held; {_RELEASE}"),
    (r"JobHeldAdmin", "held by an administrator; ask them why"),
    (r"job.requeued.in.held.state", f"requeued and held; {_RELEASE}"),
    (
        r"launch.failed.requeued.held",
        f"Slurm could not start it on its nodes, and holds it; ask the administrators what failed, then {_RELEASE}",
    ),
    (r"JobHoldMaxRequeue", f"requeued so often that Slurm holds it; {_RELEASE}"),
    (r"BeginTime", "not to start yet; after a requeue Slurm waits for about two minutes"),
    (
        r"PartitionTimeLimit",
        f"cluster.time is above what the partition allows (sinfo -o '%P %l'); {_TOO_MUCH} partition",
    ),
    (r"PartitionNodeLimit", f"cluster.nodes is beyond what the partition allows or has up; {_TOO_MUCH} partition"),
    (r"Partition(Down|Inactive)", "the partition is closed; wait for the administrators, or use another cluster.partition"),
    (
        r"ReqNodeNotAvail|Nodes required for job are",
        "nodes that it needs are down, drained or reserved; sinfo -R says why; wait, or ask for others",
    ),
    (r"NodeDown", "a node that it needs is down; sinfo -R says why"),
    (
        r"QOS.*(PerJob|PerNode|Min)|QOSTimeLimit",
        f"it asks for more than its QOS allows one job, or for less; {_TOO_MUCH} cluster.qos",
    ),
    (r"(QOS|MaxJobsPer|MaxSubmit)", "its QOS is used up by other jobs; wait until some end, or use another cluster.qos"),
    (r"Assoc.*(PerJob|PerNode|WallDuration)", f"it asks for more than its account allows one job; {_TOO_MUCH} cluster.account"),
    (r"Assoc", "its account is used up by other jobs; wait until some end, or use another cluster.account"),
    (r"InvalidAccount", "its account is no longer valid for you; cancel it and use another cluster.account"),
    (r"InvalidQOS", "its QOS is no longer valid for you; cancel it and use another cluster.qos"),
    (r"ReservationDeleted", "its reservation is gone; cancel it and use another cluster.reservation"),
    (r"Reservation", "waiting for its reservation to begin"),
    (r"Licenses", "waiting for licences"),
    (r"BadConstraints", "no node is as it asks; cancel it and change cluster.constraint or what it asks of a node"),
    (r"Cleaning", "processes of its last run are being ended"),
)


def explain(job: Job) -> str:
    """Why a job is in its state, in plain words with what to do, and when Slurm expects it to start."""
    words = job.state.lower().replace("_", " ")
    for pattern, meaning in _REASONS:
        if job.queued and re.match(pattern, job.reason):
            words = meaning.format(id=job.id)
            break
    said = f"{words} ({job.reason})" if job.reason else words
    # An estimate that has gone by is one that Slurm has not renewed yet.
    if job.start_estimate is None or job.start_estimate <= time.time():
        return said
    return f"{said}; Slurm expects a start at {_clock(job.start_estimate)}"


def _clock(at: float) -> str:
    day, now = time.localtime(at), time.localtime()
    return time.strftime("%H:%M" if day[:3] == now[:3] else "%Y-%m-%d %H:%M", day)
