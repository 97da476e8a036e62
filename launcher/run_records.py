"""The JSON records that the processes of a run exchange, one dataclass each.

Times are seconds since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import json_records
from launcher.errors import Problem, RunError
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.shell_commands import launcher_command

# Part of every export; only folders with this file are ever replaced.
EXPORT_RECORD = "export.json"
RUNNING_STATES = ("pending", "running", "saving")


@dataclass(frozen=True)
class Status:
    """status.json. `job` is the backend's own handle."""

    state: str
    attempt: int
    step: int = 0
    max_steps: int | None = None
    job: dict[str, Any] | None = None
    message: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0


@dataclass(frozen=True)
class Attempt:
    """attempt.json: what an attempt starts from, and its scheduler job.

    `resume_step` None starts from the initial weights. `job` is None until the job has begun; `restart` counts the
    scheduler's earlier starts of that job. The node agents meet at `address` and `port`, on `interface` of the first of `nodes`.
    `ends_at` is the end of the job's time, `submitted_at` when the attempt was requested, `begun_at` when its machines became
    available. `automatic`: the launcher started it, not a person. `pinned`: a person requested exactly this step. `num_workers`
    is the number of workers that Ray holds for it, including idle ones.
    """

    resume_step: int | None
    job: str | None = None
    restart: int = 0
    nodes: tuple[str, ...] = ()
    address: str | None = None
    interface: str | None = None
    port: int | None = None
    ends_at: float | None = None
    submitted_at: float | None = None
    begun_at: float | None = None
    automatic: bool = False
    pinned: bool = False
    num_workers: int | None = None


@dataclass(frozen=True)
class CancelRequest:
    """cancel.json: a request to end the attempt. `save` asks for a checkpoint first."""

    asked_at: float = 0.0
    save: bool = True


@dataclass(frozen=True)
class Liveness:
    """driver.json: a heartbeat of the process that runs a run, for readers on other machines."""

    at: float
    host: str


@dataclass(frozen=True)
class FailureRecord:
    """The failure that ended an attempt: of a rank, or of a node's agent, for which `rank` and `exit_code` are None.

    `kind` is the name of the exception's class, or `killed` or `exit` for a rank that left no error record. `traceback` is empty
    if the message is sufficient. `host` is the node where the process ran, empty if the run has only one node. `step` is the
    number of optimizer steps that a rank had completed when it raised an exception, None before it had loaded the model.
    """

    rank: int | None
    kind: str
    message: str
    at: float | None = None
    exit_code: int | None = None
    traceback: str = ""
    log: str = ""
    host: str = ""
    step: int | None = None

    @property
    def source(self) -> str:
        """Name the process that failed: `rank 3 on n2`, or `the agent of n2`."""
        if self.rank is None:
            return f"the agent of {self.host}" if self.host else "the node's agent"
        return f"rank {self.rank} on {self.host}" if self.host else f"rank {self.rank}"

    @property
    def line(self) -> str:
        """The process that failed and the first line of the message."""
        return f"{self.source}: {self.message.partition(chr(10))[0]}"


@dataclass(frozen=True)
class FinalFailure:
    """final.json: a rank's failure that a restart would repeat; because of it, no node agent restarts its ranks."""

    rank: int
    kind: str
    message: str
    at: float


@dataclass(frozen=True)
class RestartRecord:
    """restart-NNN.json: why node agents restarted the ranks within an attempt. `saved_step` is the newest checkpoint then."""

    first_failure: FailureRecord
    saved_step: int | None


@dataclass(frozen=True)
class OutcomeRecord:
    """outcome.json: how training ended, written by rank 0. See launcher.train.finish.Outcome for the values."""

    state: str
    reason: str
    step: int
    message: str
    checkpoint: str = ""


