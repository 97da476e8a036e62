"""Runs that another user owns or can write to: what commands read from them, and what they refuse to do."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made
import pytest
from file_owners import MALLORY, as_root, give
from http_server import Answer, Request, serving
from mirror_tools import make_run

from launcher import json_records, run_store
from launcher.checkpoint.mirror import download
from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.checkpoint.mirror.upload import Mirror
from launcher.cli import runs
from launcher.cli.main import main
from launcher.cli.status import _state_reader
from launcher.clusters import detached_process
from launcher.clusters.ray.cluster import JobsApiSubmission
from launcher.config.sections.ray import RaySection
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.security import ownership

Launch = Callable[..., subprocess.CompletedProcess[str]]

__all__ = ["as_root"]

pytestmark = pytest.mark.usefixtures("as_root")

TOKEN = "the-token-of-the-cluster" * 2


class Cluster:
    """Fakes Ray's Jobs API with a running job; records each request and its token."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def answer(self, request: Request) -> Answer:
        self.asked.append((request.path, request.headers.get("Authorization")))
        job = {"type": "SUBMISSION", "submission_id": "raysubmit_1", "status": "RUNNING", "entrypoint": "x", "message": "on"}
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "0"}
        return 200, job if "/jobs/" in request.path else version


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def ray_run(tmp_path: Path) -> Callable[[str], RunDir]:
    """Create a run whose files name a Ray job at a given address."""

    def make(address: str, **cluster: Any) -> RunDir:
        settings = {**hand_made.SETTINGS, "cluster": {"kind": "ray", "address": "http://127.0.0.1:8265", **cluster}}
        run = run_store.create(hand_made.plan(tmp_path / "runs/demo", settings))
        number = run_store.create_attempt(run, Attempt(resume_step=None))
        json_records.write(run.attempt(number) / "submitted.json", JobsApiSubmission("raysubmit_1", address, 1.0))
        run_store.update_status(run, state="running", attempt=number, job={"id": "raysubmit_1"})
        run.rank_log(number, 0).write_text("a line of rank 0\n")
        return run

    return make


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}


@pytest.mark.rest
def test_only_a_run_that_is_trusted_gets_the_token_to_its_address(
    launch: Launch, ray_run: Callable[..., RunDir], env: dict[str, str], cluster: Cluster
) -> None:
    with serving(cluster.answer) as address:
        run = ray_run(address)
        shown = launch("status", str(run.root), **env)
        assert shown.returncode == 0, shown.stderr
        assert any("raysubmit_1" in path and TOKEN in (token or "") for path, token in cluster.asked), (
            "as it must be for one's own"
        )
        give(run.root)
        cluster.asked.clear()
        for verb, *arguments in (
            ["status", str(run.root)],
            ["ls", "--root", str(run.root.parent)],
            ["logs", str(run.root)],
            ["report", str(run.root), "--html", str(run.root.parent / "page.html")],
            ["checkpoints", str(run.root)],
        ):
            done = launch(verb, *arguments, **env)
            assert done.returncode == 0, (verb, done.stderr)
            if verb == "status":
                assert "running" in done.stdout
                assert f"shown from its files only: the run demo is not trusted: {run.root} belongs to {MALLORY}" in done.stdout
            if verb == "logs":
                assert "a line of rank 0" in done.stdout
        done = launch("cancel", str(run.root), "--no-save", **env)
        assert (done.returncode, cluster.asked) == (2, []), done.stderr
        assert launch("status", str(run.root), "--trust-owner", str(MALLORY), **env).returncode == 0
        assert cluster.asked


def test_the_log_of_another_users_run_that_gives_no_sign_of_life_is_not_followed(
    launch: Launch, ray_run: Callable[[str], RunDir]
) -> None:
    """The launcher does not query its processes, so following the log would never end."""
    run = ray_run("http://127.0.0.1:8265")
    detached_process.write_liveness(run)
    give(run.root)
    assert "no sign of life" not in _state_reader(run)().message
    an_hour_ago = time.time() - 3600
    for file in (run.status, run.alive):
        os.utime(file, (an_hour_ago, an_hour_ago))
    expected = f"no sign of life for 60 minutes; shown from its files only: the run demo is not trusted: {run.root} belongs to"
    assert expected in _state_reader(run)().message
    done = launch("logs", "-f", str(run.root), timeout=60)
    assert done.returncode == 0, done.stderr
    assert "a line of rank 0" in done.stdout
    assert f"not followed: {expected}" in " ".join(done.stdout.split())


