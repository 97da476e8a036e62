"""Runs that another user owns or can write to: what commands read from them, and what they refuse to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import hand_made
import pytest
from file_owners import MALLORY, as_root, give
from http_server import serving
from mirror_tools import make_run

from launcher import json_records, run_store
from launcher.checkpoint import store
from launcher.checkpoint.manifest import LATER_EVALUATION, MANIFEST, Manifest
from launcher.checkpoint.mirror import download
from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.checkpoint.mirror.upload import Mirror
from launcher.cli import runs
from launcher.cli.main import main
from launcher.cli.status import _ask_backend, _state_reader
from launcher.clusters import detached_process
from launcher.clusters.ray.cluster import JobsApiSubmission
from launcher.config.sections.ray import RaySection
from launcher.errors import DamagedRun, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.security import ownership
from launcher.tracking.jsonl import JsonlTracker, Tail, iter_lines
from launcher.tracking.metrics_tail import read_tail

Launch = Callable[..., subprocess.CompletedProcess[str]]

__all__ = ["as_root"]

pytestmark = pytest.mark.usefixtures("as_root")

TOKEN = "the-token-of-the-cluster" * 2


class Cluster(BaseHTTPRequestHandler):
    """Fakes Ray's Jobs API with a running job; records each request and its token."""

    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers.get("Authorization")))
        job = {"type": "SUBMISSION", "submission_id": "raysubmit_1", "status": "RUNNING", "entrypoint": "x", "message": "on"}
        version = {"version": "4", "ray_version": "2.60.0", "ray_commit": "0"}
        content = json.dumps(job if "/jobs/" in self.path else version).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def cluster() -> type[Cluster]:
    return type("OneCluster", (Cluster,), {"asked": []})


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
    launch: Launch, ray_run: Callable[..., RunDir], env: dict[str, str], cluster: type[Cluster]
) -> None:
    with serving(cluster) as address:
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


def _make_huge(file: Path) -> None:
    file.touch()
    os.truncate(file, 2**40)


def test_a_module_as_the_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="is not the address of a Ray cluster"):
        RaySection.model_validate({"kind": "ray", "address": "module://payload"})


_OF_A_CHECKPOINT = "checkpoints/step-00000010/evaluation.json"


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "events.jsonl", "attempts/001/attempt.json", "attempts/001/rank-00000.log", _OF_A_CHECKPOINT]
)
def test_a_pipe_in_a_run_of_another_user_stops_no_command(launch: Launch, run: RunDir, name: str) -> None:
    file = run.root / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    give(run.root)
    for verb in (["status", str(run.root)], ["logs", str(run.root)], ["ls", "--root", str(run.root.parent)]):
        done = launch(*verb, timeout=30)
        assert "is a pipe or a device, and is not read" in done.stderr, verb


def test_a_pipe_anywhere_that_a_record_is_looked_for_is_not_read(tmp_path: Path) -> None:
    """Examples: meta.json in a data cache named by another user's plan, and digests.json in their run's code."""
    os.mkfifo(pipe := tmp_path / "meta.json")
    with pytest.raises(DamagedRun, match="is not a regular file"):
        json_records.read_json(pipe)


@pytest.mark.parametrize("replace", [os.mkfifo, lambda file: file.symlink_to("/dev/zero"), _make_huge])
def test_the_evaluation_of_a_checkpoint_is_read_within_bounds(tmp_path: Path, replace: Callable[[Path], None]) -> None:
    """The file may be replaced after the run is checked, and `ls` reads one in each of many runs."""
    saving = store.begin_save(tmp_path, step=2, attempt=1, needed_bytes=1)
    path = store.commit(saving, Manifest(step=2, world_size=1, plan_digest="d", attempt=1, eval_loss=2.0, files={}))
    replace(path / LATER_EVALUATION)
    assert [checkpoint.eval_loss for checkpoint in store.list_checkpoints(tmp_path)] == [2.0]
    (path / MANIFEST).unlink()
    replace(path / MANIFEST)
    assert store.list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("name", ["status.json", "plan.json", "attempts/001/attempt.json"])
def test_a_record_of_any_size_in_a_run_of_another_user_is_not_read(run: RunDir, name: str) -> None:
    file = run.root / name
    file.touch()
    os.truncate(file, 2**40)
    with pytest.raises(DamagedRun, match="has more than the 64 MiB of the largest record"):
        json_records.read_json(file)
    give(run.root)
    expected = "has 1,048,576 MiB, more than any record, and is not read"
    for read in (lambda: run_store.find_run(str(run.root), run.root), lambda: _ask_backend(run)):
        with pytest.raises(SubmitError, match=expected):
            read()


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "attempts/001/rank-00000.log"])
def test_lines_of_any_number_in_a_run_of_another_user_are_not_read(run: RunDir, name: str) -> None:
    """A sparse file costs its author no disk space, but would cost every command on the folder of runs memory and time."""
    _make_huge(run.root / name)
    give(run.root)
    for read in (lambda: run_store.find_run(str(run.root), run.root), lambda: _ask_backend(run)):
        with pytest.raises(SubmitError, match="has 1,048,576 MiB, more than any file of its kind, and is not read"):
            read()


@pytest.mark.timeout(300)
def test_a_copy_of_a_plan_that_is_a_pipe_is_not_read(launch: Launch, tmp_path: Path) -> None:
    """Without a plan.json, the command searches for copies of the plan to suggest in its remedy."""
    (folder := tmp_path / "runs/demo/plans").mkdir(parents=True)
    os.mkfifo(folder / "0.json")
    give(folder.parent)
    done = launch("status", "demo", "--root", str(tmp_path / "runs"), timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr


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


@pytest.mark.timeout(300)
def test_a_pipe_that_takes_the_place_of_a_file_after_the_run_was_checked_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "metrics.jsonl")
    assert (Tail(pipe).poll(), list(iter_lines(pipe)), read_tail(pipe).losses) == ([], [], ())


_CUT_OFF = """
import os, sys
from launcher.tracking import metrics_tail

with metrics_tail._mapped(sys.argv[1]) as data:
    os.truncate(sys.argv[1], 0)
    print(data.rfind(b"train/loss") > 0)
"""


def test_metrics_that_their_owner_cuts_off_while_they_are_read_end_no_command(run: RunDir) -> None:
    """The kernel kills a process that reads a memory-mapped file past its end."""
    give(run.root)
    done = subprocess.run([sys.executable, "-c", _CUT_OFF, str(run.metrics)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


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


def test_losses_at_the_end_of_the_numbers_are_no_traceback(run: RunDir, tmp_path: Path) -> None:
    log = JsonlTracker(run, 2)
    for step, loss in ((11, 1e308), (12, -1e308), (13, 2.0)):
        log.log(step, {"train/loss": loss, "eval/held_out/loss": loss, "perf/tokens_per_sec": loss})
    give(run.root)
    assert main(["report", str(run.root), "--html", str(tmp_path / "page.html")]) == 0
