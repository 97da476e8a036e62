"""The rank's identity, and the collectives through which ranks share results, failures and reasons to stop; their bandwidth.

A rank that fails alone would leave the others waiting in their next collective. Therefore each function here that runs an action
raises on every rank if the action fails on one.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from launcher import errors
from launcher.errors import CheckpointError, DamagedCheckpoint, LauncherError, Problem, Superseded

T = TypeVar("T")
# Reasons to stop before the last step, by precedence: if ranks have different reasons, the first in this list counts.
STOP_REASONS = ("cancelled", "preempted", "limit")
# Connections that may wait to be accepted: all ranks of a large run connect at once.
_STORE_BACKLOG = 4096
# What the bandwidth is measured with; on GPUs, enough to saturate fast networks.
_BANDWIDTH_BYTES = {"cuda": 256 << 20, "cpu": 1 << 20}
# Error types that callers handle differently; every other error becomes a CheckpointError.
_KEPT_TYPES: tuple[type[LauncherError], ...] = (Superseded, DamagedCheckpoint)


@dataclass(frozen=True)
class RankInfo:
    """Identity of this process among the ranks of a run; `restart` counts the node agent's restarts within the attempt."""

    rank: int
    local_rank: int
    world_size: int
    attempt: int
    restart: int = 0

    @property
    def is_main(self) -> bool:
        """True on global rank 0, which logs and commits."""
        return self.rank == 0


def open_store(
    address: str, port: int, *, is_server: bool, num_members: int | None = None, timeout: timedelta = timedelta(minutes=5)
) -> dist.TCPStore:
    """Return the store at the IP address `address`. The server listens only there; port 0 chooses a free port.

    By default, TCPStore listens on all interfaces and answers whoever connects. With `num_members`, the server waits until that
    many members have connected.

    Raises:
        OSError: on the server, if the address does not belong to this machine or the port is taken.
        torch.distributed.DistNetworkError: if the server cannot be reached within `timeout`.
    """
    waits = num_members is not None
    if not is_server:
        return dist.TCPStore(address, port, num_members, False, timeout, wait_for_workers=waits)
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(_STORE_BACKLOG)
        port = listener.getsockname()[1]
        # The store closes the descriptor.
        return dist.TCPStore(
            address, port, num_members, True, timeout, wait_for_workers=waits, master_listen_fd=listener.detach()
        )


class StepReduction(NamedTuple):
    """Result of `all_reduce_step`: the loss summed over ranks, why to stop (None: continue), and the summed statistics."""

    loss: float
    stop_reason: str | None
    stats: list[float]


def all_reduce_step(loss: torch.Tensor, stop_reason: str | None, stats: list[float], device: torch.device) -> StepReduction:
    """Sum `loss` (a scalar) and `stats` over all ranks and agree on a reason to stop. Collective.

    One all-reduce carries all three, so a step has no collectives other than DeepSpeed's. Each rank puts its statistics at its
    own positions, with zeros elsewhere, so that the sum is the concatenation. Each reason is one of STOP_REASONS.
    """
    buffer = pack_step(loss, stop_reason, stats, device)
    dist.all_reduce(buffer)
    loss_sum, *rest = buffer.tolist()
    num_votes, summed_stats = rest[: len(STOP_REASONS)], rest[len(STOP_REASONS) :]
    agreed = next((reason for reason, count in zip(STOP_REASONS, num_votes, strict=True) if count), None)
    return StepReduction(loss_sum, agreed, summed_stats)


