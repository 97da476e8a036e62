"""One rank. The node's agent forks it or starts it as `python -m launcher.worker.ranks.rank_main PLAN ATTEMPT`.

The plan's path is the only input from the submit side.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import clock
from launcher.child_process import die_with_parent, exit_without_shutdown
from launcher.clusters import limits
from launcher.errors import WOULD_REPEAT
from launcher.models.remote_code import remove_copies
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import journal
from launcher.runs.journal import FailureRecord, RepeatableFailure, TrainingEnded
from launcher.worker.failure_record import ErrorRecord, ErrorSlot, read_final
from launcher.worker.ranks import flight_recorder
from launcher.worker.ranks.rank_env import RankEnv, bind_to_gpu, num_busy_threads, redirect_output, set_title
from launcher.worker.ranks.watchdog import Heartbeat
from launcher.worker.signals import StopFlag

if TYPE_CHECKING:
    from launcher.train.finish import Outcome


@dataclass
class _Progress:
    """Forwards heartbeats. `step` is the number of completed optimizer steps, None before the model is loaded."""

    heartbeat: Heartbeat | None = None
    step: int | None = None

    def beat(self, phase: str, step: int) -> None:
        if phase not in ("starting", "joined"):
            self.step = step
        if self.heartbeat is not None:
            self.heartbeat.beat(phase, step)


def main(plan_path: str, attempt: int) -> None:
    """Train, and write the outcome for the agent (rank 0)."""
    die_with_parent()
    stop = StopFlag(loading=True).install()
    slot, progress = ErrorSlot.from_environ(os.environ), _Progress()
    try:
        # A crash leaves no record; the log then has the stacks of all threads.
        faulthandler.enable(all_threads=True)
        # The watchdog sends SIGQUIT to a stuck rank to get the stacks of all threads.
        faulthandler.register(signal.SIGQUIT, all_threads=True, chain=False)
        env = RankEnv.from_environ(os.environ)
        # This comes before any access to storage, which may hang.
        progress.heartbeat = Heartbeat.from_environ(os.environ, env)
        plan = LaunchPlan.load(plan_path)
        run = RunDir(Path(plan.run_dir))
        set_title(env.rank, plan_path, attempt)
        redirect_output(run.rank_log(attempt, env.rank))
        # DeepSpeed chooses a device on import, but a plan may use the CPUs of a machine with GPUs.
        os.environ["DS_ACCELERATOR"] = plan.topology.device
        _train(plan, run, env, attempt, stop, progress)
    except Exception as error:
        slot.write(ErrorRecord.of(error, limits.cause_of(error, Path(plan_path).parent), progress.step))
        raise
    remove_copies()
    # Everything is on disk.
    exit_without_shutdown(0)


def _train(plan: LaunchPlan, run: RunDir, env: RankEnv, attempt: int, stop: StopFlag, progress: _Progress) -> None:
    from launcher.train.preload import import_stack

    # A forked rank has already imported it.
    if "launcher.train.loop" not in sys.modules:
        import_stack(plan, tracks=env.rank == 0)
    from launcher.distributed import RankInfo
    from launcher.evaluate.answers import report_answers
    from launcher.train.loop import train
    from launcher.train.monitoring.largest_batch import explained_out_of_memory

    if plan.topology.device == "cuda":
        steps_on_cpu = plan.config.deepspeed.offload_optimizer != "none"
        bind_to_gpu(env.local_rank, plan.topology.ranks_per_node, num_busy_threads(os.environ, steps_on_cpu))
    else:
        flight_recorder.answer_requests(os.environ, env.rank)
    rank_info = RankInfo(env.rank, env.local_rank, env.world_size, attempt, env.restart)
    try:
        with explained_out_of_memory(plan, run, lambda: bool(progress.step)):
            outcome = train(plan, rank_info, stop, progress.beat, partial(write_outcome, run, attempt), report_answers)
    except WOULD_REPEAT as error:
        # After any other failure the agents restart the ranks.
        message = ": ".join(filter(None, (limits.cause_of(error, run.root), str(error))))
        failure = FailureRecord(
            env.rank, type(error).__name__, message, clock.now(), exit_code=1, log=str(run.rank_log(attempt, env.rank))
        )
        # Most often all ranks raise the same error. If this fails, the agents restart the ranks; the exception is still recorded.
        with suppress(OSError):
            if read_final(run, attempt) is None:
                journal.append(run, attempt, RepeatableFailure(failure=failure))
        raise
    if rank_info.is_main and outcome.state == "completed":
        write_outcome(run, attempt, outcome)


def write_outcome(run: RunDir, attempt: int, outcome: Outcome) -> None:
    """Record for the agent and the postmortem how training ended."""
    checkpoint = str(outcome.checkpoint or "")
    ended = TrainingEnded(
        state=outcome.state, reason=outcome.reason, step=outcome.step, message=outcome.message, checkpoint=checkpoint
    )
    journal.append(run, attempt, ended)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
