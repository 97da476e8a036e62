from __future__ import annotations

import re

from doc_tools import README, REPO


def test_every_number_in_the_readmes_bullets_was_measured() -> None:
    text = README.read_text(encoding="utf-8")
    bullets = re.findall(r"^- (.+(?:\n  .+)*)", text.split("## What it does", 1)[1].split("\n## ", 1)[0], re.MULTILINE)
    assert len(bullets) == 6
    measured = numbers_in((REPO / "benchmarks/RESULTS.md").read_text(encoding="utf-8"))
    for bullet in bullets:
        numbers = numbers_in(re.sub(r"\]\([^)]*\)|`[^`]*`|ZeRO-3", "", bullet))
        assert numbers, f"no measured number: {bullet}"
        assert numbers <= measured, bullet
        assert "benchmarks/RESULTS.md" in bullet


def test_every_measurement_of_the_performance_guide_is_in_the_results() -> None:
    table = (REPO / "docs/performance.md").read_text(encoding="utf-8").split("## Measurements", 1)[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if "RESULTS.md#" in line]
    measured = numbers_in((REPO / "benchmarks/RESULTS.md").read_text(encoding="utf-8"))
    assert len(rows) >= 10
    for _, own, other, _ in rows:
        assert numbers_in(own), own
        assert numbers_in(re.sub(r"\([^)]*\)", "", f"{own} {other}")) <= measured, (own, other)


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d(?:[\d,.]*\d)?", text))
