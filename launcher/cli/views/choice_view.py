"""The page of `launcher evaluate --choices`."""

from __future__ import annotations

from typing import Any

from launcher.cli.formatting import short, table
from launcher.errors import printable

_MAX_COPIES = 10


def to_lines(shown: dict[str, Any]) -> list[str]:
    """Return the page from what launcher.worker.scoring.choices prints."""
    lines = [f"{shown['run']}, step {shown['step']}"]
    for name, result in shown["sets"].items():
        lines += ["", f"{printable(name)}: {result['verdict']['sentence']}", ""]
        lines += [f"  {line}" for line in table(result["header"], result["rows"])]
        lines += ["", *(f"  {side}: {printable(style)}" for side, style in result["styles"].items())]
        lines.append(f"  {result['verdict']['num_prompts']:,} questions scored")
        if result["num_reserved"]:
            lines.append(
                f"  {result['num_reserved']:,} questions are used as examples for the base model, or to choose its prompt form"
            )
        if result["num_left_out"]:
            lines.append(f"  {result['num_left_out']:,} questions left out: they do not fit the model's context")
        if copies := result["training_copies"]:
            lines += [
                "",
                "  questions that are also in the training data:",
                *(f"    {printable(one)}" for one in copies[:_MAX_COPIES]),
            ]
            lines += [f"    and {len(copies) - _MAX_COPIES:,} more"] if len(copies) > _MAX_COPIES else []
        if result["overlap_gap"]:
            lines += ["", f"  {printable(result['overlap_gap'])}"]
        if result["selection"]:
            lines += ["", "  prompt forms of the base model, compared on questions that are not scored:"]
            ordered = sorted(result["selection"], key=lambda one: -one["score"])
            lines += [f"    {one['score']:.3f}  {printable(one['style'])}" for one in ordered]
    return [*lines, "", f"log-likelihoods in {short(shown['folder'])}"]
