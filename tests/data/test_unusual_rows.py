"""Rows, files and texts of unusual size or content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from special_files import link_to_device, make_pipe

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.reading import check_sources


@pytest.mark.timeout(300)
@pytest.mark.parametrize("make", [make_pipe, link_to_device])
def test_a_pipe_or_a_device_is_not_read(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "data").mkdir()
    for name in ("train.jsonl", "README.md"):
        make(tmp_path / "data" / name)
    for path in ("data", "data/train.jsonl", "data/*.jsonl"):
        (problem,) = check_sources(DataSection(sources=(Source(path=f"{tmp_path}/{path}"),)))
        assert problem.value == f"{tmp_path}/{path}"
