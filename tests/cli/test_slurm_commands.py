"""`plan` and `train` for Slurm: the script is shown, and invalid settings are refused before the run directory exists."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Launch, require_exit
from testbed_cluster import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.rest]


@pytest.fixture
def site(launch_here: Launch, slurm_cluster: Testbed, tmp_path: Path) -> Launch:
    """Run the launcher for a small model and three rows, in an empty folder, on the login node of a cluster of three nodes."""
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n' * 3)
    (tmp_path / "empty").mkdir()
    tokens = ("model=tiny", "data=jsonl", f"data.path={tmp_path / 'rows.jsonl'}", "data.eval_fraction=0", "tracking=none")

    def run(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return launch_here(verb, *tokens, "+cluster=slurm", *arguments, cwd=tmp_path / "empty", **slurm_cluster.variables)

    return run


@pytest.fixture
def nothing_made(tmp_path: Path, slurm_cluster: Testbed) -> Callable[[], bool]:
    def look() -> bool:
        return list((tmp_path / "empty").iterdir()) == [] and slurm_cluster.output("squeue", "--noheader") == ""

    return look


def script_of(text: str) -> str:
    """Return the script at the end of the output; check that bash can parse it."""
    script = text[text.index("#!/bin/bash") :]
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""
    return script


def test_the_plan_shows_the_script(site: Launch, nothing_made: Callable[[], bool], tmp_path: Path) -> None:
    settings = ("run.name=shown", "cluster.nodes=2")
    assert "#SBATCH" not in (hidden := site("plan", *settings).stdout)
    assert "plan --script shows what the scheduler gets (" in hidden
    done = site(
        "plan",
        "--script",
        "run.name=shown",
        "cluster.nodes=2",
        "cluster.account=research",
        "cluster.setup=[module load cuda/12.8]",
    )
    assert (done.returncode, done.stderr) == (0, "")
    script = script_of(done.stdout)
    for line in ("#SBATCH --nodes=2", "#SBATCH --account=research", "#SBATCH --time=1-00:00:00", "module load cuda/12.8"):
        assert f"\n{line}\n" in script
    assert f"#SBATCH --chdir={tmp_path}/empty/runs/shown\n" in script
    assert "launcher.worker.slurm.job begin" in script
    assert nothing_made()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cluster.nodes=9", "train.global_batch_size=18"], "partition main has 3 nodes"),
        (["cluster.partition=mian"], "there is no partition mian"),
        (['run.root="a,b"'], "a batch script cannot contain this path"),
        (["run.root=100%"], "a batch script cannot contain this path"),
        (['run.root="it\'s"'], "a batch script cannot contain this path"),
        (['run.root="a\nb"', "run.name='a;b'"], "run.root: contains a control character"),
        (["cluster.env.MY_TOKEN=abcd"], "cluster.env.MY_TOKEN: looks like a secret"),
    ],
)
def test_refused_settings_create_and_submit_nothing(
    site: Launch, nothing_made: Callable[[], bool], arguments: list[str], said: str
) -> None:
    done = site("train", *arguments)
    require_exit(done, 2)
    assert said in done.stderr
    assert "remedy: " in done.stderr
    assert "Traceback" not in done.stderr
    assert "abcd" not in done.stdout + done.stderr
    assert nothing_made()