@dataclass(frozen=True)
class NodeRecord:
    """node-NNNNN.json: how a node's ranks ended, written by its agent; under Ray one per worker, numbered by its rank.

    `stopped`: the ranks were asked to stop. `killed`: they did not stop in time. `problems` are the findings of the node checks;
    if there are any, the ranks were never started.
    """

    node: int
    ended_at: float
    host: str = ""
    started_at: float | None = None
    stopped: bool = False
    killed: bool = False
    first_failure: FailureRecord | None = None
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class ExitRecord:
    """exit.json: how an attempt ended.

    `cause` is None for a run on this machine, which nothing restarts. `began_step` and `saved_step` are the newest checkpoints at
    the attempt's start and end. `ended_at` is None if the end was judged later, by the run's next start. `reason` and
    `checkpoint` come from outcome.json.
    """

    state: str
    step: int = 0
    message: str = ""
    cause: Cause | None = None
    began_step: int | None = None
    saved_step: int | None = None
    bad_nodes: tuple[str, ...] = ()
    first_failure: FailureRecord | None = None
    host: str = ""
    started_at: float | None = None
    ended_at: float | None = None
    reason: str = ""
    checkpoint: str = ""


@dataclass(frozen=True)
class MirrorRecord:
    """mirror.json: which parts of a run the mirror at `url` holds.

    `steps` are the complete checkpoints there, `missing_steps` the others. `failure` is the last error, None after a success.
    """

    url: str
    steps: tuple[int, ...]
    missing_steps: tuple[int, ...]
    failure: str | None
    at: float


@dataclass(frozen=True)
class DrainRecord:
    """drained.json: Ray announced the loss of these nodes, by name, while the attempt ran."""

    nodes: tuple[str, ...]
    at: float


@dataclass(frozen=True)
class ExportRecord:
    """export.json in an export: its checkpoint and dtype; `tensors_compared` tensors equal the engine's."""

    step: int
    plan_digest: str
    dtype: str
    tensors_compared: int = 0


@dataclass(frozen=True)
class LostCoordinator:
    """coordinator-lost.json: the process of the run's coordinator on Ray ended while the attempt ran."""

    at: float


def lost_coordinator_file(run: RunDir, attempt: int) -> Path:
    return run.attempt(attempt) / "coordinator-lost.json"


def outcome_file(run: RunDir, attempt: int) -> Path:
    return run.attempt(attempt) / "outcome.json"


def final_file(run: RunDir, attempt: int) -> Path:
    return run.attempt(attempt) / "final.json"


def node_file(run: RunDir, attempt: int, node: int) -> Path:
    return run.attempt(attempt) / f"node-{node:05d}.json"


def restart_file(run: RunDir, attempt: int, number: int) -> Path:
    return run.attempt(attempt) / f"restart-{number:03d}.json"


def exit_file(run: RunDir, attempt: int) -> Path:
    return run.attempt(attempt) / "exit.json"


def export_file(run: RunDir) -> Path:
    return run.export / EXPORT_RECORD


def read_outcome(run: RunDir, attempt: int) -> OutcomeRecord | None:
    """Return the record of rank 0, or None if it left none.

    Raises:
        RunError: if it cannot be read or is damaged, as for the other readers here.
    """
    return json_records.read_if_present(OutcomeRecord, outcome_file(run, attempt), _remove("the nodes' records"))


def read_node(run: RunDir, attempt: int, node: int) -> NodeRecord | None:
    """Return the record of a node's agent, or None if it left none."""
    return json_records.read_if_present(NodeRecord, node_file(run, attempt, node), _remove("the other nodes' records"))


def read_restarts(run: RunDir, attempt: int) -> list[RestartRecord]:
    """Return the restarts of the ranks within an attempt, oldest first."""
    files = sorted(run.attempt(attempt).glob("restart-*.json"))
    return [json_records.read(RestartRecord, file, _remove("its other restarts")) for file in files]


def read_exit(run: RunDir, attempt: int) -> ExitRecord | None:
    """Return how an attempt ended, or None if that is not recorded."""
    return json_records.read_if_present(ExitRecord, exit_file(run, attempt), _remove("the ranks' and the nodes' records"))


def read_export(run: RunDir) -> ExportRecord | None:
    """Return the record of the run's export, or None if there is no export or no record in it."""
    try:
        return json_records.read_if_present(ExportRecord, export_file(run), "")
    except RunError:
        return None


def read_cancel(run: RunDir, attempt: int) -> CancelRequest | None:
    """Return the request to end an attempt, or None if there is none."""
    return json_records.read_if_present(
        CancelRequest, run.cancel(attempt), f"ask again with: {launcher_command('cancel', run.root)}"
    )


def _remove(others: str) -> str:
    return f"remove the file; the attempt is then judged by {others}"
