"""The wheel contains the settings, templates and license, but no tests or benchmarks."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.rest

REPO = Path(__file__).resolve().parents[2]


def test_the_wheel_contains_the_settings(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"launcher/conf/{file.relative_to(REPO / 'conf')}" for file in (REPO / "conf").rglob("*.yaml")}
    assert len(shipped) > 15
    assert shipped <= names
    assert {f"launcher/{file.relative_to(REPO / 'launcher')}" for file in (REPO / "launcher").rglob("*.jinja")} <= names
    assert {"launcher/py.typed", "launcher/constraints.txt"} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "conf/", "runs/", "benchmarks/"))]
