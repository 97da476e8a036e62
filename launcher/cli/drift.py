"""The verb `drift`: check whether current prompts still resemble those that a run was trained on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli.formatting import short, table
from launcher.cli.worker_process import run_reporting
from launcher.errors import EXIT_CHECK_FAILED, DataError, printable
from launcher.security import owners
from launcher.shell_commands import launcher_command


def compare_prompts(arguments: argparse.Namespace) -> int:
    """Compare prompts with the training prompts; returns 3 if they have drifted."""
    run_dir = run_store.find_run(arguments.run, Path(arguments.root))
    owners.require_run(run_dir.root)
    if not Path(arguments.prompts).is_file():
        raise DataError(
            "there is no such file", where=arguments.prompts, remedy="name a file of prompts: JSON Lines, or one JSON array"
        )
    chosen = [] if arguments.likelihood is None else ["--likelihood" if arguments.likelihood else "--no-likelihood"]
    report: dict[str, Any] = run_reporting("launcher.evaluate.drift", None, str(run_dir.plan), arguments.prompts, *chosen)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print("\n".join(_to_lines(report, run_dir.root.name)), flush=True)
    return EXIT_CHECK_FAILED if report["has_drifted"] else 0


def _to_lines(report: dict[str, Any], run: str) -> list[str]:
    """Return the page from what launcher.evaluate.drift prints."""
    rows = [["prompts compared", f"{report['num_training']:,}", f"{report['num_prompts']:,}", ""]]
    for one in report["measures"]:
        figures = (f"{one[side]:.0%}" if one["name"] == "words" else f"{one[side]:.4g}" for side in ("training", "now"))
        rows.append([one["title"], *figures, f"p = {one['p_value']:.2g}"])
    lines = [report["sentence"], "", *(f"  {line}" for line in table(["", "training", "now", "test"], rows))]
    lines += [f"  no likelihoods, {printable(gap)}" for gap in report["gaps"]]
    lines += ["", "farthest from training:"]
    lines += [f"  {short(one['where'])} ({one['similarity']:.2f}): {printable(one['text'])}" for one in report["farthest"]]
    if report["has_drifted"]:
        # The prompts have no answers.
        command = launcher_command("train", f"model.path=run:{run}", "data=jsonl", "data.path=ANSWERED.jsonl")
        lines += ["", f"With answers to such prompts in ANSWERED.jsonl, train on from this run with: {command}"]
    return lines
