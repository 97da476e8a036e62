"""The text of a starter file: settings by section, each below its reason; and the lines that describe it to the user."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.cli.formatting import wrap
from launcher.cli.plan import remarks
from launcher.clusters.preflight import disk_note
from launcher.config.run_file import render
from launcher.config.schema import RunConfig
from launcher.data.checks.findings import LIMITS
from launcher.plan.launch_plan import LaunchPlan
from launcher.shell_commands import launcher_command

# In reading order; other sections follow.
_ORDER = ("model", "data", "train", "optim", "deepspeed", "eval", "checkpoint", "cluster", "tracking", "run")
_WIDTH = 100
# Continued lines of a message.
_INDENT = 4


def starter_text(head: Sequence[str], values: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Return the file: `head` as comments, then the sections; `reasons` is keyed by section or section.name."""
    names = [*(name for name in _ORDER if name in values), *(name for name in values if name not in _ORDER)]
    parts = ["\n".join(_comment(line, "") for line in head), *(_section(name, values[name], reasons) for name in names)]
    return "\n\n".join(parts) + "\n"


def _section(name: str, content: Any, reasons: Mapping[str, str]) -> str:
    lines = [_comment(reasons[name], "")] if name in reasons else []
    if not isinstance(content, dict):
        return "\n".join([*lines, render({name: content}).rstrip()])
    lines.append(f"{name}:")
    for key, value in content.items():
        if reason := reasons.get(f"{name}.{key}"):
            lines.append(_comment(reason, "  "))
        lines.append(textwrap.indent(render({key: value}).rstrip(), "  "))
    return "\n".join(lines)


def _comment(text: str, indent: str) -> str:
    """Return a text as comment lines; no character in it, for example in a data file's name, can end the comment."""
    prefix = f"{indent}# "
    return textwrap.fill(
        " ".join(text.splitlines()),
        _WIDTH,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_on_hyphens=False,
        break_long_words=False,
    )


def data_warnings(config: RunConfig, sample_report: dict[str, Any]) -> list[str]:
    """Return which data `data` would reject under these settings."""
    lengths, checks = sample_report["lengths"], config.data.checks
    # A problem of all rows is not left to data.checks.bad_rows.
    is_skipped = checks.bad_rows == "drop" and sample_report["is_measured"]
    warnings = [f"`data` refuses rows such as {refused}"] if (refused := sample_report["refused"]) and not is_skipped else []
    share = sum(length > config.data.max_length for length in lengths) / max(1, len(lengths))
    if config.data.long_documents == "truncate" and checks.truncated == "fail" and share > LIMITS["truncated"]:
        warnings.append(
            f"{share:.0%} of the documents are longer than data.max_length={config.data.max_length}, and `data` refuses a run in "
            f"which more than {LIMITS['truncated']:.0%} are cut off: raise it, or set data.long_documents to split or drop"
        )
    return warnings


def next_lines(out: Path, config: RunConfig, machines: str, remarks_on_data: Sequence[str], plan: LaunchPlan | None) -> list[str]:
    """Return lines on the written file, its machines, the assumptions, the warnings, and the commands to type next.

    `plan` is the file's plan, None if it cannot be made without the model.
    """
    notes = [f"wrote {out}", f"fitted to: {machines}", *remarks_on_data]
    if plan is not None:
        notes += remarks(plan, disk_note(plan))
    lines = [*wrap(notes, _INDENT), "next:", *(f"  {launcher_command(verb, out)}" for verb in ("data", "plan", "train"))]
    hint = ""
    if config.cluster.runs_on_every_node and config.cluster.nodes > 1:
        hint = "train starts on every machine, with the variables of docs/static.md; run.root is a folder that all machines share"
    elif config.cluster.is_this_machine:
        hint = (
            "for a cluster, repeat init with another --out and +cluster=slurm cluster.nodes=2 cluster.gpus_per_node=8: "
            "batch, length and memory depend on the machines"
        )
    return [*lines, *wrap([hint], _INDENT)] if hint else lines
