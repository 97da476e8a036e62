"""Runs that another user owns, can write to or can replace: what is refused, when, and which remedies work."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from file_owners import MALLORY, TEAM, as_root, give
from missing_program import skip_or_fail

from launcher import run_store
from launcher.clusters import detached_process
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir
from launcher.security import ownership
from launcher.worker.ray import driver
from launcher.worker.slurm import job

__all__ = ["as_root"]

pytestmark = pytest.mark.usefixtures("as_root")

Launch = Callable[..., subprocess.CompletedProcess[str]]


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


def link_folder_in_code(run: RunDir) -> Path:
    outside = run.root.parent / "outside"
    (outside / "package").mkdir(parents=True)
    file = outside / "package/__init__.py"
    file.touch()
    os.chown(file, MALLORY, -1)
    (run.code / "launcher/package").symlink_to(outside / "package")
    return file


def link_above(run: RunDir) -> Path:
    """Put the run behind a link that another user owns in a sticky folder, and can redirect. Returns the link."""
    folder = run.root.parent
    actual = folder.rename(folder.parent / "actual")
    folder.symlink_to(actual)
    os.chown(folder, MALLORY, -1, follow_symlinks=False)
    folder.parent.chmod(0o1777)
    return folder


@pytest.mark.parametrize("way", ["owner", "plan", "code", "group", "above", "link", "link above", "folder in code"])
def test_nothing_of_a_run_that_was_replaced_after_its_submission_is_started(
    run: RunDir, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Covers a Slurm job, a Ray driver, and the process that starts a run on this machine."""
    path = {**WAYS, "link above": link_above, "folder in code": link_folder_in_code}[way](run)
    before = {file: file.stat().st_mtime_ns for file in run.root.rglob("*")}
    name = str(path.relative_to(run.root) if path.is_relative_to(run.root) and path != run.root else path)
    expected = f"the run demo is not trusted: {name} "
    assert job.main(["begin", str(run.plan)]) == 1
    assert expected in capsys.readouterr().err
    before_umask = os.umask(0o077)
    try:
        assert driver.main(str(run.plan), 2) == 1
    finally:
        os.umask(before_umask)
    assert expected in capsys.readouterr().err
    with pytest.raises(SubmitError, match=re.escape(expected)):
        detached_process.start(run, 2, "launcher.worker.agent", [str(run.plan), "2"], run.root / "agent.log", "the agent")
    assert {file: file.stat().st_mtime_ns for file in run.root.rglob("*")} == before, "nothing is written there"


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


@pytest.mark.rest
def test_no_run_is_started_in_a_folder_where_others_could_replace_it(
    launch_here: Launch, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` warns, `train` refuses before it creates anything, and the suggested remedies work."""
    settings = ("model=tiny", "data.packing=false", "run.name=other", f"run.root={run.root.parent}")

    def warnings(*flags: str) -> str:
        done = launch_here("plan", "--json", *settings, *flags)
        assert done.returncode == 0, done.stderr
        return "".join(json.loads(done.stdout)["warnings"])

    assert "will be refused" not in warnings()
    os.chown(run.root.parent, 0, TEAM)
    run.root.parent.chmod(0o2770)
    shown = warnings()
    problem = f"a run in {run.root.parent} is not trusted: {run.root.parent} can be written by the group {TEAM}"
    assert f"train, resume and export will be refused: {problem}" in shown
    train = launch_here("train", *settings)
    assert (train.returncode, train.stdout) == (2, "")
    assert problem in train.stderr
    assert "remedy: set run.root to a folder that only you can write to; or if you trust all members" in train.stderr
    plan = run_store.load_plan(run).model_copy(update={"run_dir": str(run.root.parent / "other")})
    with pytest.raises(SubmitError, match=re.escape(problem)):
        run_store.create(plan)
    assert sorted(path.name for path in run.root.parent.iterdir()) == ["demo"], "the directory is not left behind"
    assert (
        f"by the group {TEAM}; if you trust all members of the group {TEAM} with your account, add --trust-owner group:{TEAM}"
        in shown
    )
    assert "will be refused" not in warnings("--trust-owner", f"group:{TEAM}")
    assert "it is completed" in launch_here("cancel", str(run.root)).stderr
    refused = launch_here("resume", str(run.root)).stderr
    assert f"remedy: if you trust all members of the group {TEAM} with your account, add --trust-owner group:{TEAM}" in refused
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", f"group:{TEAM}")
    assert run_store.create(plan).status.is_file()
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS")
    run.root.parent.chmod(0o3770)
    assert run_store.create(plan.model_copy(update={"run_dir": str(run.root.parent / "sticky")})).status.is_file()


def test_permissions_inside_a_private_folder_do_not_matter(launch_here: Launch, run: RunDir) -> None:
    """Many systems use umask 002, which makes new files writable by the group."""
    for path in run.root.rglob("*"):
        path.chmod(0o777)
    assert "it is completed" in launch_here("cancel", str(run.root)).stderr
    assert ownership.run_problem(run) is None


def test_the_private_group_of_a_user_may_write_to_folders_of_root(run: RunDir) -> None:
    """Kubernetes creates volumes that root owns and the group of the pod's user can write to."""
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
    """In a rootless container, `/` belongs to the host's root, a user that does not exist in the namespace."""
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


def test_storage_that_gives_new_files_to_nobody_refuses_a_run_at_its_start(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, whole_code: None
) -> None:
    """With NFS and root_squash, files are created as a different user from the one the process runs as."""
    plan = run_store.load_plan(run)
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        elsewhere = plan.model_copy(update={"run_dir": f"{folder}/demo"})
        try:
            os.seteuid(MALLORY)
            monkeypatch.setattr(os, "geteuid", lambda: MALLORY + 1)
            with pytest.raises(SubmitError, match=f"the run demo is not trusted: {folder}/demo belongs to {MALLORY}") as error:
                run_store.create(elsewhere)
            assert "set run.root to storage that keeps file owners" in str(error.value)
            assert os.listdir(folder) == []
            monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", str(MALLORY))
            assert run_store.create(elsewhere).status.is_file()
        finally:
            os.seteuid(0)


def test_a_user_trusts_their_own_runs_and_those_of_root(run: RunDir) -> None:
    # Other users cannot enter pytest's temporary folders.
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
