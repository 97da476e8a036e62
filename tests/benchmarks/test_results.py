"""How measurements are written to RESULTS.md."""

from __future__ import annotations

from pathlib import Path

import pytest
import results

TEXT = """# Results

An introduction.

## Current

### export

**2026-01-02 10:00 UTC: export of 2 ranks**

| s |
|---|
| 2 |

`python benchmarks/export.py`

A note by hand.

### saving

**2026-01-01 10:00 UTC: saving, 1 GiB**

| s |

## History

### 2025-12-01 10:00 UTC: export of 1 rank

| s |
"""


def test_the_current_section_of_a_benchmark_is_replaced_and_becomes_the_first_of_the_history() -> None:
    text = results.with_section(TEXT, "export", "2026-02-01 10:00 UTC: export of 4 ranks", "| s |\n|---|\n| 1 |")
    current, history = text.split("## History\n")
    assert current.startswith(
        "# Results\n\nAn introduction.\n\n## Current\n\n### export\n\n**2026-02-01 10:00 UTC: export of 4 ranks**"
    )
    assert "| 1 |" in current
    assert "2026-01-02" not in current
    former = (
        "### 2026-01-02 10:00 UTC: export of 2 ranks\n\n| s |\n|---|\n| 2 |\n\n`python benchmarks/export.py`\n\nA note by hand."
    )
    assert history.strip() == f"{former}\n\n### 2025-12-01 10:00 UTC: export of 1 rank\n\n| s |"
    # The sections of other benchmarks keep their order.
    assert current.index("### export") < current.index("### saving\n\n**2026-01-01 10:00 UTC: saving, 1 GiB**\n\n| s |")


def test_a_benchmark_without_a_section_is_added_after_the_others() -> None:
    text = results.with_section(TEXT, "export of 70B", "2026-02-01 10:00 UTC: 70B", "| s |")
    current, history = text.split("## History\n")
    assert [line for line in current.splitlines() if line.startswith("### ")] == ["### export", "### saving", "### export of 70B"]
    assert history == TEXT.split("## History\n")[1]


def test_results_begin_with_an_empty_file() -> None:
    first = results.with_section("", "export", "2026-01-01: a", "one")
    second = results.with_section(first, "export", "2026-01-02: b", "two")
    assert (
        second == "# Results\n\n## Current\n\n### export\n\n**2026-01-02: b**\n\ntwo\n\n## History\n\n### 2026-01-01: a\n\none\n"
    )


def test_a_file_without_the_two_headings_is_refused() -> None:
    with pytest.raises(ValueError, match="## Current"):
        results.with_section("# Results\n\n## 2026-01-01: export\n", "export", "2026-01-02: b", "two")


def test_the_recorded_results_can_be_written_to() -> None:
    recorded = (Path(results.__file__).parent / "RESULTS.md").read_text()
    before, after = recorded.split("## History\n"), results.with_section(recorded, "export", "T", "B").split("## History\n")
    assert before[0].count("\n### ") == after[0].count("\n### ")
    assert after[1].endswith(before[1])
