"""The verb `drift`: check whether current prompts still resemble those that a run was trained on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli.render import terminal
from launcher.cli.render.sections import Commands, Items, Part, Section, Table, Text
from launcher.cli.worker_process import run_reporting
from launcher.errors import EXIT_CHECK_FAILED, DataError
from launcher.security import owners
from launcher.shell_commands import launcher_command, short_path


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
        terminal.show(*to_sections(report, run_dir.root.name))
    return EXIT_CHECK_FAILED if report["has_drifted"] else 0


def to_sections(report: dict[str, Any], run: str) -> list[Part]:
    """Return what is shown of the answer of launcher.evaluate.drift."""
    rows = [["prompts compared", f"{report['num_training']:,}", f"{report['num_prompts']:,}", ""]]
    for one in report["measures"]:
        figures = (f"{one[side]:.0%}" if one["name"] == "words" else f"{one[side]:.4g}" for side in ("training", "now"))
        rows.append([one["title"], *figures, f"p = {one['p_value']:.2g}"])
    gaps = Items([f"no likelihoods, {gap}" for gap in report["gaps"]])
    farthest = [f"{short_path(one['where'])} ({one['similarity']:.2f}): {one['text']}" for one in report["farthest"]]
    parts: list[Part] = [
        Text(report["sentence"], "warn" if report["has_drifted"] else "good"),
        Section("", [Table(["", "training", "now", "test"], rows, numbers=(1, 2)), gaps]),
        Section("farthest from training", [Items(farthest)]),
    ]
    if report["has_drifted"]:
        # The prompts have no answers.
        command = launcher_command("train", f"model.path=run:{run}", "data=jsonl", "data.path=ANSWERED.jsonl")
        advice = "With answers to such prompts in ANSWERED.jsonl, train on from this run with:"
        parts.append(Section("", [Text(advice), Commands([command])]))
    return parts