@pytest.mark.parametrize("state", ["running", "pending"])
def test_the_log_of_another_users_slurm_run_is_followed_as_long_as_it_has_output(
    launch_here: Launch, run: RunDir, state: str
) -> None:
    """A Slurm run has no liveness file, and the launcher does not query Slurm about another user's run."""
    run_store.update_status(run, state=state, attempt=2)
    log = run.rank_log(2, 0)
    log.write_text("a line of rank 0\n")
    give(run.root)
    an_hour_ago = time.time() - 3600
    for file in run.root.rglob("*"):
        os.utime(file, (an_hour_ago, an_hour_ago))
    done = launch_here("logs", "-f", str(run.root))
    assert done.returncode == 0, done.stderr
    assert "a line of rank 0" in done.stdout
    assert "not followed: no output for 60 minutes; shown from its files only" in " ".join(done.stdout.split())
    os.utime(log)
    assert "no output" not in _state_reader(run)().message


def test_a_module_as_the_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="is not the address of a Ray cluster"):
        RaySection.model_validate({"kind": "ray", "address": "module://payload"})


def test_a_link_of_another_user_chooses_no_run(launch_here: Launch, run: RunDir) -> None:
    """In a shared folder of runs, each user can create links, including links to other users' runs."""
    root, link = str(run.root.parent), run.root.with_name("theirs")
    link.symlink_to(run.root)
    os.chown(link, MALLORY, -1, follow_symlinks=False)
    for verb in ("cancel", "resume", "export", "evaluate", "logs"):
        done = launch_here(verb, "theirs", "--root", root)
        assert done.returncode == 2, (verb, done.stdout)
        assert f"theirs is a link of {MALLORY}, who controls which run it points to" in done.stderr
        assert f"name the run itself: {run.root}" in done.stderr
    os.chown(link, os.geteuid(), -1, follow_symlinks=False)
    assert launch_here("status", "theirs", "--root", root).returncode == 0


def test_a_link_that_another_user_has_put_in_place_of_a_folder_chooses_no_run(run: RunDir, tmp_path: Path) -> None:
    """The name resolved to this user's run, but is another user's real folder by the time it is checked."""
    shared = tmp_path / "shared"
    (shared / "x").mkdir(parents=True)
    give(shared / "x")
    with pytest.raises(SubmitError, match="x was replaced while it was being checked"):
        ownership.require_own_links(shared / "x", shared, run)
    ownership.require_own_links(run.root, run.root.parent, run)


def test_a_mirrored_run_is_not_downloaded_to_where_others_could_replace_it(tmp_path: Path) -> None:
    mirror, root = f"file://{tmp_path}/mirror", tmp_path / "elsewhere"
    plan, run = make_run(tmp_path, mirror, name="b")
    Mirror(RemoteFolder(f"{mirror}/b"), run, plan, 1).begin()
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(SubmitError, match=r"the run b is not trusted: .*elsewhere can be written by everyone"):
        runs.run("resume", [f"{mirror}/b", "--root", str(root)])
    assert [path.name for path in (root / "b").iterdir()] == [download.MARKER], "nothing was fetched"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (("memory", "per_rank_gib"), 1e308),
            (("provenance",), "a text"),
            (("provenance",), 5),
            (("provenance", "packages"), "x"),
        ),
        *((("provenance", "overrides"), 5), (("topology", "world_size"), "two"), (("topology", "world_size"), None)),
    ],
)
def test_values_that_no_launcher_writes_are_no_traceback(
    run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: tuple[str, ...], value: object
) -> None:
    values = json.loads(run.plan.read_text())
    part = values
    for name in key[:-1]:
        part = part[name]
    part[key[-1]] = value
    run.plan.write_text(json.dumps(values))
    give(run.root)
    page = str(tmp_path / "page.html")
    for words in (["report", str(run.root), "--html", page], ["diff", str(run.root), str(run.root)], ["logs", str(run.root)]):
        assert main(words) in (0, 1, 2), words
        assert "Traceback" not in capsys.readouterr().err
