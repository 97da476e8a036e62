"""The command line in separate processes in which importing a heavy package fails."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import pytest
from forked import Launch, preloaded, require_exit

from launcher import __version__
from launcher.cli.main import main
from launcher.cli.verbs import VERBS
from launcher.plan.launch_plan import LaunchPlan

REPO = Path(__file__).resolve().parents[2]
# Runs first in each process and ends it when it imports a forbidden package.
WALL = """\
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            sys.stderr.write(f"import of {{name}}\\n")
            sys.exit(77)

sys.meta_path.insert(0, Wall())
"""
TORCH = ("torch", "deepspeed", "transformers", "datasets", "ray", "wandb")
KEYS = {"train.max_steps": ["null"], "model.dtype": ["auto", "bf16"]}
# Modules that commands import; none may import a forbidden package.
IMPORTED = (
    *(
        f"launcher.cli.{name}"
        for name in ("main", "plan", "train", "status", "report", "checkpoints", "resume", "export", "drill")
    ),
    *("hydra", "hydra._internal.hydra", "hydra.core.override_parser.overrides_parser", "launcher.plan.planner"),
)


@pytest.fixture
def walled(launch: Launch, tmp_path: Path) -> Launch:
    """Run the launcher in a new process that fails if it imports one of `forbidden`."""

    def run(*arguments: str, forbidden: tuple[str, ...] = TORCH, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "wall"
        folder.mkdir(exist_ok=True)
        (folder / "sitecustomize.py").write_text(WALL.format(forbidden=forbidden))
        path = os.pathsep.join([str(folder), str(REPO)])
        return launch(*arguments, cwd=cwd, PYTHONPATH=path, timeout=60)

    return run


@pytest.fixture
def forked(launcher_env: dict[str, str]) -> Launch:
    """Run the launcher in a forked process that fails if it imports a package of TORCH."""

    def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        server = preloaded(*IMPORTED, forbidden=TORCH)
        return server.run("launcher", *arguments, cwd=cwd or REPO, env={**launcher_env, **env})

    return run


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_the_import_block_of_these_tests_works(walled: Launch) -> None:
    assert walled("plan", "model=tiny", forbidden=("pydantic",)).returncode == 77
    assert preloaded(*IMPORTED, forbidden=TORCH).run("torch").returncode == 77


@pytest.mark.parametrize("arguments", [["--help"], ["help"]])
def test_help_imports_only_the_standard_library(walled: Launch, arguments: list[str]) -> None:
    before = os.times()
    done = walled(*arguments, forbidden=(*TORCH, "hydra", "omegaconf", "pydantic", "rich", "numpy", "psutil"))
    after = os.times()
    require_exit(done)
    assert all(verb in done.stdout for verb in VERBS)
    # Typically 0.2 s. CPU time is measured because other tests run at the same time.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 2


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with suppress(SystemExit):
        assert main([verb, "--help"]) == 0
    assert f"python -m launcher {verb}" in capsys.readouterr().out.replace("[train]", "train")


def test_a_plan_needs_no_torch_and_works_from_anywhere(launch: Launch, walled: Launch, empty: Path) -> None:
    # Another process probes an unknown model with torch. This first command stores the result.
    assert launch("plan", "model=tiny", "data.packing=false", cwd=empty).returncode == 0
    done = walled("plan", "model=tiny", "data.packing=false", cwd=empty)
    require_exit(done)
    assert done.stderr == ""
    labels = [line.split()[0] for line in done.stdout.splitlines()]
    assert labels == [
        "run",
        "model",
        "data",
        "ranks",
        "batch",
        "steps",
        "optimizer",
        "memory",
        "peak",
        "checkpoint",
        "tracking",
        "speed",
    ]
    assert list(empty.iterdir()) == []


def test_plan_json_can_be_loaded(forked: Launch, empty: Path) -> None:
    done = forked("plan", "--json", "model=tiny", "optim.lr=0.5", cwd=empty)
    require_exit(done)
    values = json.loads(done.stdout)
    warnings, notes, estimate = values.pop("warnings"), values.pop("notes"), values.pop("estimate")
    assert values.pop("checkpoint_gib") == round(values["checkpoint_bytes"] / 2**30, 3)
    assert estimate["basis"] == "the run is planned for CPUs, for which no MFU is published"
    assert {value for key, value in estimate.items() if key != "basis"} == {None}
    planned = LaunchPlan.model_validate(values)
    assert planned.config.optim.lr == 0.5
    assert planned.provenance.overrides == ("model=tiny", "optim.lr=0.5")
    assert planned.run_dir == str(empty / "runs" / planned.run_name)
    assert {"torch", "deepspeed"} <= planned.provenance.packages.keys()
    assert [warning.partition(" is high")[0] for warning in warnings] == ["optim.lr=0.5"]
    lines = forked("plan", "model=tiny", "optim.lr=0.5", cwd=empty).stdout.splitlines()
    for label, texts in (("warning", warnings), ("note", notes)):
        assert [line.removeprefix(label).strip() for line in lines if line.startswith(label)] == texts


@pytest.mark.parametrize(
    ("arguments", "same"),
    [(["help", "data"], ["data", "--help"]), (["plan", "help"], ["plan", "--help"]), (["-V"], ["--version"])],
)
def test_help_and_version_are_shown_where_people_look_for_them(
    capsys: pytest.CaptureFixture[str], arguments: list[str], same: list[str]
) -> None:
    texts = []
    for tokens in (arguments, same):
        assert main(tokens) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


def test_version_lists_the_packages_and_imports_none(walled: Launch) -> None:
    done = walled("--version", forbidden=(*TORCH, "hydra", "omegaconf", "pydantic", "rich", "numpy", "psutil"))
    assert (done.returncode, done.stderr) == (0, "")
    versions = dict(line.split() for line in done.stdout.splitlines())
    assert list(versions) == ["launcher", "python", "torch", "deepspeed", "transformers", "ray", "wandb"]
    assert versions["launcher"] == __version__
    assert versions["torch"] == metadata.version("torch")


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "model=tyni", "optim.lr=-1", "+clster=local"],
        ["model=tyni"],
        ["train", "train.max_steps=0"],
        ["data", "data=jsonl", "data.path=nowhere.jsonl"],
        ["plan", "="],
        ["plan", "a b"],
    ],
)
def test_a_refusal_is_a_plain_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(empty)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "remedy: " in err
    assert list(empty.iterdir()) == []


def test_a_name_that_a_run_has_is_refused_before_anything_that_takes_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n')
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    tokens = ["model=tiny", "tracking=none", "data=jsonl", f"data.path={tmp_path}/rows.jsonl", f"run.root={tmp_path}/runs"]
    assert main([*tokens, "run.name=taken"]) == 2
    assert capsys.readouterr().err.startswith("the run taken exists already; nothing in it was touched\n")
    assert not [*(tmp_path / "cache").glob("*")], "neither data nor the verdict of a probe"


def test_only_debug_shows_a_traceback(forked: Launch) -> None:
    assert "Traceback" in forked("plan", "model=tyni", "--debug").stderr


def test_a_command_line_without_words_starts_nothing(
    capsys: pytest.CaptureFixture[str], empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(empty)
    assert main([]) == 2
    shown = capsys.readouterr()
    assert shown.err == ""
    for words in ("init --data rows.jsonl", "plan rows.yaml", "launcher train  ", "--help"):
        assert words in shown.out
    assert list(empty.iterdir()) == []


def test_an_empty_root_lists_nothing(capsys: pytest.CaptureFixture[str], empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(empty)
    assert main(["ls"]) == 0
    assert capsys.readouterr().out.startswith("no runs under runs; ")
    assert main(["ls", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_a_closed_pipe_ends_the_command_without_a_traceback(
    launch_here: Launch, launcher_env: dict[str, str], empty: Path
) -> None:
    # The first command reports one-time work on standard error, which would otherwise appear below.
    assert launch_here("plan", "model=tiny", cwd=empty).returncode == 0
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "launcher", "plan", "--json", "model=tiny"]
    with os.fdopen(write_end, "w") as closed_pipe:
        done = subprocess.run(
            command, stdout=closed_pipe, stderr=subprocess.PIPE, text=True, cwd=empty, env=launcher_env, timeout=60
        )
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("words", ["--help", "plan --json train.max_step=1"])
def test_output_that_nobody_reads_is_no_error(launcher_env: dict[str, str], empty: Path, words: str) -> None:
    command = f"{sys.executable} -m launcher {words} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=empty, env=launcher_env, timeout=60)
    assert done.stderr == ""


def test_with_json_an_error_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", "train.max_step=1", "optim.lr=0"]) == 2
    out, err = capsys.readouterr()
    error = json.loads(out)
    assert err == ""
    assert (error["kind"], error["where"], error["value"], error["exit_code"]) == ("ConfigError", "command line", "0", 2)
    assert error["message"].startswith("optim.lr: ")
    assert [problem["value"] for problem in error["problems"]] == ["0", "1"]


def test_secrets_of_the_environment_are_not_in_the_plan(forked: Launch, empty: Path) -> None:
    canaries = {"HF_TOKEN": "hf_" + "Canary" * 5, "WANDB_API_KEY": "cafe" * 10, "MY_PASSWORD": "canary-canary-canary"}
    done = forked("plan", "--json", "model=tiny", cwd=empty, **canaries)
    require_exit(done)
    assert not [name for name, value in canaries.items() if value in done.stdout + done.stderr]


@pytest.mark.parametrize("verb", ["resume", "ls"])
def test_a_password_in_an_address_is_refused_and_never_shown(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str
) -> None:
    secret = "hunter2" * 2
    assert main([verb, f"ftp://user:{secret}@127.0.0.1:1/runs/a", "--root", str(tmp_path / "runs")]) == 2
    out, err = capsys.readouterr()
    assert secret not in out + err
    assert "without keys or passwords" in err
    assert not (tmp_path / "runs").exists()


def test_a_clone_whose_packages_are_not_installed_says_how_to_install_them() -> None:
    """Without site-packages, Python finds none of them."""
    command = [sys.executable, "-S", "-m", "launcher", "init"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [
        f"  where:  {sys.executable}",
        "  remedy: install the launcher with its packages (in its clone: pip install .), or use the Python that has them",
    ]
    assert done.stderr.splitlines()[0].startswith("the package ")


def test_an_older_python_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    with pytest.raises(SystemExit) as refusal:
        runpy.run_module("launcher", run_name="__main__")
    assert refusal.value.code == 2
    assert capsys.readouterr().err.startswith("Python 3.11 or newer is needed")
