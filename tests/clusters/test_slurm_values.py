"""Texts that try to become commands: refused by the schema, or passed on word for word by the script that is run."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.clusters.slurm import script
from launcher.config.cluster import SlurmSection
from launcher.config.compose import run_hydra
from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir

SlurmPlan = Callable[..., LaunchPlan]

# A value that each text of the section may have; `[]` are a list's items, `{}` a mapping's keys, `{}=` its values.
GOOD = {
    "gpu_type": "H100-80GB",
    "account": "research",
    "partition": "main",
    "qos": "urgent",
    "time": "1-00:00:00",
    "gres": "nvme:1",
    "mem": "900G",
    "constraint": "rack1",
    "exclude": "n7",
    "nodelist": "n1",
    "reservation": "mine",
    "comment": "a comment",
    "dependency": "afterok:12",
    "modules[]": "cuda/12.8",
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
# What is not written into the script.
UNWRITTEN = ("gpu_type", "interface")
BREAKING = [
    *("\n", "\r", "\t", "\0", "\x1b", "\x7f", "\v", "\f", "'", '"', "\\", "`touch X`", "$(touch X)", "${HOME}", "$X"),
    *("; touch X", ";touch X", "&& touch X", "& touch X", "|| touch X", "| touch X", "> X", "<X"),
    *("\n#SBATCH --wrap=X", "\n touch X\n", "\\\ntouch X"),
]
FOREIGN = ["é", "\u2028", "\u2029", "\x85", "\xa0", "\u202e", "\uff07", "\ufeff", "\U0001f600", "\u0661"]
# What means something to a shell, to sbatch or to a program, and is a part of some of the texts.
ELSEWHERE = [
    *("#SBATCH", " #", "*", "?", "~", "!", "(", ")", "{a,b}", "[a]", "&", "|", ",", ":", "@", "%", "=", "^", " ", "  "),
    *(".", "/", "..", "+", "-", "--", "-x", " -x", "--wrap=X", " --wrap=X"),
]


def texts() -> Iterator[str]:
    """Every text of the schema, whatever it is called, in the notation of GOOD."""
    for name, schema in SlurmSection.model_json_schema()["properties"].items():
        for part in schema.get("anyOf", [schema]):
            if part["type"] == "object":
                yield from (f"{name}{{}}", f"{name}{{}}=")
            elif part["type"] == "array" and part["items"]["type"] == "string":
                yield f"{name}[]"
            elif part["type"] == "string" and not {"const", "enum"} & part.keys():
                yield name


def settings(key: str, value: str) -> dict[str, Any]:
    """The section with this value at `key`, and what makes it count."""
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
    """Whether the schema takes the value; where it does not, it says so of this key and of no other."""
    try:
        SlurmSection.model_validate(settings(key, value))
    except ValidationError as error:
        name = key.rstrip("[]{}=")
        for problem in error.errors():
            assert problem["loc"][:1] == (name,), problem
            assert ";" in problem["msg"], "what is wrong; the remedy"
        return False
    return True


def test_every_text_of_the_section_is_known_here() -> None:
    assert set(texts()) == GOOD.keys()
    assert all(accepted(key, value) for key, value in GOOD.items())


@pytest.mark.parametrize("key", GOOD)
def test_what_could_end_a_line_a_word_or_a_quotation_is_refused(key: str) -> None:
    taken = [value for extra in (*BREAKING, *FOREIGN) for value in tried(key, extra) if accepted(key, value)]
    assert taken == []


@pytest.mark.parametrize("key", GOOD)
def test_a_text_without_end_is_refused(key: str) -> None:
    assert not accepted(key, "") or key in ("env{}=", "additional_parameters{}=")
    for unit in ("a", "1", "/", "a,", "a:", "[", "a=", "9"):
        assert not accepted(key, GOOD[key] + unit * 100_000)


@pytest.mark.parametrize("word", ["if true", "for", "while", "done", "fi", "case", "function f", "{", "!", "[[", "time; x"])
def test_a_word_of_the_shell_is_no_command(word: str) -> None:
    assert not accepted("setup[]", word)


@pytest.mark.parametrize(
    "name",
    [
        *("PATH", "PYTHONSAFEPATH", "PYTHONUNBUFFERED", "LAUNCHER_ATTEMPT", "SLURM_JOB_ID", "SLURM_", "SBATCH_EXPORT"),
        *("SLURMD_NODENAME", "SUBMITIT_EXECUTOR", "UID", "EUID", "PPID", "BASHOPTS", "SHELLOPTS", "BASH_VERSINFO"),
    ],
)
def test_variables_that_have_an_owner_are_not_set(name: str) -> None:
    assert not accepted("env{}", name)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ('cluster.account="a\nb"', "cluster.account: holds a control character"),
        ('cluster.comment="a\u2028b"', "cluster.comment: is not a plain comment"),
        ("cluster.partition='a;b'", "cluster.partition: is not a partition"),
        ("cluster.setup=['echo $HOME']", "cluster.setup[0]: is more than one plain command"),
        ("cluster.modules=['a b','c;d']", "cluster.modules[0]: is not a module"),
        ("cluster.srun_args=['--mpi=none','-x']", "cluster.srun_args[1]: is not an option of srun"),
        ("cluster.env.NCCL_DEBUG='$(id)'", "cluster.env.NCCL_DEBUG: holds characters that are not let into a batch script"),
        ("cluster.env={B%C: 1}", "cluster.env.B%C: is not the name of a variable"),
        ("cluster.env.PATH=/opt/bin", "cluster.env.PATH: is a variable that Slurm, bash or the launcher set themselves"),
        ("cluster.additional_parameters.switches='`id`'", "cluster.additional_parameters.switches: holds characters"),
        ("cluster.env.HUGGING_FACE_HUB_TOKEN=abc", "cluster.env.HUGGING_FACE_HUB_TOKEN: looks like a secret"),
        ("cluster.env={AWS_SECRET_ACCESS_KEY: abc}", "cluster.env.AWS_SECRET_ACCESS_KEY: looks like a secret"),
        ("run.name='a b'", "run.name: is not a name"),
        ("run.name=-x", "run.name: is not a name"),
        ("run.name='a%j'", "run.name: is not a name"),
        ('run.root="a\nb"', "run.root: holds a control character"),
    ],
)
def test_the_command_line_says_which_setting_is_refused(override: str, what: str) -> None:
    with pytest.raises(ConfigError) as error:
        run_hydra(["model=tiny", "cluster=slurm", override], lambda composed: None)
    problem = error.value.problems[0]
    assert problem.what.startswith(what)
    assert (problem.where, problem.remedy != "") == ("command line", True)
    assert problem.value.isprintable()


def test_numbers_need_no_quotation() -> None:
    """YAML and Hydra read them as numbers; to Slurm and the shell they are texts."""
    numbers = {"mem": 0, "env": {"OMP_NUM_THREADS": 8, "FRACTION": 0.5}, "additional_parameters": {"switches": 1}}
    section = SlurmSection.model_validate({"kind": "slurm", **numbers})
    assert section.mem == "0"
    assert section.env == {"OMP_NUM_THREADS": "8", "FRACTION": "0.5"}
    assert section.additional_parameters == {"switches": "1"}


@dataclass
class Sandbox:
    """A folder in which a script runs with programs that only write down how they were called."""

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


# What comes after srun's own options is run, as srun would.
RECORDER = """\
#!{python} -IS
import json, os, sys
name, argv = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps({{"name": name, "argv": argv, "env": dict(os.environ)}}) + "\\n")
if name == "srun":
    os.execvp("sh", argv[argv.index("sh"):])
