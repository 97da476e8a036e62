"""The page of `launcher drift`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.cli.formatting import short, table
from launcher.errors import printable
from launcher.shell_commands import launcher_command

_MAX_SCRIPTS = 3


def to_lines(report: dict[str, Any], run: str, prompts: Path) -> list[str]:
    """Return the page from what launcher.worker.drift prints."""
    medians, unseen = report["median_tokens"], report["unseen"]
    rows = [
        ["prompts compared", f"{report['num_training']:,}", f"{report['num_prompts']:,}", ""],
        ["words", "", "", f"p = {report['words_p_value']:.2g}"],
        ["length (median tokens)", f"{medians[0]:.0f}", f"{medians[1]:.0f}", f"p = {report['length_p_value']:.2g}"],
        ["unlike all others in training", "5%", f"{report['unusual']:.0%}", ""],
        ["tokens of no training prompt", f"{unseen[0]:.1%}", f"{unseen[1]:.1%}", ""],
        ["equal or nearly equal to one in training", "", f"{report['near_duplicates']:.0%}", ""],
    ]
    likelihoods = report["likelihoods"]
    if models := [*likelihoods["models"].values()]:
        rows.append(["prompts that models scored", f"{models[0]['num_training']:,}", f"{models[0]['num_prompts']:,}", ""])
    for name, one in likelihoods["models"].items():
        losses, judged = one["median_loss"], f"p = {one['p_value']:.2g}" if one["is_judged"] else "trained on these prompts"
        rows += [
            [f"{name} model: median loss a token", f"{losses[0]:.3f}", f"{losses[1]:.3f}", judged],
            [f"{name} model: less likely than 95% in training", "5%", f"{one['unlikely']:.0%}", ""],
        ]
    scripts = sorted(report["scripts"].items(), key=lambda one: -max(one[1]))[:_MAX_SCRIPTS]
    rows += [[f"script: {printable(name)}", f"{before:.0%}", f"{now:.0%}", ""] for name, (before, now) in scripts]
    lines = [report["sentence"], "", *(f"  {line}" for line in table(["", "training", "now", "test"], rows))]
    lines += [f"  no likelihoods, {printable(gap)}" for gap in likelihoods["gaps"]]
    lines += ["", "farthest from training:"]
    for one in report["farthest"]:
        lines.append(f"  {short(one['where'])} ({one['similarity']:.2f}): {printable(one['text'])}")
    if likelihoods["least_likely"]:
        lines += ["", "least likely under the tuned model (loss a token):"]
        lines += [f"  {short(one['where'])} ({one['loss']:.2f}): {printable(one['text'])}" for one in likelihoods["least_likely"]]
    if report["has_drifted"]:
        # The prompts have no answers.
        command = launcher_command("train", f"model.path=run:{run}", "data=jsonl", "data.path=ANSWERED.jsonl")
        lines += ["", f"With answers to such prompts in ANSWERED.jsonl, train on from this run with: {command}"]
    return lines
