"""`evaluate RUN --choices FILE`: the tuned and the base model on multiple-choice questions, by likelihood, on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher import json_records
from launcher.cli.benchmark_tasks import require_gpu
from launcher.cli.minimum_gains import MinimumGain
from launcher.cli.views import choice_view
from launcher.cli.worker_process import run_reporting
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_CHECK_FAILED, ConfigError, Problem
from launcher.plan.run_dir import RunDir
from launcher.security import ownership
from launcher.tracking.verdicts import EvaluationVerdict

OPTION = "--choices"
# The metrics of every file, the primary one first.
METRICS = ("acc", "acc_norm")
_SCORE = "launcher.worker.scoring.choices"


def run(
    config: RunConfig,
    run_dir: RunDir,
    step: int,
    files: Sequence[Path],
    limit: int | None,
    gains: Sequence[MinimumGain],
    as_json: bool,
) -> int:
    """Score both models and print each file's verdict; returns 3 if --min-gain does not hold for one of them."""
    require_gpu(config, "choices are scored", OPTION)
    words = [word for file in files for word in ("--file", str(file.absolute()))]
    words += [] if limit is None else ["--limit", str(limit)]
    shown: dict[str, Any] = run_reporting(_SCORE, config, str(run_dir.plan), "--step", str(step), *words)
    verdicts = {
        name: json_records.decode(EvaluationVerdict, one["verdict"], "the verdict") for name, one in shown["sets"].items()
    }
    failed = [
        f"{name}: {reason}"
        for name, verdict in verdicts.items()
        for gain in gains
        if (reason := gain.failure(verdict)) is not None
    ]
    if as_json:
        print(json.dumps({**shown, "not_held": failed}, indent=2))
    else:
        print("\n".join([*choice_view.to_lines(shown), *failed]), flush=True)
    return EXIT_CHECK_FAILED if failed else 0


def require_files(files: Sequence[Path]) -> None:
    """Reject files that are missing or belong to other users.

    Raises:
        ConfigError: with every file.
    """
    problems = []
    for file in files:
        if not file.is_file():
            remedy = "name a file of questions with choices, one JSON object per line"
            problems.append(Problem("there is no such file", where=OPTION, value=str(file), remedy=remedy))
        elif problem := ownership.file_problem("the file of questions", file.absolute()):
            problems.append(problem)
    if problems:
        raise ConfigError(problems)
