"""Runs that another user owns or can write to: what a command reads of them, and what it refuses to do with them."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import hand_made
import pytest
from http_server import serving
from mirror_tools import make_run
from missing_program import skip_or_fail

from launcher import json_records, run_store
from launcher.checkpoint.mirror import download
from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.checkpoint.mirror.upload import Mirror
from launcher.cli import runs
from launcher.cli.status import _state_reader
from launcher.clusters import detached_process
from launcher.clusters.ray.cluster import JobsApiSubmission
from launcher.config.sections.ray import RaySection
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir
from launcher.run_records import Attempt
from launcher.security import ownership

Launch = Callable[..., subprocess.CompletedProcess[str]]

# Numbers that no user of a fresh machine has.
MALLORY, TEAM = 54321, 54322
TOKEN = "the-token-of-the-cluster" * 2


@pytest.fixture(autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        skip_or_fail("only root can give files to another user: run pytest as root")


def give(path: Path, uid: int = MALLORY) -> None:
    """Give a folder with its content to another user."""
    for one in (path, *path.rglob("*")):
        os.chown(one, uid, -1, follow_symlinks=False)


class Cluster(BaseHTTPRequestHandler):
    """Answers as Ray's Jobs API with a running job, and keeps what was asked, with its token."""

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
    """A run whose files say that a job at an address runs it."""

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
                assert f"shown from its files alone: the run demo is not trusted: {run.root} belongs to {MALLORY}" in done.stdout
            if verb == "logs":
                assert "a line of rank 0" in done.stdout
        done = launch("cancel", str(run.root), "--no-save", **env)
        assert (done.returncode, cluster.asked) == (2, []), done.stderr
        assert launch("status", str(run.root), "--trust-owner", str(MALLORY), **env).returncode == 0
        assert cluster.asked


def test_the_log_of_another_users_run_that_gives_no_sign_of_life_is_not_followed(
    launch: Launch, ray_run: Callable[[str], RunDir]
) -> None:
    """Nobody is asked whether its processes live, so that following it would never end."""
    run = ray_run("http://127.0.0.1:8265")
    detached_process.write_liveness(run)
    give(run.root)
    assert "no sign of life" not in _state_reader(run)().message
    an_hour_ago = time.time() - 3600
    for file in (run.status, run.alive):
        os.utime(file, (an_hour_ago, an_hour_ago))
    expected = f"no sign of life for 60 minutes; shown from its files alone: the run demo is not trusted: {run.root} belongs to"
    assert expected in _state_reader(run)().message
    done = launch("logs", "-f", str(run.root), timeout=60)
    assert done.returncode == 0, done.stderr
    assert "a line of rank 0" in done.stdout
    assert f"not followed: {expected}" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("module://payload", "is not the address of a Ray cluster"),
        ("payload://127.0.0.1:1", "is not the address of a Ray cluster"),
        ("http://8.8.8.8:8265", "which is public"),
        ("http://0.0.0.0:8265", "stands for all interfaces"),
        ("http://user:secret@127.0.0.1:8265", "is not the address of a Ray cluster"),
        ("127.0.0.1:6379", "name no job of a Jobs API"),
    ],
)
def test_an_address_in_a_file_passes_the_check_of_the_setting(
    ray_run: Callable[..., RunDir], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, reason: str
) -> None:
    """Ray's client imports the module that the scheme of an address names, from the working directory too."""
    (tmp_path / "payload.py").write_text(f"open({str(tmp_path / 'was-imported')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    run = ray_run(address)
    assert reason in _state_reader(run)().message
    assert not (tmp_path / "was-imported").exists()


def test_a_module_as_the_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="is not the address of a Ray cluster"):
        RaySection.model_validate({"kind": "ray", "address": "module://payload"})


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "attempts/001/attempt.json", "attempts/001/rank-00000.log"])
def test_a_pipe_in_a_run_of_another_user_stops_no_command(launch: Launch, run: RunDir, name: str) -> None:
    file = run.root / name
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    give(run.root)
    for verb in (["status", str(run.root)], ["logs", str(run.root)], ["ls", "--root", str(run.root.parent)]):
        done = launch(*verb, timeout=30)
        assert "is a pipe or a device, and is not read" in done.stderr, verb


def weaken_plan(run: RunDir) -> Path:
    run.root.chmod(0o755)
    run.plan.chmod(0o666)
    return run.plan


def weaken_code(run: RunDir) -> Path:
    file = run.code / "launcher/__init__.py"
    os.chown(file, MALLORY, -1)
    return file


def weaken_for_group(run: RunDir) -> Path:
    os.chown(run.root, 0, TEAM)
    run.root.chmod(0o770)
    return run.root


