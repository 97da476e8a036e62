"""The wheel, built and installed as a user would, runs from an empty directory."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a venv that holds the wheel and sees this environment's dependencies, but not this checkout."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=240)
    # As plain path entries, so that the .pth file of the editable install is not read.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    script = folder / "bin" / "launcher"
    script.write_text(f"#!{folder}/bin/python\n" + (packages / "bin" / "launcher").read_text().split("\n", 1)[1])
    script.chmod(0o755)
    return folder / "bin"


@pytest.mark.slow
def test_the_settings_lie_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"launcher/conf/{file.relative_to(REPO / 'conf')}" for file in (REPO / "conf").rglob("*.yaml")}
    assert len(shipped) > 15
    assert shipped <= names
    assert not [name for name in names if name.startswith(("tests/", "conf/", "runs/", "benchmarks/"))]


@pytest.mark.slow
@pytest.mark.parametrize("command", [["launcher"], ["python", "-m", "launcher"]])
def test_it_plans_from_an_empty_directory(installed: Path, command: list[str], tmp_path: Path) -> None:
    dropped = ("PYTHONPATH", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if k not in dropped} | {"LAUNCHER_CACHE": str(tmp_path / "cache")}
    (tmp_path / "empty").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [str(installed / command[0]), *command[1:], *arguments]
        return subprocess.run(program, capture_output=True, text=True, cwd=tmp_path / "empty", env=env, timeout=60)

    where = run("plan", "--info", "searchpath")
    assert str(REPO) not in where.stdout
    assert str(installed.parent / "lib") in where.stdout
    done = run("plan", "model=tiny")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("run ")
    assert "tiny: about 1.0 million parameters" in done.stdout
    refused = run("plan", "model=tinny")
    assert (refused.returncode, "did you mean tiny?" in refused.stderr) == (2, True)
    assert list((tmp_path / "empty").iterdir()) == []
