"""The backend of docs/extending-backends.md, added to a copy of the package as printed, runs, is cancelled and resumes."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
from doc_tools import REPO, blocks
from e2e_tools import FIRST_RUN, FIRST_STEPS, committed, held, losses, status
from forked import Launch, require_exit
from pace import wait_for

# A job is a session of its own process; the queue forgets it when it has ended.
PROGRAMS = {
    "qsub": 'while [ "$1" != -- ]; do [ "$1" = -v ] && variables=$2; shift; done; shift\n'
    'IFS=,; setsid env $variables "$@" >> "$QUEUE/output" 2>&1 < /dev/null & echo $!',
    "qstat": '[ -d "/proc/$1" ] && ! grep -q "^State:.Z" "/proc/$1/status"',
    "qsig": 'kill -s "${2#SIG}" "$3"',
    "qdel": 'kill -s KILL "$1"',
}

pytestmark = pytest.mark.rest


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package and of conf/, to which the page's files and entries are added."""
    folder = tmp_path / "package"
    for name in ("launcher", "conf"):
        shutil.copytree(REPO / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    files = [block for block in blocks(REPO / "docs/extending-backends.md") if block.language in ("python", "yaml")]
    assert sum(len(block.body.splitlines()) for block in files) <= 120
    for block in files:
        name, _, text = block.body.partition("\n")
        (folder / name.removeprefix("# ")).write_text(text)
    imported = "from launcher.config.sections.queue import QueueSection\n"
    for path, before, entry in (
        ("launcher/clusters/backends.py", '    "local": ', '    "queue": "launcher.clusters.queue:QueueCluster",\n'),
        ("launcher/config/schema.py", '    "local": ', '    "queue": QueueSection,\n'),
        ("launcher/config/schema.py", "from launcher.config.sections.ray", imported),
    ):
        text = (folder / path).read_text()
        assert text.count(before) == 1
        (folder / path).write_text(text.replace(before, entry + before))
    for name, script in PROGRAMS.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(stat.S_IRWXU)
    return folder


def test_the_backend_of_the_page_trains_is_cancelled_and_resumes(
    launch: Launch, package: Path, runs: Path, first_run: Path, tmp_path: Path
) -> None:
    variables = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(package), "QUEUE": str(tmp_path)}
    run, chosen = runs / "queued", ("cluster=queue", *FIRST_RUN, "checkpoint.save_every=3", f"run.root={runs}", "run.name=queued")

    def command(*arguments: str, exit_code: int = 0) -> str:
        done = launch(*arguments, cwd=package, **variables)
        require_exit(done, exit_code)
        return done.stdout + done.stderr

    assert "did you mean cluster.queue?" in command(*chosen, "cluster.quue=short", exit_code=2)
    assert "qsub -q short -N queued" in command("plan", "--script", *chosen, "cluster.queue=short")
    assert not run.exists()
    assert "job" in command(*chosen)
    with held(run, 4):
        assert json.loads(command("status", str(run), "--json"))["state"] == "running"
        assert "the run is running already" in command(*chosen, exit_code=2)
        command("cancel", str(run))
    wait_for("the end", lambda: status(run)["state"] == "cancelled", 120)
    assert committed(run)
    command("resume", str(run))
    wait_for("the end", lambda: status(run)["state"] == "completed", 180)
    assert status(run)["step"] == FIRST_STEPS
    assert losses(run) == losses(first_run)
