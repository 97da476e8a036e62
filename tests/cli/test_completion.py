"""Shell completion in a real bash, and its speed without heavy imports."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import completion
from launcher.cli.completion import WORDS_VARIABLE, complete
from launcher.cli.main import main
from launcher.cli.verbs import VERBS
from launcher.data import cache_dir

REPO = Path(__file__).resolve().parents[2]
# Simulates TAB: the shell sets COMP_LINE and COMP_POINT, calls the function and reads COMPREPLY.
PRESS_TAB = """\
eval "$(launcher completion bash)"
COMP_LINE={line}; COMP_POINT=${{#COMP_LINE}}
compopt() {{ printf 'compopt %s\n' "$2" >&2; }}
_launcher_complete
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def env(launcher_env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment with a `launcher` command and a separate cache of completion words."""
    folder = tmp_path_factory.mktemp("completion")
    command = folder / "launcher"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m launcher "$@"\n')
    command.chmod(0o755)
    return {**launcher_env, "PATH": f"{folder}:{os.environ['PATH']}", "LAUNCHER_CACHE": str(folder / "cache")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two runs, a folder whose name is unsafe in a shell, and a folder that is no run."""
    for name in ("first-run", "second-run", "$(touch planted)", "no-run"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "no-run":
            (tmp_path / "runs" / name / "status.json").write_text("{}")
    return tmp_path


def tab(line: str, env: dict[str, str], folder: Path) -> tuple[list[str], str]:
    """Return the completions offered to bash at the end of `line`, and the arguments passed to compopt."""
    script = PRESS_TAB.format(line=shlex.quote(line))
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, cwd=folder, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr


@pytest.mark.rest
def test_a_tab_in_bash(env: dict[str, str], folder: Path) -> None:
    assert tab("launcher ", env, folder) == (sorted(VERBS), "")
    assert tab("launcher repo", env, folder)[0] == ["report"]
    assert tab("launcher status ", env, folder)[0] == ["first-run", "second-run"]
    assert tab("launcher diff first-run ", env, folder)[0] == ["second-run"]
    assert tab("launcher config fir", env, folder)[0] == ["first-run"]
    assert tab("launcher rm --ye", env, folder)[0] == ["--yes"]
    # bash replaces only the text after the equals sign, so candidates omit the key.
    assert tab("launcher plan model=qwen3_8", env, folder) == (["qwen3_8b"], "")
    assert tab("launcher plan model.dtype=b", env, folder)[0] == ["bf16"]
    assert tab("launcher plan train.max_st", env, folder) == (["train.max_steps="], "compopt nospace\n")
    assert "slurm" in tab("launcher plan model=tiny +cluster=", env, folder)[0]
    assert not (folder / "planted").exists()


def test_an_answer_is_quick_and_imports_nothing_heavy(env: dict[str, str], folder: Path) -> None:
    heavy = ("torch", "hydra", "omegaconf", "pydantic", "transformers", "ray", "rich", "numpy")
    code = (
        "import sys, resource\nfrom launcher.cli.main import main\nmain(['completion', 'bash'])\n"
        f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)\n"
        "used = resource.getrusage(resource.RUSAGE_SELF); print(used.ru_utime + used.ru_stime, file=sys.stderr)"
    )
    question = {**env, WORDS_VARIABLE: "launcher\nplan\ntrain.max_st"}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=question, cwd=folder, timeout=120)
        assert done.stdout == "train.max_steps=\n", done.stderr
    imported, seconds = done.stderr.splitlines()
    assert imported == "[]"
    # Typically 0.07 s of one core; the limit allows for a busy machine.
    assert float(seconds) < 0.3


KEYS = {"train.max_steps": ["null"], "model.dtype": ["auto", "bf16"]}


@pytest.mark.parametrize(
    ("words", "candidates"),
    [
        (["model.dtype=b"], ["model.dtype=bf16"]),
        (["resume", "x", "train.max"], ["train.max_steps="]),
        (["plan", "++model.d"], ["++model.dtype="]),
        (["plan", "train"], ["train."]),
        (["status", "model"], []),
        (["completion", ""], ["bash", "fish", "zsh"]),
        (["drill", "--fault", "kill"], ["kill-node", "kill-rank"]),
        (["data", "--scored", ""], ["demo"]),
        (["rm", "--ye"], ["--yes"]),
        (["rm", ""], ["demo"]),
        (["rm", "~"], []),
        (["clus"], ["cluster.", "cluster="]),
    ],
)
def test_candidates(words: list[str], candidates: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "--yes", "~root"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "status.json").touch()
    assert complete(words, KEYS if words != ["clus"] else {"cluster.kind": []}) == candidates


def test_options_of_a_folder_on_the_command_line_are_offered(tmp_path: Path) -> None:
    (tmp_path / "my_conf/model").mkdir(parents=True)
    (tmp_path / "my_conf/model/ours.yaml").touch()
    before = ["plan", "--config-dir", str(tmp_path / "my_conf")]
    assert complete([*before, "model=our"], KEYS) == ["model=ours"]


def test_the_words_are_stored_for_each_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path))
    built: list[int] = []

    def build() -> dict[str, list[str]]:
        built.append(1)
        return KEYS

    monkeypatch.setattr(completion, "_build_keys", build)
    assert completion.read_keys() == completion.read_keys() == KEYS
    (file,) = (cache_dir.cache_root() / "completion").iterdir()
    assert json.loads(file.read_text())["train.max_steps"] == ["null"]
    file.write_text("{")
    assert completion.read_keys() == KEYS
    monkeypatch.setattr(completion, "_newest_source", lambda: 5)
    assert completion.read_keys() == KEYS
    assert len(built) == 3
    assert [path.name for path in file.parent.iterdir()] == ["0.1.0-5.json"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell(shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "read_keys", lambda: KEYS)
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert WORDS_VARIABLE in script
    assert "%" not in script.replace("%s", "").replace('%"${word', "")


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "csh"]) == 2
    assert "bash" in capsys.readouterr().err
