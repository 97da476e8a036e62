"""The verb `drift`: check whether current prompts still resemble those that a run was trained on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from launcher import run_store
from launcher.cli.arguments import VerbParser
from launcher.cli.formatting import short, table
from launcher.cli.worker_process import run_reporting
from launcher.errors import EXIT_CHECK_FAILED, DataError, printable
from launcher.security import owners
from launcher.shell_commands import launcher_command


def run(verb: str, tokens: list[str]) -> int:
    """Compare prompts with the training prompts; returns 3 if they have drifted."""
    about = (
        "Compare prompts with those that a run was trained on: words, lengths, and how likely they are under the tuned model "
        "and the base model, scored on this machine. "
        "The exit code is 3 if they have drifted."
    )
    parser = VerbParser(prog="python -m launcher drift", description=about)
    parser.add_argument("run", metavar="RUN", help="name of the run, or path of its directory")
    parser.add_argument("prompts", metavar="PROMPTS", type=Path, help="file of prompts or chats, such as JSON lines")
    likelihood = (
        "score up to 200 prompts of each side under both models, or skip this (default: score them if this machine has GPUs that "
        "hold the model)"
    )
    parser.add_argument("--likelihood", action=argparse.BooleanOptionalAction, help=likelihood)
    parser.add_root()
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(tokens)
    run_dir = run_store.find_run(arguments.run, Path(arguments.root))
    owners.require_run(run_dir.root)
    if not arguments.prompts.is_file():
        raise DataError(
            "there is no such file", where=str(arguments.prompts), remedy="name a file of prompts: JSON Lines, or one JSON array"
        )
    chosen = [] if arguments.likelihood is None else ["--likelihood" if arguments.likelihood else "--no-likelihood"]
    report: dict[str, Any] = run_reporting("launcher.evaluate.drift", None, str(run_dir.plan), str(arguments.prompts), *chosen)
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
