"""The rebuilt data of a fetched run must equal the data it was trained on, token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest

from launcher.cli import mirror
from launcher.config.schema import RunConfig
from launcher.config.sections.data import DataSection
from launcher.data.build import build
from launcher.errors import DataError


def test_other_data_with_the_same_counts_is_refused(
    jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built_here(config: RunConfig) -> None:
        build(config.data, str(tokenizer_dir))

    # Build in this process instead of a worker.
    monkeypatch.setattr(mirror, "prepare", built_here)
    rows = [{"prompt": f"{i}:", "completion": f" {i + 1}"} for i in range(8)]
    source = jsonl(rows)
    settings = {
        "model": {"path": str(tokenizer_dir)},
        "data": {"sources": [{"path": str(source), "completions": "text"}], "max_length": 32},
    }
    made = hand_made.plan(tmp_path / "run", {**settings, "train": {"max_steps": 4}})
    trained = build(DataSection.model_validate(settings["data"]), str(tokenizer_dir))
    plan = made.model_copy(update={"data": trained.model_copy(update={"cache_dir": "/elsewhere/data/0123"})})
    assert mirror._find_or_build_data(plan, plan.config) == trained
    jsonl([{**row, "completion": row["completion"][::-1]} if row["prompt"] == "7:" else row for row in reversed(rows)])
    other = build(plan.config.data, str(tokenizer_dir))
    assert other.model_dump(exclude={"cache_dir", "digest"}) == trained.model_dump(exclude={"cache_dir", "digest"})
    with pytest.raises(DataError, match="differs from the data that the run was trained on") as caught:
        mirror._find_or_build_data(plan, plan.config)
    assert caught.value.problems[0].value == f"digest: {other.digest} on this machine, {trained.digest} in the run"
