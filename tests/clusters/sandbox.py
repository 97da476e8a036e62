"""A sandbox that runs a batch script with fake programs, which record their calls."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.slurm import sbatch
from launcher.plan.launch_plan import LaunchPlan


@dataclass
class Sandbox:
    """A folder for running a script with fake programs, which record their calls."""

    folder: Path
    calls: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, str] = field(default_factory=dict)

    def called(self, name: str) -> list[list[str]]:
        return [call["argv"] for call in self.calls if call["name"] == name]

    def run(self, text: str, **env: str) -> subprocess.CompletedProcess[str]:
        record = self.folder / "calls"
        record.unlink(missing_ok=True)
        self.options = sbatch_options(text)
        assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
        path = f"{self.folder / 'bin'}:/usr/bin:/bin"
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        given = {"PATH": path, "RECORD": str(record), "HOME": "/root", **env}
        done = subprocess.run(["bash"], input=text, text=True, capture_output=True, cwd=work, env=given, timeout=30)
        self.calls = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
        assert list(work.iterdir()) == [], "nothing in the script makes a file"
        return done


# The fake srun runs the command after its own options.
RECORDER = """\
#!{python} -IS
import json, os, resource, sys
name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    file.write(json.dumps({{"name": name, "argv": argv, "env": dict(os.environ), "nofile": limit}}) + "\\n")
if name == "srun":
    os.execvp("sh", argv[argv.index("sh"):])
if "begin" in argv:
    print(os.environ.get("ATTEMPT", "7"))
sys.exit(int(os.environ.get("SRUN_RC", "0")) if "submitit.core._submit" in argv else int(os.environ.get("JOB_RC", "0")))
"""


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "python3", "srun", "module", "tool", "apptainer"):
        (programs / name).write_text(RECORDER.format(python=sys.executable))
        (programs / name).chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    return Sandbox(tmp_path)


def sbatch_options(text: str) -> dict[str, str]:
    options = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(len(line) == 1 for line in options), "one option per line"
    return dict(line[0].removeprefix("--").partition("=")[::2] for line in options)


def rendered(plan: LaunchPlan, folder: Path) -> str:
    """Render the script of a run whose plan is in `folder`."""
    file = folder / "plan.json"
    file.touch()
    return sbatch.render(plan, file)
