"""`config` prints the settings of a run or command line as a file that yields the same plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest

from launcher import atomic_files
from launcher.cli.main import main
from launcher.config.compose import Composed, run_hydra
from launcher.config.schema import RunConfig
from launcher.plan.run_dir import RunDir

Out = Callable[..., str]
COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Out:
    """Run a command in an empty working directory and return its output."""
    monkeypatch.chdir(tmp_path)

    def printed(*words: str, code: int = 0) -> str:
        assert main(words) == code
        out, err = capsys.readouterr()
        return err if code else out

    return printed


def config_of(*words: str) -> RunConfig:
    composed: list[Composed] = []
    run_hydra(words, composed.append)
    return composed[0].config


@pytest.mark.parametrize(
    "words",
    [
        ("model=tiny", "data=jsonl", "data.path=a.jsonl", "train.max_steps=5"),
        (
            "data=jsonl",
            "data.sources=[{name: a, path: a.jsonl, weight: 1}, {path: b.jsonl, columns: {text: t}}]",
            "data.path=null",
        ),
        ("data.checks.truncated=fail", "optim.betas=[0.5, 0.6]", "run.name=2026-01-01", "train.epochs=0.5"),
        ("model.path=owner/other", "cluster=slurm", "cluster.env={A: 'yes', B: '012', C: '1e5'}", "tracking.tags=[a, b]"),
        ("model.path=owner/other", f"model.revision={COMMIT}", f"data.path=/hub/snapshots/{COMMIT}/a.jsonl", "data=jsonl"),
        (
            "model=qwen3_8b",
            "model.config.hidden_size=1",
            "++model.config.extra=[1, 2]",
            "deepspeed.extra={wall_clock_breakdown: true}",
        ),
        (
            "experiment=llama3_70b_four_nodes",
            "data.path=a.jsonl",
            "data.system='use: 1e-5 # no comment'",
        ),
    ],
)
def test_a_command_line_is_printed_as_a_file_with_the_same_settings(words: tuple[str, ...], out: Out) -> None:
    text = out("config", *words)
    Path("my.yaml").write_text(text, encoding="utf-8")
    assert config_of("my.yaml") == config_of(*words)
    assert out("config", "my.yaml").splitlines()[1:] == text.splitlines()[1:]
    everything = json.loads(out("config", "my.yaml", "--json"))
    assert {name: {k: v for k, v in section.items() if k != "base"} for name, section in everything.items()} == config_of(
        *words
    ).model_dump(mode="json")


def test_a_text_that_looks_like_a_reference_stays_a_text(out: Out) -> None:
    Path("my.yaml").write_text(r"data: {path: a.jsonl, system: 'use \${name}: 1e-5'}", encoding="utf-8")
    assert config_of("my.yaml").data.system == "use ${name}: 1e-5"
    Path("again.yaml").write_text(out("config", "my.yaml"), encoding="utf-8")
    assert config_of("again.yaml") == config_of("my.yaml")


def test_a_run_is_printed_as_a_file_with_its_settings(run: RunDir, out: Out) -> None:
    text = out("config", "demo")
    Path("my.yaml").write_text(text, encoding="utf-8")
    assert config_of("my.yaml") == RunConfig.model_validate(hand_made.SETTINGS)
    assert text.startswith("# Settings of the run demo-run, planned by launcher ")
    assert "optim" in json.loads(out("config", str(run.root), "--json", "optim.lr=0.5"))
    changed = out("config", "demo", "optim.lr=0.5", "run.name=next")
    assert "lr: 0.5" in changed
    assert "change run.name" in changed


def test_values_that_may_be_secrets_are_hidden(run: RunDir, out: Out) -> None:
    # The settings refuse this value, but a plan written by another program may contain it.
    text = run.plan.read_text().replace('"system":null', '"system":"hf_abcdefghijklmnopqrstuvwxyzabcd12"')
    text = text.replace('"system": null', '"system": "hf_abcdefghijklmnopqrstuvwxyzabcd12"')
    assert "hf_abc" in text
    atomic_files.write_text(run.plan, text)
    for flags in ((), ("--all",), ("--json",)):
        shown = out("config", "demo", *flags)
        assert "hf_abc" not in shown
        assert "system: <redacted>" in shown.replace('"', "")


def test_mistakes_are_refused(out: Out) -> None:
    assert "nothing" in out("config", "nothing", code=2)
    assert "did you mean optim.lr?" in out("config", "optim.lrr=1", code=2)
    assert "the settings of one run" in out("config", "-m", "optim.lr=1,2", code=2)
    assert "--root needs a value" in out("config", "nothing", "--root", code=2)
    assert "did you mean --all?" in out("config", "--al", code=2)
