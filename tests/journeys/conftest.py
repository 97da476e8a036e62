"""Fixture: the launcher's wheel, installed in a separate venv."""

from __future__ import annotations

import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from forked import require_exit

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPO)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    require_exit(done)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a venv with the wheel that sees this environment's dependencies, but not this checkout."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run(pip, check=True, capture_output=True, timeout=240)
    # Plain path entries do not process the .pth file of the editable install.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    script = folder / "bin" / "launcher"
    script.write_text(f"#!{folder}/bin/python\n" + (packages / "bin" / "launcher").read_text().split("\n", 1)[1])
    script.chmod(0o755)
    return folder / "bin"