if "begin" in argv:
    print(os.environ.get("ATTEMPT", "7"))
sys.exit(int(os.environ.get("SRUN_RC", "0")) if "submitit.core._submit" in argv else int(os.environ.get("JOB_RC", "0")))
"""


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sandbox:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "python3", "srun", "module", "tool", "apptainer"):
        (programs / name).write_text(RECORDER.format(python=sys.executable))
        (programs / name).chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    return Sandbox(tmp_path)


def sbatch_options(text: str) -> dict[str, str]:
    words = [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert all(len(line) == 1 for line in words), "an option a line"
    return dict(line[0].removeprefix("--").partition("=")[::2] for line in words)


def rendered(plan: LaunchPlan, folder: Path) -> str:
    """The script of a run whose plan lies in `folder`, where the tasks see it."""
    file = folder / "plan.json"
    file.touch()
    return script.render(plan, file)


def arrived(key: str, value: str, sandbox: Sandbox) -> bool:
    """Whether the value is where it was meant to go, whole."""
    name = key.rstrip("[]{}=")
    (srun,) = sandbox.called("srun")
    if key == "modules[]":
        return sandbox.called("module") == [["load", value]]
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
        # After sh, -c, its script and the plan.
        return srun[srun.index("sh") + 4] == value
    return sandbox.options[key.replace("_", "-")] == value


def laden(key: str) -> Iterator[str]:
    """Values of this key that hold as much as it takes of what means something elsewhere: at the end, at the start, alone."""
    after = before = GOOD[key]
    for extra in ELSEWHERE:
        after = f"{after}{extra}" if accepted(key, f"{after}{extra}") else after
        before = f"{extra}{before}" if accepted(key, f"{extra}{before}") else before
    yield from (after, before)
    yield from (extra for extra in ("-x", "--x", " -x", "#") if accepted(key, extra))


@pytest.mark.parametrize("key", [key for key in GOOD if key not in UNWRITTEN])
def test_what_is_accepted_arrives_word_for_word(slurm_plan: SlurmPlan, sandbox: Sandbox, key: str) -> None:
    for value in dict.fromkeys(laden(key)):
        # What is no program of the sandbox cannot be seen.
        value = f"tool {value}" if key == "setup[]" else value
        done = sandbox.run(rendered(slurm_plan(**settings(key, value)), sandbox.folder))
        assert arrived(key, value, sandbox), (value, done.stderr, sandbox.calls)
        if key != "container_python":
            assert (done.returncode, done.stderr) == (0, "")


SETUP = ["export A=1", "source {folder}/env.sh", "ulimit -n 64", "conda activate train", "cd {folder}/elsewhere", "B=2"]
ENV_SH = """\
conda() { export CONDA_DEFAULT_ENV="$2"; }
export SOURCED="it's $A"
"""


def test_setup_commands_mean_what_they_mean_in_bash(slurm_plan: SlurmPlan, sandbox: Sandbox) -> None:
    (sandbox.folder / "elsewhere").mkdir()
    (sandbox.folder / "env.sh").write_text(ENV_SH)
    commands = [command.format(folder=sandbox.folder) for command in SETUP]
    plan = slurm_plan(setup=[*commands, "export B", "tool --limit"], env={"C": "3"})
    tool = (sandbox.folder / "bin/tool").read_text().replace('"env"', '"limit": __import__("resource").getrlimit(7)[0], "env"')
    (sandbox.folder / "bin/tool").write_text(tool)
    done = sandbox.run(rendered(plan, sandbox.folder))
    assert (done.returncode, done.stderr) == (0, "")
    (tool_call,) = [call for call in sandbox.calls if call["name"] == "tool"]
    assert tool_call["limit"] == 64
    # begin, the task and conclude see the same.
    for call in (call for call in sandbox.calls if call["name"] in ("python", "srun")):
        shown = {name: call["env"].get(name) for name in ("A", "B", "C", "SOURCED", "CONDA_DEFAULT_ENV", "PWD")}
        assert shown == {
            "A": "1",
            "B": "2",
            "C": "3",
            "SOURCED": "it's 1",
            "CONDA_DEFAULT_ENV": "train",
            "PWD": str(sandbox.folder / "elsewhere"),
        }


def test_the_runs_own_code_comes_first_and_what_is_set_behind_it(slurm_plan: SlurmPlan, sandbox: Sandbox) -> None:
    plan = slurm_plan(env={"PYTHONPATH": "/mine"})
    sandbox.run(rendered(plan, sandbox.folder), PYTHONPATH="/login", PYTHONSAFEPATH="")
    paths = {call["env"]["PYTHONPATH"] for call in sandbox.calls}
    assert paths == {f"{plan.run_dir}/code:/mine"}
    assert {call["env"]["PYTHONSAFEPATH"] for call in sandbox.calls} == {"1"}
    sandbox.run(rendered(slurm_plan(), sandbox.folder))
    assert {call["env"]["PYTHONPATH"] for call in sandbox.calls} == {f"{plan.run_dir}/code"}


def test_a_job_begins_runs_its_tasks_and_concludes(slurm_plan: SlurmPlan, sandbox: Sandbox) -> None:
    text = rendered(slurm_plan(), sandbox.folder)
    plan = str(sandbox.folder / "plan.json")
    for code in ("0", "9", "143"):
        done = sandbox.run(text, SRUN_RC=code)
        begin, task, conclude = sandbox.called("python")
        assert begin == ["-m", "launcher.worker.job", "begin", plan]
        assert task[:3] == ["-u", "-m", "submitit.core._submit"]
        assert conclude == ["-m", "launcher.worker.job", "conclude", plan, "7", code]
        assert [call["env"].get("LAUNCHER_ATTEMPT") for call in sandbox.calls] == [None, "7", "7", "7"]
        assert done.returncode == 0, "conclude decides"


def test_a_job_with_nothing_to_do_ends_well_and_one_that_may_not_begin_fails(slurm_plan: SlurmPlan, sandbox: Sandbox) -> None:
    text = rendered(slurm_plan(), sandbox.folder)
    assert sandbox.run(text, ATTEMPT="").returncode == 0
    assert (len(sandbox.called("python")), sandbox.called("srun")) == (1, [])
    assert sandbox.run(text, JOB_RC="1").returncode == 1
    assert (len(sandbox.called("python")), sandbox.called("srun")) == (1, [])


@pytest.mark.parametrize("strict", ["set -e", "set -u", "set -euo pipefail", "trap true EXIT"])
def test_a_strict_shell_still_concludes(slurm_plan: SlurmPlan, sandbox: Sandbox, strict: str) -> None:
    sandbox.run(rendered(slurm_plan(setup=[strict]), sandbox.folder), SRUN_RC="9")
    assert sandbox.called("python")[-1][-2:] == ["7", "9"]


def test_with_set_e_a_setup_that_fails_ends_the_job(slurm_plan: SlurmPlan, sandbox: Sandbox) -> None:
    done = sandbox.run(rendered(slurm_plan(setup=["set -e", "tool fail"]), sandbox.folder), JOB_RC="3")
    assert (done.returncode, sandbox.called("python")) == (3, [])


def test_a_task_that_does_not_see_the_plan_says_so(slurm_plan: SlurmPlan, sandbox: Sandbox) -> None:
    text = rendered(slurm_plan(), sandbox.folder)
    (sandbox.folder / "plan.json").unlink()
    done = sandbox.run(text)
    assert f"{os.uname().nodename} does not see {sandbox.folder / 'plan.json'}" in done.stderr
    assert sandbox.called("python")[-1][-2:] == ["7", "78"]


def test_apptainer_gets_its_words_one_by_one(slurm_plan: SlurmPlan, sandbox: Sandbox) -> None:
    settings = {"container_image": "/opt/train#1.sif", "container_python": "/venv/bin/python", "container_mounts": ["/a:/b:ro"]}
    plan = slurm_plan(container_runtime="apptainer", **settings)
    assert sandbox.run(rendered(plan, sandbox.folder)).returncode == 0
    (argv,) = sandbox.called("apptainer")
    own = ["--bind", f"{plan.run_dir}:{plan.run_dir}", "--bind", "/cache/data/0123:/cache/data/0123"]
    jobs = f"{RunDir(Path(plan.run_dir)).jobs}/%j"
    task = ["/venv/bin/python", "-u", "-m", "submitit.core._submit", jobs]
    assert argv == ["exec", *own, "--bind", "/a:/b:ro", "/opt/train#1.sif", *task]