def weaken_above(run: RunDir) -> Path:
    run.root.parent.chmod(0o777)
    return run.root.parent


def link_code(run: RunDir) -> Path:
    outside = run.root.parent / "outside"
    shutil.copytree(run.code, outside)
    shutil.rmtree(run.code)
    run.code.symlink_to(outside)
    os.chown(outside, MALLORY, -1)
    return outside


def test_a_mirrored_run_is_not_downloaded_to_where_others_could_replace_it(tmp_path: Path) -> None:
    mirror, root = f"file://{tmp_path}/mirror", tmp_path / "elsewhere"
    plan, run = make_run(tmp_path, mirror, name="b")
    Mirror(RemoteFolder(f"{mirror}/b"), run, plan, 1).begin()
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(SubmitError, match=r"the run b is not trusted: .*elsewhere can be written by everyone"):
        runs.run("resume", [f"{mirror}/b", "--root", str(root)])
    assert [path.name for path in (root / "b").iterdir()] == [download.MARKER], "nothing was fetched"


WAYS = {
    "owner": lambda run: (give(run.root), run.root)[1],
    "plan": weaken_plan,
    "code": weaken_code,
    "group": weaken_for_group,
    "above": weaken_above,
    "link": link_code,
}
VERBS = (
    ("resume", "RUN"),
    ("cancel", "RUN"),
    ("export", "RUN"),
    ("checkpoints", "RUN", "--prune"),
    ("drill", "RUN", "--fault", "kill-rank"),
    ("plan", "model.path=run:RUN", "model.name=m"),
)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_others_can_change_is_not_used(launch_here: Launch, run: RunDir, way: str) -> None:
    path = WAYS[way](run)
    expected = {
        **dict.fromkeys(("owner", "code", "link"), f"belongs to {MALLORY}"),
        **dict.fromkeys(("plan", "above"), "can be written by everyone"),
        "group": f"can be written by the group {TEAM}",
    }[way]
    for verb, *arguments in VERBS:
        done = launch_here(verb, *(argument.replace("RUN", str(run.root)) for argument in arguments))
        assert done.returncode == 2, (verb, done.stdout, done.stderr)
        if verb == "cancel" and way in ("code", "above", "link"):
            assert "the run is not running: it is completed" in done.stderr, "it uses records, which others cannot change"
            continue
        assert f"the run demo is not trusted: {path.relative_to(run.root) if way in ('plan', 'code') else path} {expected}" in (
            done.stderr.replace("run demo: the run demo", "the run demo")
        ), verb
        assert "remedy: " in done.stderr


def test_the_remedies_help(launch_here: Launch, run: RunDir) -> None:
    def cancel(*flags: str, **env: str) -> str:
        done = launch_here("cancel", str(run.root), *flags, **env)
        assert done.returncode == 2
        return done.stderr

    used = "the run is not running: it is completed"
    assert used in cancel()
    give(run.root)
    assert f"add --trust-owner {MALLORY}, or set LAUNCHER_TRUST_OWNERS={MALLORY}" in cancel()
    assert used in cancel("--trust-owner", str(MALLORY))
    assert used in cancel(f"--trust-owner={MALLORY}", "--trust-owner", "nobody")
    assert used in cancel(LAUNCHER_TRUST_OWNERS=f"nobody, {MALLORY}")
    assert used in cancel(LAUNCHER_TRUST_OWNERS="anyone")
    assert "belongs to" in cancel("--trust-owner", "nobody")
    assert "there is no such user or group" in cancel("--trust-owner", "no-such-user")
    assert "--trust-owner needs the name" in cancel("--trust-owner")
    give(run.root, 0)
    weaken_for_group(run)
    assert f"chmod g-w {run.root}" in cancel()
    assert used in cancel("--trust-owner", f"group:{TEAM}")
    run.root.chmod(0o700)
    run.root.parent.chmod(0o1777)
    assert used in cancel(), "others can neither rename nor remove what they do not own in a sticky folder"


