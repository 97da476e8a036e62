"""A run whose machine and disk are lost continues from its mirror on another machine, with the same losses."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from e2e_tools import TINY, agent_of, alerts, json_lines, last_step, losses, processes_of, ranks_of, slow_steps, status
from forked import Launch, require_exit
from mirror_tools import S3, make_bucket, running_s3
from pace import wait_for

pytestmark = pytest.mark.rest


STEPS = 20
QUICK = ("eval.at_start=false", "export.enabled=false")
SETTINGS = (*TINY, *QUICK, f"train.max_steps={STEPS}", "checkpoint.save_every=4", "checkpoint.keep_last=3")


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with running_s3(tmp_path_factory.mktemp("s3") / "server.log") as server:
        make_bucket(server)
        yield server


def events(run: Path) -> list[dict]:
    return json_lines(run / "events.jsonl")


def mirrored(run: Path, attempt: int = 1) -> dict:
    file = run / f"attempts/{attempt:03d}/mirror.json"
    return json.loads(file.read_text()) if file.is_file() else {"steps": []}


@pytest.fixture(scope="module")
def alone(start_here: Callable, module_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that loses its mirror before the first step and is otherwise undisturbed."""
    folder = tmp_path_factory.mktemp("mirror")
    mirror, run = folder / "mirror", module_runs / "alone"
    own = (f"checkpoint.mirror=file://{mirror}", f"run.root={module_runs}", "run.name=alone")
    # Without slow steps, the run could end before the mirror's process has started.
    with start_here(*SETTINGS, *own, **slow_steps()) as process:
        wait_for("the first look", lambda: (run / "attempts/001/mirror.json").is_file())
        assert (mirror / "alone/run.json").is_file()
        mirror.rename(folder / "gone")
        mirror.write_text("in the way")
        wait_for("a step", lambda: last_step(run) > 0)
        # The mirror's process is not counted as a rank.
        assert len(ranks_of(run)) == 2
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return run


def test_a_run_resumes_from_the_mirror_after_its_disk_is_lost(
    train_here: Launch,
    launch_here: Launch,
    start_here: Callable,
    runs: Path,
    alone: Path,
    s3: S3,
    tmp_path: Path,
    launcher_cache: Path,
) -> None:
    run, mirror = runs / "lost", f"checkpoint.mirror=s3://{s3.bucket}/runs"
    with start_here(*SETTINGS, mirror, f"run.root={runs}", "run.name=lost", **s3.environment, **slow_steps(0.2)) as process:
        saved = run / "checkpoints/step-00000008/manifest.json"
        wait_for("step 9 after a save", lambda: last_step(run) >= 9 and saved.is_file())
        # A suspended rank keeps the run from ending before its agent is killed.
        ranks_of(run)[1].send_signal(signal.SIGSTOP)
        wait_for("step 8 in the mirror", lambda: 8 in mirrored(run)["steps"])
        agent_of(run).kill()
        process.communicate(timeout=60)
    wait_for("its processes to end", lambda: not processes_of(run), deadline_s=30)
    plan = json.loads((run / "plan.json").read_text())
    assert [
        p for p in run.rglob("*") if p.is_file() and s3.environment["AWS_SECRET_ACCESS_KEY"] in p.read_text(errors="replace")
    ] == []
    reached = losses(run)
    shutil.rmtree(run)

    # Another machine has other folders and no data cache. It shares only what takes long and does not concern the mirror: the
    # converted tokenizer, and the check that packed documents do not see each other.
    elsewhere, address = tmp_path / "elsewhere", f"s3://{s3.bucket}/runs/lost"
    other = {**s3.environment, "LAUNCHER_CACHE": str(tmp_path / "cache")}
    (tmp_path / "cache").mkdir()
    for name in ("models", "isolation-checks"):
        (tmp_path / "cache" / name).symlink_to(launcher_cache / name)
    listed = launch_here("ls", f"s3://{s3.bucket}/runs", "--json", **other)
    assert [listed_run["name"] for listed_run in json.loads(listed.stdout)] == ["lost"], listed.stderr
    done = train_here("resume", address, "--root", str(elsewhere), **other)
    require_exit(done)
    restored = elsewhere / "lost"
    began = next(e for e in events(restored) if e["attempt"] == 2 and e["text"].startswith("continuing from"))
    assert int(began["text"].rpartition("-")[2]) >= 8
    assert losses(restored) == losses(alone)
    assert {step: losses(restored)[step] for step in reached} == reached
    assert status(restored)["state"] == "completed"
    resumed = json.loads((restored / "attempts/002/plan.json").read_text())
    assert (resumed["wandb_id"], resumed["run_dir"]) == (plan["wandb_id"], str(restored))
    assert mirrored(restored, 2)["steps"][-1] == STEPS
    assert f"python -m launcher resume {address}" in done.stdout
    again = launch_here("resume", address, "--root", str(elsewhere), **other)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    assert json.loads(launch_here("ls", f"s3://{s3.bucket}/runs", "--json", **other).stdout)[0]["state"] == "completed"


def test_a_lost_mirror_does_not_stop_training(alone: Path) -> None:
    assert sorted(losses(alone)) == list(range(1, STEPS + 1))
    assert [text.partition(":")[0] for text in alerts(alone)] == [
        "the mirror cannot be written; training continues and the next checkpoint retries",
        "not in the mirror",
    ]
    assert not processes_of(alone)


def test_a_mirror_that_cannot_be_written_is_refused(launch_here: Launch, runs: Path, tmp_path: Path, s3: S3) -> None:
    (tmp_path / "file").write_text("")
    for address in (f"file://{tmp_path}/file/runs", "s3://no-such-bucket/runs", "gs://bucket/runs"):
        done = launch_here(*SETTINGS, f"checkpoint.mirror={address}", f"run.root={runs}", "run.name=refused", **s3.environment)
        require_exit(done, 2)
        assert "Traceback" not in done.stderr
        assert "remedy: " in done.stderr
    assert not runs.exists()
    nothing = launch_here("resume", f"s3://{s3.bucket}/nowhere", **s3.environment)
    assert (nothing.returncode, "no run at this address" in nothing.stderr) == (2, True)