def pack_step(loss: torch.Tensor, stop_reason: str | None, stats: list[float], device: torch.device) -> torch.Tensor:
    """Return what `all_reduce_step` sums, fp64 on the device: the loss, a vote for each of STOP_REASONS, the statistics.

    Does not wait for the GPU, so the all-reduce is queued while the optimizer still steps.
    """
    votes = [float(stop_reason == reason) for reason in STOP_REASONS]
    buffer = copy_to_device(torch.tensor([0.0, *votes, *stats], dtype=torch.float64), device)
    buffer[0] = loss
    return buffer


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy without waiting for the GPU; CUDA would wait for memory that is not page-locked."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def measure_bus_bandwidth(device: torch.device) -> float:
    """Return the bus bandwidth in GB/s (10^9 bytes) of an all-reduce over all ranks: 256 MiB on GPUs, 1 MiB on CPUs.

    Collective. All ranks return the same number: the slowest rank's median of three, after a warm-up. The process group's
    timeout is the deadline.

    As in nccl-tests, algbw = bytes / seconds and busbw = algbw * 2(n-1)/n for n ranks, which can be compared with the hardware's
    speed for any n. With one rank it is 0. https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
    """
    buffer = torch.zeros(_BANDWIDTH_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    _time_all_reduce(buffer)
    seconds = torch.tensor(statistics.median(_time_all_reduce(buffer) for _ in range(3)), device=device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    num_ranks = dist.get_world_size()
    return buffer.nbytes / seconds.item() * 2 * (num_ranks - 1) / num_ranks / 1e9


def _time_all_reduce(buffer: torch.Tensor) -> float:
    def wait_for_device() -> None:
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)

    wait_for_device()
    started = time.perf_counter()
    dist.all_reduce(buffer)
    wait_for_device()
    return time.perf_counter() - started


def rank0_broadcast(rank_info: RankInfo, problem: str, action: Callable[[], T]) -> T:
    """Run `action` on rank 0 and return its result on every rank. Collective; the result is a JSON value.

    Raises:
        LauncherError: on every rank, if `action` raised one on rank 0.
        CheckpointError: on every rank, if `action` raised another error; `problem` says what could not be done.
    """
    result: T | None = None
    failure: dict[str, Any] | None = None
    caught: Exception | None = None
    if rank_info.is_main:
        try:
            result = action()
        except LauncherError as error:
            failure = _encode_failure(type(error), error.problems)
        except OSError as error:
            where, value = error.filename or "", error.strerror or str(error)
            failure = _encode_failure(CheckpointError, (Problem(problem, where=str(where), value=value),))
        except Exception as error:  # any error has to reach the other ranks, which would wait for this one
            caught, failure = error, _encode_failure(CheckpointError, to_problems(problem, error, rank_info.rank))
    result, failure = gather_json([result, failure])[0]
    if failure is not None:
        kind, problems = _decode_failure(failure)
        raise kind(problems) from caught
    return result


def run_on_all_ranks(device: torch.device, problem: str, action: Callable[[], T]) -> T:
    """Run `action` on every rank and return this rank's result. Collective.

    `problem` says what could not be done, for errors that are not a LauncherError.

    Raises:
        Superseded, DamagedCheckpoint: on every rank, if any rank raised one of these.
        CheckpointError: on every rank, if any rank raised another error; lists the problems of all ranks.
    """
    result: T | None = None
    caught: Exception | None = None
    try:
        result = action()
    except Exception as error:  # any error has to reach the other ranks, which would wait for this one
        caught = error
    failed = torch.tensor(int(caught is not None), device=device)
    dist.all_reduce(failed, op=dist.ReduceOp.MAX)
    if not failed:
        return result  # type: ignore[return-value]
    own_type = next((kind for kind in _KEPT_TYPES if isinstance(caught, kind)), CheckpointError)
    failures = gather_json(_encode_failure(own_type, to_problems(problem, caught, dist.get_rank())))
    gathered = [_decode_failure(failure) for failure in failures]
    kinds = {kind for kind, _ in gathered}
    raised = next((kind for kind in _KEPT_TYPES if kind in kinds), CheckpointError)
    raise raised(dict.fromkeys(one for _, problems in gathered for one in problems)) from caught


def gather_json(value: Any) -> list[Any]:
    """Return the JSON values of all ranks, in rank order. Collective.

    torch's object collectives unpickle what arrives, and a pickle from anyone who reaches a rank's socket could run code.

    Raises:
        TypeError: on every rank, if any rank's value is not JSON.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend() else torch.device("cpu")
    try:
        content = json.dumps({"value": value}).encode()
    except (TypeError, ValueError, RecursionError) as error:
        # The other ranks would wait for this one.
        content = json.dumps({"problem": f"{type(error).__name__}: {error}"}).encode()
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = len(content)
    dist.all_reduce(sizes)
    longest = int(sizes.max())
    own = torch.frombuffer(bytearray(content.ljust(longest)), dtype=torch.uint8).to(device)
    gathered = [torch.empty(longest, dtype=torch.uint8, device=device) for _ in range(len(sizes))]
    dist.all_gather(gathered, own)
    answers = [json.loads(bytes(of_rank.cpu().numpy())) for of_rank in gathered]
    if problems := [f"rank {rank}: {answer['problem']}" for rank, answer in enumerate(answers) if "problem" in answer]:
        raise TypeError(f"a rank gave a value that is not JSON: {'; '.join(problems)}")
    return [answer["value"] for answer in answers]


def _encode_failure(kind: type[LauncherError], problems: tuple[Problem, ...]) -> dict[str, Any]:
    return {"type": kind.__name__, "problems": [asdict(problem) for problem in problems]}


def _decode_failure(failure: dict[str, Any]) -> tuple[type[LauncherError], tuple[Problem, ...]]:
    """Return an error's type (CheckpointError if launcher.errors has none of that name) and its problems."""
    kind = getattr(errors, failure["type"], None)
    if not (isinstance(kind, type) and issubclass(kind, LauncherError)):
        kind = CheckpointError
    return kind, tuple(Problem(**problem) for problem in failure["problems"])


def to_problems(what: str, error: Exception | None, rank: int) -> tuple[Problem, ...]:
    """Convert an exception raised on `rank` into user-facing problems; empty for None."""
    if error is None:
        return ()
    if isinstance(error, LauncherError):
        return error.problems
    where = f"rank {rank}"
    if isinstance(error, OSError):
        where += f", {error.filename}" if error.filename else ""
        return (Problem(what, where=where, value=error.strerror or str(error)),)
    return (Problem(what, where=where, value=f"{type(error).__name__}: {error}"),)
