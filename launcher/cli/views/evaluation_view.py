"""The page of `launcher evaluate`."""

from __future__ import annotations

from typing import Any

from launcher.cli.formatting import short, table
from launcher.tracking.metrics import format_duration

_MAX_STYLES = 12
_MAX_COPIES = 10


def to_lines(shown: dict[str, Any]) -> list[str]:
    """Return the page from what launcher.evaluate.evaluation prints."""
    lines = [f"{shown['run']}, step {shown['step']}"]
    for name, result in shown["sets"].items():
        lines += ["", f"{name}: {result['verdict']['sentence']}", ""]
        lines += [f"  {line}" for line in table(result["header"], result["rows"])]
        if result["costs"]:
            lines += ["", "  requests like these:", *(f"  {line}" for line in table(*result["costs"]))]
        if result["saved_tokens"]:
            lines += [f"  {result['saved_tokens']}"]
        lines += ["", *(f"  {side}: {style}" for side, style in result["styles"].items())]
        lines += [f"  {line}" for line in result["left_out"]]
        if copies := result["training_copies"]:
            lines += ["", "  prompts that are also in the training data:", *(f"  {copy}" for copy in copies[:_MAX_COPIES])]
            lines += [f"  and {len(copies) - _MAX_COPIES:,} more"] if len(copies) > _MAX_COPIES else []
    if shown["overlap_gap"]:
        lines += ["", shown["overlap_gap"]]
    if shown["selection"]:
        lines += ["", "prompt forms of the base model, compared on training rows:"]
        ordered = sorted(shown["selection"], key=lambda one: -one["score"])
        lines += [f"  {one['score']:.3f}  {one['style']}" for one in ordered[:_MAX_STYLES]]
    lines += [
        "",
        f"{shown['engine']}, {shown['dtype']}, {format_duration(shown['seconds'])}; answers in {short(shown['folder'])}",
    ]
    return lines


def task_lines(shown: dict[str, Any]) -> list[str]:
    """Return the page of `launcher evaluate --tasks` from what launcher.evaluate.tasks prints."""
    lines = [f"{shown['run']}, step {shown['step']}"]
    for task, result in shown["tasks"].items():
        sentence = f" {result['verdict']['sentence']}" if "verdict" in result else ""
        lines += ["", f"{task}, {result['num_questions']:,} questions:{sentence}"]
        if "verdict" in result:
            lines += ["", *(f"  {line}" for line in table(result["header"], result["rows"]))]
        # For example BLEU: computed from all answers together, so its spread is unknown.
        for metric, values in result["whole"].items():
            means = ", ".join(f"{side} {value:.4g}" for side, value in values.items())
            lines.append(f"  {metric}, of all questions together: {means}")
    return [*lines, "", f"scores in {short(shown['folder'])}"]
