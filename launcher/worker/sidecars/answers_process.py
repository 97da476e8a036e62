"""The process that answers prompts with a run's checkpoints during training (eval.answers_every):
`python -m launcher.worker.sidecars.answers_process PLAN ATTEMPT`.

The head node's agent starts it beside the ranks. The line `complete` on its standard input means that training is complete: the
process then answers the remaining checkpoints. Any other line, or EOF, ends the process and everything that it started.
"""

from __future__ import annotations

import select
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from launcher.errors import LauncherError, describe
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.sidecars.sidecar import Sidecar, begin_sidecar, print_to_log

_COMPLETE, _END = "complete", "end"
# If memory runs out, the kernel kills an evaluation before a rank.
_KILLED_FIRST = "1000"
_LOOK_S = 1.0
# Seconds from the request to end to SIGKILL, in which an evaluation ends its own processes.
_END_S = 20.0
# Seconds to submit jobs in when a run gives its nodes back.
SUBMISSION_S = 60.0


def main(plan_path: str, attempt: int) -> int:
    """Evaluate checkpoints until the agent ends this process, or until training is complete and nothing is left."""
    source = begin_sidecar()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_KILLED_FIRST)
    # Imported here because the agent that starts this process does not need it.
    from launcher.worker.sidecars.checkpoint_answers import CheckpointAnswers

    plan = LaunchPlan.load(plan_path)
    answers = CheckpointAnswers(RunDir(Path(plan.run_dir)), plan, attempt)
    is_complete, last_failure = False, ""
    try:
        while True:
            try:
                if answers.work(is_complete):
                    break
                last_failure = ""
            except (OSError, LauncherError) as error:
                if (failure := describe(error)) != last_failure:
                    last_failure = failure
                    print_to_log(f"storage fails: {failure}")
                if is_complete:
                    break
            if select.select([source], [], [], _LOOK_S)[0]:
                if (source.readline() or b"").strip() != _COMPLETE.encode():
                    break
                is_complete = True
    finally:
        answers.conclude(is_complete)
    return 0


class AnswersProcess(Sidecar):
    """The agent's handle for the process."""

    @classmethod
    def start(
        cls, plan: LaunchPlan, plan_path: str, run: RunDir, attempt: int, environment: Mapping[str, str] | None = None
    ) -> Self | None:
        """Start the process with `environment`, or None if no answers are wanted."""
        if not plan.config.eval.answers_every:
            return None
        return cls._start("launcher.worker.sidecars.answers_process", plan_path, run, attempt, "answers.log", environment)

    def finish(self, until: float, unwanted: Callable[[], bool]) -> None:
        """Wait until the process has answered what is left; `until` in the past means that training is not complete."""
        if time.monotonic() < until:
            self._send(_COMPLETE)
        self._wait(until, unwanted)
        self._end(_END, _END_S, unwanted)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
