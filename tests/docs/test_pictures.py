"""The documentation's pictures are drawn from a run and contain no paths of this machine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import hand_made
import pytest

from launcher.plan.run_dir import RunDir

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "make_pictures.py"


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module docs/make_pictures.py, set to write to the test's folder."""
    spec = importlib.util.spec_from_file_location("make_pictures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "IMAGES", tmp_path)
    return module


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return hand_made.run(tmp_path / "runs/demo", state="completed", attempt=1, step=40, max_steps=40)


def test_the_status_picture_shows_the_run_and_no_path_of_this_machine(pictures: ModuleType, run: RunDir) -> None:
    svg = pictures.draw_status(run.root).read_text()
    assert "40&#160;of&#160;40" in svg
    assert str(run.root) not in svg
    assert "demo&#160;in&#160;runs/demo" in svg
