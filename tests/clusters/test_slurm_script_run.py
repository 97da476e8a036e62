"""Running the batch script with fake programs: setup commands, begin, one task per node, conclude.

Shell injection through settings: the schema refuses a value, or the script passes it on unchanged.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from plan_fixtures import PlanOf
from pydantic import ValidationError
from unusual_files import as_root

from launcher.clusters.slurm import sbatch
from launcher.config.compose import run_hydra
from launcher.config.sections.slurm import SlurmSection
from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir

__all__ = ["as_root"]
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
SETUP = ["export A=1", "source {folder}/env.sh", "ulimit -n 64", "conda activate train", "cd {folder}/elsewhere", "B=2"]
ENV_SH = """\
conda() { export CONDA_DEFAULT_ENV="$2"; }
export SOURCED="it's $A"
"""
# Settings that are not part of the script.
UNWRITTEN = ("gpu_type", "interface")


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


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "python3", "srun", "module", "tool", "apptainer"):
        (programs / name).write_text(RECORDER.format(python=sys.executable))
        (programs / name).chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    return Sandbox(tmp_path)


@pytest.fixture
def begun_plan(slurm_plan: PlanOf, sandbox: Sandbox) -> PlanOf:
    """Plan a run on Slurm whose directory is in the sandbox and exists, as it does when a job starts."""

    def planned(**settings: Any) -> LaunchPlan:
        plan = slurm_plan(str(sandbox.folder), **settings)
        run = RunDir(Path(plan.run_dir))
        run.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        (run.code / "launcher").mkdir(parents=True, exist_ok=True)
        run.jobs.mkdir(exist_ok=True)
        return plan

    return planned


def sbatch_options(text: str) -> dict[str, str]:
    options = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(len(line) == 1 for line in options), "one option per line"
    return dict(line[0].removeprefix("--").partition("=")[::2] for line in options)


def rendered(plan: LaunchPlan, folder: Path) -> str:
    """Render the script of a run whose plan is in `folder`."""
    file = folder / "plan.json"
    file.touch()
    return sbatch.render(plan, file)


def test_setup_commands_run_in_bash(begun_plan: PlanOf, sandbox: Sandbox) -> None:
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


def test_the_code_snapshot_comes_first_in_pythonpath(begun_plan: PlanOf, sandbox: Sandbox) -> None:
    plan = begun_plan(env={"PYTHONPATH": "/mine"})
    sandbox.run(rendered(plan, sandbox.folder), PYTHONPATH="/login", PYTHONSAFEPATH="")
    paths = {call["env"]["PYTHONPATH"] for call in sandbox.calls}
    assert paths == {f"{plan.run_dir}/code:/mine"}
    assert {call["env"]["PYTHONSAFEPATH"] for call in sandbox.calls} == {"1"}
    sandbox.run(rendered(begun_plan(), sandbox.folder))
    assert {call["env"]["PYTHONPATH"] for call in sandbox.calls} == {f"{plan.run_dir}/code"}


def test_a_job_opens_an_attempt_runs_its_tasks_and_concludes(begun_plan: PlanOf, sandbox: Sandbox) -> None:
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


def test_a_job_without_an_attempt_succeeds_and_one_that_is_refused_fails(begun_plan: PlanOf, sandbox: Sandbox) -> None:
    text = rendered(begun_plan(), sandbox.folder)
    assert sandbox.run(text, ATTEMPT="").returncode == 0
    assert (len(sandbox.called("python")), sandbox.called("srun")) == (1, [])
    assert sandbox.run(text, JOB_RC="1").returncode == 1
    assert (len(sandbox.called("python")), sandbox.called("srun")) == (1, [])


@pytest.mark.parametrize("strict", ["set -e", "set -u", "set -euo pipefail", "trap true EXIT"])
def test_set_e_in_setup_does_not_skip_the_conclusion(begun_plan: PlanOf, sandbox: Sandbox, strict: str) -> None:
    sandbox.run(rendered(begun_plan(setup=[strict]), sandbox.folder), SRUN_RC="9")
    assert sandbox.called("python")[-1][-2:] == ["7", "9"]


def test_a_failing_setup_command_with_set_e_ends_the_job(begun_plan: PlanOf, sandbox: Sandbox) -> None:
    done = sandbox.run(rendered(begun_plan(setup=["set -e", "tool fail"]), sandbox.folder), JOB_RC="3")
    assert (done.returncode, sandbox.called("python")) == (3, [])


def test_a_task_without_access_to_the_plan_reports_it(begun_plan: PlanOf, sandbox: Sandbox) -> None:
    text = rendered(begun_plan(), sandbox.folder)
    (sandbox.folder / "plan.json").unlink()
    done = sandbox.run(text)
    assert f"{os.uname().nodename} cannot read {sandbox.folder / 'plan.json'}" in done.stderr
    assert sandbox.called("python")[-1][-2:] == ["7", "78"]


def test_apptainer_receives_separate_arguments(begun_plan: PlanOf, sandbox: Sandbox) -> None:
    settings = {"container_image": "/opt/train#1.sif", "container_python": "/venv/bin/python", "container_mounts": ["/a:/b:ro"]}
    plan = begun_plan(container_runtime="apptainer", **settings)
    assert sandbox.run(rendered(plan, sandbox.folder)).returncode == 0
    (argv,) = sandbox.called("apptainer")
    own = ["--bind", f"{plan.run_dir}:{plan.run_dir}", "--bind", "/cache/data/0123:/cache/data/0123"]
    jobs = f"{RunDir(Path(plan.run_dir)).jobs}/%j"
    task = ["/venv/bin/python", "-u", "-m", "submitit.core._submit", jobs]
    assert argv == ["exec", *own, "--bind", "/a:/b:ro", "/opt/train#1.sif", *task]


# A valid value of each text setting; `[]` marks a list's items, `{}` a mapping's keys, `{}=` its values.
GOOD = {
    "gpu_type": "H100-80GB",
    "account": "research",
    "partition": "main",
    "time": "1-00:00:00",
    "setup[]": "tool --set a=b",
    "env{}": "NCCL_DEBUG",
    "env{}=": "INFO",
    "container_image": "owner/image",
    "container_mounts[]": "/a:/b",
    "container_python": "python3",
    "interface": "ib0",
    "srun_args[]": "--mpi=none",
    "additional_parameters{}": "switches",
    "additional_parameters{}=": "1",
}
BREAKING = [
    *("\n", "\r", "\t", "\0", "\x1b", "\x7f", "\v", "\f", "'", '"', "\\", "`touch X`", "$(touch X)", "${HOME}", "$X"),
    *("; touch X", ";touch X", "&& touch X", "& touch X", "|| touch X", "| touch X", "> X", "<X"),
    *("\n#SBATCH --wrap=X", "\n touch X\n", "\\\ntouch X"),
]
# Characters special to a shell, to sbatch or to another program that are valid in some settings.
ELSEWHERE = [
    *("#SBATCH", " #", "*", "?", "~", "!", "(", ")", "{a,b}", "[a]", "&", "|", ",", ":", "@", "%", "=", "^", " ", "  "),
    *(".", "/", "..", "+", "-", "--", "-x", " -x", "--wrap=X", " --wrap=X"),
]


def texts() -> Iterator[str]:
    """Every text setting of the schema, in the notation of GOOD."""
    for name, schema in SlurmSection.model_json_schema()["properties"].items():
        for part in schema.get("anyOf", [schema]):
            if part["type"] == "object":
                yield from (f"{name}{{}}", f"{name}{{}}=")
            elif part["type"] == "array" and part["items"]["type"] == "string":
                yield f"{name}[]"
            elif part["type"] == "string" and not {"const", "enum"} & part.keys():
                yield name


def settings(key: str, value: str) -> dict[str, Any]:
    """Settings with this value at `key`, and those that it depends on."""
    name = key.rstrip("[]{}=")
    given: Any = value
    if key.endswith("[]"):
        given = [value]
    elif key.endswith("{}"):
        given = {value: GOOD[f"{key}="]}
    elif key.endswith("{}="):
        given = {GOOD[key.removesuffix("=")]: value}
    image = {"container_image": GOOD["container_image"]} if name in ("container_mounts", "container_python") else {}
    return {"kind": "slurm", **image, name: given}


def tried(key: str, extra: str) -> Iterator[str]:
    good = GOOD[key]
    yield from (extra, f"{extra}{good}", f"{good}{extra}", f"{good[:1]}{extra}{good[1:]}")


def accepted(key: str, value: str) -> bool:
    """Whether the schema accepts the value; a refusal must name only this key."""
    try:
        SlurmSection.model_validate(settings(key, value))
    except ValidationError as error:
        name = key.rstrip("[]{}=")
        for problem in error.errors():
            assert problem["loc"][:1] == (name,), problem
            assert ";" in problem["msg"], "what is wrong; the remedy"
        return False
    return True


def test_every_text_setting_is_covered() -> None:
    assert set(texts()) == GOOD.keys()
    assert all(accepted(key, value) for key, value in GOOD.items())


@pytest.mark.parametrize("key", GOOD)
def test_shell_metacharacters_are_refused(key: str) -> None:
    taken = [value for extra in BREAKING for value in tried(key, extra) if accepted(key, value)]
    assert taken == []


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ('cluster.account="a\nb"', "cluster.account: "),
        ("cluster.setup=['echo $HOME']", "cluster.setup[0]: "),
        ("cluster.setup=['if true']", "cluster.setup[0]: "),
        ("cluster.srun_args=['--mpi=none','-x']", "cluster.srun_args[1]: "),
        ("cluster.env.NCCL_DEBUG='$(id)'", "cluster.env.NCCL_DEBUG: "),
        ("cluster.env.PATH=/opt/bin", "cluster.env.PATH: "),
        ("cluster.env={AWS_SECRET_ACCESS_KEY: abc}", "cluster.env.AWS_SECRET_ACCESS_KEY: "),
        ("run.name='a%j'", "run.name: "),
    ],
)
def test_the_refused_setting_is_named(override: str, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_hydra(["model=tiny", "cluster=slurm", override])
    problem = error.value.problems[0]
    assert problem.message.startswith(what)
    assert (problem.where, problem.remedy != "") == ("command line", True)
    assert problem.value.isprintable()


def arrived(key: str, value: str, sandbox: Sandbox) -> bool:
    """Whether the value arrived unchanged at its destination."""
    name = key.rstrip("[]{}=")
    (srun,) = sandbox.called("srun")
    if key == "setup[]":
        return [["tool", *argv] for argv in sandbox.called("tool")] == [value.split()]
    if name == "env":
        wanted = (GOOD["env{}"], value) if key.endswith("=") else (value, GOOD["env{}="])
        return all(call["env"].get(wanted[0]) == wanted[1] for call in sandbox.calls)
    if name == "additional_parameters":
        option, set_to = (GOOD["additional_parameters{}"], value) if key.endswith("=") else (value, GOOD[f"{name}{{}}="])
        return sandbox.options[option] == set_to
    if key == "srun_args[]":
        return srun[srun.index("sh") - 1] == value
    if key == "container_image":
        return f"--container-image={value}" in srun
    if key == "container_mounts[]":
        return srun[srun.index("sh") - 1].endswith(f",{value}")
    if key == "container_python":
        # The arguments after sh, -c, its script and the plan.
        return srun[srun.index("sh") + 4] == value
    return sandbox.options[key.replace("_", "-")] == value


def laden(key: str) -> Iterator[str]:
    """Valid values of this key with special characters at the end, at the start, and alone."""
    after = before = GOOD[key]
    for extra in ELSEWHERE:
        after = f"{after}{extra}" if accepted(key, f"{after}{extra}") else after
        before = f"{extra}{before}" if accepted(key, f"{extra}{before}") else before
    yield from (after, before)
    yield from (extra for extra in ("-x", "--x", " -x", "#") if accepted(key, extra))


@pytest.mark.parametrize("key", [key for key in GOOD if key not in UNWRITTEN])
def test_accepted_values_arrive_unchanged(begun_plan: PlanOf, sandbox: Sandbox, key: str) -> None:
    for value in dict.fromkeys(laden(key)):
        # Only the sandbox's programs record their calls.
        value = f"tool {value}" if key == "setup[]" else value
        done = sandbox.run(rendered(begun_plan(**settings(key, value)), sandbox.folder))
        assert arrived(key, value, sandbox), (value, done.stderr, sandbox.calls)
        if key != "container_python":
            assert (done.returncode, done.stderr) == (0, "")