def test_a_place_that_a_group_can_write_to_is_a_warning_with_a_remedy_that_helps(launch_here: Launch, run: RunDir) -> None:
    def warnings(*flags: str) -> str:
        place = f"run.root={run.root.parent}"
        done = launch_here("plan", "--json", "model=tiny", "data.packing=false", "run.name=other", place, *flags)
        assert done.returncode == 0, done.stderr
        return "".join(json.loads(done.stdout)["warnings"])

    assert "will be refused" not in warnings()
    os.chown(run.root.parent, 0, TEAM)
    run.root.parent.chmod(0o2770)
    shown = warnings()
    assert f"resume and export will be refused: the run other is not trusted: {run.root.parent} can be written" in shown
    assert (
        f"by the group {TEAM}; if you trust all members of the group with your account, add --trust-owner group:{TEAM}" in shown
    )
    assert "will be refused" not in warnings("--trust-owner", f"group:{TEAM}")
    assert "it is completed" in launch_here("cancel", str(run.root)).stderr
    refused = launch_here("resume", str(run.root)).stderr
    assert f"remedy: if you trust all members of the group with your account, add --trust-owner group:{TEAM}" in refused


def test_permissions_inside_a_private_folder_do_not_matter(launch_here: Launch, run: RunDir) -> None:
    """As with umask 002, which many systems have."""
    for path in run.root.rglob("*"):
        path.chmod(0o777)
    assert "it is completed" in launch_here("cancel", str(run.root)).stderr
    assert ownership.run_problem(run) is None


def test_the_private_group_of_a_user_may_write_to_folders_of_root(run: RunDir) -> None:
    """As Kubernetes makes a volume: root's, and writable for the group of the pods' user."""
    daemon = pwd.getpwnam("daemon")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o2775)
        copy = RunDir(Path(folder, "demo"))
        shutil.copytree(run.root, copy.root)
        give(copy.root, daemon.pw_uid)
        try:
            os.chown(folder, 0, daemon.pw_gid)
            os.seteuid(daemon.pw_uid)
            assert ownership.run_problem(copy) is None
            os.seteuid(0)
            os.chown(folder, 0, TEAM)
            os.seteuid(daemon.pw_uid)
            problem = ownership.run_problem(copy)
            assert problem is not None
            assert f"{folder} can be written by the group {TEAM}" in problem.message
        finally:
            os.seteuid(0)


def test_in_a_user_namespace_folders_above_may_belong_to_a_user_outside(run: RunDir, launcher_env: Mapping[str, str]) -> None:
    """As in a container without root, where `/` is that of the host's root, whom the namespace does not have."""
    inside = ("unshare", "--user", "--map-root-user")
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        skip_or_fail("this machine allows no user namespaces: it needs `unshare --user`")
    code = "import sys; from launcher.security import ownership as o; from launcher.plan.run_dir import RunDir as R; "
    code += "print(o.run_problem(R(o.Path(sys.argv[1]))))"

    def problem() -> str:
        command = [*inside, sys.executable, "-c", code, str(run.root)]
        return subprocess.run(command, env=launcher_env, capture_output=True, text=True, check=True, timeout=60).stdout

    os.chown(run.root.parent, MALLORY, -1)
    assert f"{run.root.parent} belongs to {MALLORY}" in str(ownership.run_problem(run)), "outside of it"
    assert problem() == "None\n"
    run.root.parent.chmod(0o777)
    assert f"{run.root.parent} can be written by everyone" in problem()
    run.root.parent.chmod(0o755)
    run.root.chmod(0o755)
    os.chown(run.plan, MALLORY, -1)
    assert "plan.json belongs to nobody" in problem()


def test_storage_that_gives_new_files_to_nobody_refuses_a_run_at_its_start(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """As NFS with root_squash: this process writes as another user than it is."""
    plan = run_store.load_plan(run)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        elsewhere = plan.model_copy(update={"run_dir": f"{folder}/demo"})
        try:
            os.seteuid(MALLORY)
            monkeypatch.setattr(os, "geteuid", lambda: MALLORY + 1)
            with pytest.raises(SubmitError, match=f"the run demo is not trusted: {folder}/demo belongs to {MALLORY}") as error:
                run_store.create(elsewhere)
            assert "set run.root to storage that keeps owners" in str(error.value)
            assert os.listdir(folder) == []
            monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", str(MALLORY))
            assert run_store.create(elsewhere).status.is_file()
        finally:
            os.seteuid(0)


def test_a_user_trusts_their_own_runs_and_those_of_root(run: RunDir) -> None:
    # Other users cannot enter the folders of pytest.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = RunDir(Path(folder, "demo"))
        shutil.copytree(run.root, copy.root)
        copy.root.chmod(0o755)
        try:
            os.seteuid(MALLORY)
            assert ownership.run_problem(copy) is None
            os.seteuid(0)
            give(copy.root)
            os.seteuid(MALLORY)
            assert ownership.run_problem(copy) is None
            os.seteuid(0)
            os.seteuid(MALLORY + 1)
            problem = ownership.run_problem(copy)
            assert problem is not None
            assert f"belongs to {MALLORY}" in problem.message
        finally:
            os.seteuid(0)
