"""`evaluate RUN --tasks`: the tuned model and the base model on lm-evaluation-harness tasks, on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import json_records
from launcher.cli.minimum_gains import MinimumGain
from launcher.cli.views import benchmark_view
from launcher.cli.worker_process import run_reporting
from launcher.clusters.backends import evaluation_nodes_for
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_CHECK_FAILED, SubmitError
from launcher.hardware import device
from launcher.plan.run_dir import RunDir
from launcher.tracking.verdicts import EvaluationVerdict

_SCORE = "launcher.worker.benchmark_tasks.score"


@dataclass(frozen=True)
class BenchmarkOptions:
    """The tasks by name, the folder of the user's own tasks, and the number of questions per task (None for all)."""

    tasks: str
    task_folder: Path | None = None
    limit: int | None = None

    def arguments(self) -> list[str]:
        words = ["--tasks", self.tasks]
        words += [] if self.task_folder is None else ["--task-folder", str(self.task_folder)]
        return words + ([] if self.limit is None else ["--limit", str(self.limit)])


def run(
    config: RunConfig, run_dir: RunDir, step: int, options: BenchmarkOptions, gains: Sequence[MinimumGain], as_json: bool
) -> int:
    """Score both models and print each task's verdict; returns 3 if --min-gain does not hold.

    A gain applies to every task with that metric, and fails if no task has it.
    """
    require_gpu(config, "tasks are scored", "--tasks")
    wanted = [f"--min-gain={gain}" for gain in gains]
    shown: dict[str, Any] = run_reporting(_SCORE, config, str(run_dir.plan), "--step", str(step), *options.arguments(), *wanted)
    verdicts = {
        name: json_records.decode(EvaluationVerdict, task["verdict"], "the verdict")
        for name, task in shown["tasks"].items()
        if "verdict" in task
    }
    failed = list[str]()
    for gain in gains:
        about = {name: verdict for name, verdict in verdicts.items() if gain.metric in verdict.means}
        failed += [f"{name}: {reason}" for name, verdict in about.items() if (reason := gain.failure(verdict)) is not None]
        if not about:
            failed.append(f"--min-gain {gain} did not hold: no task has this metric")
    if as_json:
        print(json.dumps({**shown, "not_held": failed}, indent=2))
    else:
        print("\n".join([*benchmark_view.to_lines(shown), *failed]), file=sys.stdout, flush=True)
    return EXIT_CHECK_FAILED if failed else 0


def require_gpu(config: RunConfig, activity: str, option: str) -> None:
    """Refuse to load a model that was trained on a cluster on a login node's CPU. `activity` is what this machine would do."""
    nodes = evaluation_nodes_for(config.cluster.kind)
    if nodes is not None and nodes.runs_elsewhere(config) and device().kind != "cuda":
        raise SubmitError(
            f"{activity} on this machine, which has no GPU",
            where=option,
            value=f"the run's cluster is {config.cluster.kind}",
            remedy="start the command on a machine with a GPU, such as: srun --gpus 1 python -m launcher evaluate ...; or add "
            "cluster=local to use this machine's CPU",
        )
