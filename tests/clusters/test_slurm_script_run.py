"""Running the batch script: setup commands, begin, one task per node, conclude."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from file_owners import MALLORY, TEAM, as_root, give
from sandbox import Sandbox, rendered

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.security import ownership

SlurmPlan = Callable[..., LaunchPlan]
SETUP = ["export A=1", "source {folder}/env.sh", "ulimit -n 64", "conda activate train", "cd {folder}/elsewhere", "B=2"]
ENV_SH = """\
conda() { export CONDA_DEFAULT_ENV="$2"; }
export SOURCED="it's $A"
"""


__all__ = ["as_root"]


def test_setup_commands_run_in_bash(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    (sandbox.folder / "elsewhere").mkdir()
    (sandbox.folder / "env.sh").write_text(ENV_SH)
    commands = [command.format(folder=sandbox.folder) for command in SETUP]
    plan = begun_plan(setup=[*commands, "export B"], env={"C": "3"})
    done = sandbox.run(rendered(plan, sandbox.folder))
    assert (done.returncode, done.stderr) == (0, "")
    # begin, the task and conclude get the same environment.
    assert [call["name"] for call in sandbox.calls] == ["python", "srun", "python", "python"]
    for call in sandbox.calls:
        variables = {name: call["env"].get(name) for name in ("A", "B", "C", "SOURCED", "CONDA_DEFAULT_ENV", "PWD")}
        assert call["nofile"] == 64
        assert variables == {
            "A": "1",
            "B": "2",
            "C": "3",
            "SOURCED": "it's 1",
            "CONDA_DEFAULT_ENV": "train",
            "PWD": str(sandbox.folder / "elsewhere"),
        }


def test_the_code_snapshot_comes_first_in_pythonpath(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    plan = begun_plan(env={"PYTHONPATH": "/mine"})
    sandbox.run(rendered(plan, sandbox.folder), PYTHONPATH="/login", PYTHONSAFEPATH="")
    paths = {call["env"]["PYTHONPATH"] for call in sandbox.calls}
    assert paths == {f"{plan.run_dir}/code:/mine"}
    assert {call["env"]["PYTHONSAFEPATH"] for call in sandbox.calls} == {"1"}
    sandbox.run(rendered(begun_plan(), sandbox.folder))
    assert {call["env"]["PYTHONPATH"] for call in sandbox.calls} == {f"{plan.run_dir}/code"}


def test_a_job_opens_an_attempt_runs_its_tasks_and_concludes(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    text = rendered(begun_plan(), sandbox.folder)
    plan = str(sandbox.folder / "plan.json")
    for code in ("0", "9", "143"):
        done = sandbox.run(text, SRUN_RC=code)
        begin, task, conclude = sandbox.called("python")
        assert begin == ["-m", "launcher.worker.slurm.job", "begin", plan]
        assert task[:3] == ["-u", "-m", "submitit.core._submit"]
        assert conclude == ["-m", "launcher.worker.slurm.job", "conclude", plan, "7", code]
        assert [call["env"].get("LAUNCHER_ATTEMPT") for call in sandbox.calls] == [None, "7", "7", "7"]
        assert done.returncode == 0, "conclude decides"


def _replace(run: RunDir) -> None:
    run.root.rename(run.root.parent / "moved")
    (run.code / "launcher").mkdir(parents=True)
    run.jobs.mkdir()
    give(run.root)


def _link(run: RunDir) -> None:
    _replace(run)
    run.root.rename(run.root.parent / "theirs")
    run.root.symlink_to("theirs")


def _add_code(run: RunDir) -> None:
    run.root.chmod(0o711)
    file = run.code / "launcher/__init__.py"
    file.touch()
    os.chown(file, MALLORY, -1)


def _share_with_group(run: RunDir) -> None:
    os.chown(run.root, -1, TEAM)
    run.root.chmod(0o2770)


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("attack", [_replace, _link, _add_code, _share_with_group, lambda run: run.root.chmod(0o702)])
def test_nothing_is_run_of_a_run_directory_that_was_replaced_while_the_job_waited(
    begun_plan: SlurmPlan, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, attack: Callable[[RunDir], None]
) -> None:
    plan = begun_plan()
    text = rendered(plan, sandbox.folder)
    attack(RunDir(Path(plan.run_dir)))
    done = sandbox.run(text)
    assert (done.returncode, sandbox.calls) == (77, [])
    assert f"not run, because other users own or can write to: {plan.run_dir}" in done.stderr
    # A user who trusts these owners sets this variable at submission, and the job passes it on.
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "anyone" if attack.__name__ == "<lambda>" else f"{MALLORY},group:{TEAM}")
    done = sandbox.run(rendered(plan, sandbox.folder))
    assert done.returncode == 0, done.stderr
    accepted = {call["env"]["LAUNCHER_TRUST_OWNERS"] for call in sandbox.calls}
    assert accepted == {"anyone" if attack.__name__ == "<lambda>" else f"0,{MALLORY},group:{TEAM}"}


# Owner, group and mode of the run directory and of a file of its code, the trusted owners, and whether the run may start.
# Number 0 is root and its private group, 1 is `daemon` and its private group.
PERMISSIONS = {
    "readable for a group": ((0, TEAM, 0o750), (0, 0, 0o644), "", True),
    "umask 002": ((0, 0, 0o750), (0, 0, 0o664), "", True),
    "umask 002, directory": ((0, 0, 0o770), (0, 0, 0o664), "", True),
    "a group's file": ((0, 0, 0o750), (0, TEAM, 0o664), "", False),
    "a group's file, private directory": ((0, 0, 0o700), (0, TEAM, 0o664), "", True),
    "a group's directory": ((0, TEAM, 0o770), (0, 0, 0o644), "", False),
    "a trusted group's file": ((0, 0, 0o750), (0, TEAM, 0o664), f"group:{TEAM}", True),
    "everyone's file": ((0, 0, 0o750), (0, 0, 0o666), "", False),
    "everyone's directory": ((0, 0, 0o702), (0, 0, 0o644), "", False),
    "another user's file": ((0, 0, 0o750), (1, 1, 0o644), "", False),
    "a trusted user's file": ((0, 0, 0o750), (1, 1, 0o664), "daemon", True),
    "a trusted user's directory": ((1, 1, 0o775), (1, 1, 0o664), "daemon", True),
    "another user's private group": ((0, 0, 0o750), (0, 1, 0o664), "", False),
    "a trusted user's private group": ((0, 0, 0o750), (0, 1, 0o664), "daemon", True),
}


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("case", PERMISSIONS)
def test_the_script_and_the_launcher_accept_the_same_runs(
    begun_plan: SlurmPlan, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    *permissions, trusted, is_accepted = PERMISSIONS[case]
    plan = begun_plan()
    run = RunDir(Path(plan.run_dir))
    file = run.code / "launcher/__init__.py"
    file.touch()
    for path, (uid, gid, mode) in zip((run.root, file), permissions, strict=True):
        os.chown(path, uid, gid)
        path.chmod(mode)
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", trusted)
    problem, done = ownership.run_problem(run), sandbox.run(rendered(plan, sandbox.folder))
    assert (problem is None) is is_accepted, problem
    assert done.returncode == (0 if is_accepted else 77), done.stderr


def test_permissions_in_a_private_run_directory_do_not_stop_its_job(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    """Some storage shows mode 0777 for everything in a folder."""
    plan = begun_plan()
    for path in Path(plan.run_dir).rglob("*"):
        path.chmod(0o777)
    assert sandbox.run(rendered(plan, sandbox.folder)).returncode == 0


def test_a_job_without_an_attempt_succeeds_and_one_that_is_refused_fails(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    text = rendered(begun_plan(), sandbox.folder)
    assert sandbox.run(text, ATTEMPT="").returncode == 0
    assert (len(sandbox.called("python")), sandbox.called("srun")) == (1, [])
    assert sandbox.run(text, JOB_RC="1").returncode == 1
    assert (len(sandbox.called("python")), sandbox.called("srun")) == (1, [])


@pytest.mark.parametrize("strict", ["set -e", "set -u", "set -euo pipefail", "trap true EXIT"])
def test_set_e_in_setup_does_not_skip_the_conclusion(begun_plan: SlurmPlan, sandbox: Sandbox, strict: str) -> None:
    sandbox.run(rendered(begun_plan(setup=[strict]), sandbox.folder), SRUN_RC="9")
    assert sandbox.called("python")[-1][-2:] == ["7", "9"]


def test_a_failing_setup_command_with_set_e_ends_the_job(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    done = sandbox.run(rendered(begun_plan(setup=["set -e", "tool fail"]), sandbox.folder), JOB_RC="3")
    assert (done.returncode, sandbox.called("python")) == (3, [])


def test_a_task_without_access_to_the_plan_reports_it(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    text = rendered(begun_plan(), sandbox.folder)
    (sandbox.folder / "plan.json").unlink()
    done = sandbox.run(text)
    assert f"{os.uname().nodename} cannot read {sandbox.folder / 'plan.json'}" in done.stderr
    assert sandbox.called("python")[-1][-2:] == ["7", "78"]


def test_a_task_refuses_a_run_directory_that_the_first_node_does_not_share(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    """There another user may have created it, with code, while the job waited or started."""
    text = rendered(begun_plan(), sandbox.folder)
    mark = f"{sandbox.folder}/.mark-"
    assert mark in text
    done = sandbox.run(text.replace("export LAUNCHER_MARK", 'export LAUNCHER_MARK; rm "$LAUNCHER_MARK"'))
    assert f"{os.uname().nodename} cannot read {sandbox.folder / 'plan.json'}" in done.stderr
    assert sandbox.called("python")[-1][-2:] == ["7", "78"]
    assert sandbox.run(text).returncode == 0
    assert not list(sandbox.folder.glob(".mark-*"))


def test_apptainer_receives_separate_arguments(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    settings = {"container_image": "/opt/train#1.sif", "container_python": "/venv/bin/python", "container_mounts": ["/a:/b:ro"]}
    plan = begun_plan(container_runtime="apptainer", **settings)
    assert sandbox.run(rendered(plan, sandbox.folder)).returncode == 0
    (argv,) = sandbox.called("apptainer")
    own = ["--bind", f"{plan.run_dir}:{plan.run_dir}", "--bind", "/cache/data/0123:/cache/data/0123"]
    jobs = f"{RunDir(Path(plan.run_dir)).jobs}/%j"
    task = ["/venv/bin/python", "-u", "-m", "submitit.core._submit", jobs]
    assert argv == ["exec", *own, "--bind", "/a:/b:ro", "/opt/train#1.sif", *task]
