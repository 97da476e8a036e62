"""The page of `launcher evaluate --tasks`."""

from __future__ import annotations

from typing import Any

from launcher.cli.formatting import short, table


def to_lines(shown: dict[str, Any]) -> list[str]:
    """Return the page from what launcher.worker.benchmark_tasks.score prints."""
    lines = [f"step {shown['step']}"]
    for task, result in shown["tasks"].items():
        sentence = f" {result['verdict']['sentence']}" if "verdict" in result else ""
        lines += ["", f"{task}, {result['num_questions']:,} questions:{sentence}"]
        if "verdict" in result:
            lines += ["", *(f"  {line}" for line in table(result["header"], result["rows"]))]
        # For example BLEU: computed from all answers together, so its spread is unknown.
        for metric, values in result["whole"].items():
            lines += [
                f"  {metric}, of all questions together: " + ", ".join(f"{side} {value:.4g}" for side, value in values.items())
            ]
    return [*lines, "", f"scores in {short(shown['folder'])}"]
