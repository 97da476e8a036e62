"""Running the batch script: setup commands, begin, one task per node, conclude."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from file_owners import as_root
from sandbox import Sandbox, rendered

from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir

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


def test_apptainer_receives_separate_arguments(begun_plan: SlurmPlan, sandbox: Sandbox) -> None:
    settings = {"container_image": "/opt/train#1.sif", "container_python": "/venv/bin/python", "container_mounts": ["/a:/b:ro"]}
    plan = begun_plan(container_runtime="apptainer", **settings)
    assert sandbox.run(rendered(plan, sandbox.folder)).returncode == 0
    (argv,) = sandbox.called("apptainer")
    own = ["--bind", f"{plan.run_dir}:{plan.run_dir}", "--bind", "/cache/data/0123:/cache/data/0123"]
    jobs = f"{RunDir(Path(plan.run_dir)).jobs}/%j"
    task = ["/venv/bin/python", "-u", "-m", "submitit.core._submit", jobs]
    assert argv == ["exec", *own, "--bind", "/a:/b:ro", "/opt/train#1.sif", *task]
