"""Shell injection through settings: the schema refuses a value, or the script passes it on unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import ValidationError
from sandbox import Sandbox, rendered

from launcher.config.compose import run_hydra
from launcher.config.sections.slurm import SlurmSection
from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan

SlurmPlan = Callable[..., LaunchPlan]

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
# Settings that are not part of the script.
UNWRITTEN = ("gpu_type", "interface")
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
        run_hydra(["model=tiny", "cluster=slurm", override], lambda composed: None)
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
def test_accepted_values_arrive_unchanged(begun_plan: SlurmPlan, sandbox: Sandbox, key: str) -> None:
    for value in dict.fromkeys(laden(key)):
        # Only the sandbox's programs record their calls.
        value = f"tool {value}" if key == "setup[]" else value
        done = sandbox.run(rendered(begun_plan(**settings(key, value)), sandbox.folder))
        assert arrived(key, value, sandbox), (value, done.stderr, sandbox.calls)
        if key != "container_python":
            assert (done.returncode, done.stderr) == (0, "")
