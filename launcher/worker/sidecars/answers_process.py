"""Answers prompts with a run's checkpoints during training: `python -m launcher.worker.sidecars.answers_process PLAN ATTEMPT`.

After the order COMPLETE it answers the remaining checkpoints; at any other line, or EOF, it ends with all that it started.
"""

from __future__ import annotations

import select
import sys
from contextlib import suppress
from pathlib import Path

from launcher.errors import LauncherError, describe
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.sidecars.sidecar import COMPLETE, begin_sidecar, print_to_log

# If memory runs out, the kernel kills an evaluation before a rank.
_KILLED_FIRST = "1000"
_LOOK_S = 1.0


def main(plan_path: str, attempt: int) -> int:
    """Evaluate checkpoints until the agent ends this process, or until training is complete and nothing is left."""
    source = begin_sidecar()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_KILLED_FIRST)
    # Imported after signals are blocked: the threads that these imports start would receive them.
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
                if is_complete and last_failure:
                    break
                if (failure := describe(error)) != last_failure:
                    last_failure = failure
                    print_to_log(f"storage fails: {failure}")
            if select.select([source], [], [], _LOOK_S)[0]:
                if source.readline() != COMPLETE:
                    break
                is_complete = True
    finally:
        answers.conclude(is_complete)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
