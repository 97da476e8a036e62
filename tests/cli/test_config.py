"""`config` prints the settings of a run or command line as a file that yields the same plan.

The JSON Schema of that file: what it accepts, what it rejects, and what it shows in an editor.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made
import pytest
from jsonschema import Draft7Validator

from launcher.cli.config import build_schema
from launcher.cli.main import main
from launcher.config.compose import compose_one
from launcher.config.schema import RunConfig
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files

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
    return compose_one(words).config


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
    assert everything == config_of(*words).model_dump(mode="json")


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
    for flags in ((), ("--json",)):
        shown = out("config", "demo", *flags)
        assert "hf_abc" not in shown
        assert "system: <redacted>" in shown.replace('"', "")


def test_mistakes_are_refused(out: Out) -> None:
    assert "nothing" in out("config", "nothing", code=2)
    assert "did you mean optim.lr?" in out("config", "optim.lrr=1", code=2)
    assert "the settings of one run" in out("config", "-m", "optim.lr=1,2", code=2)
    assert "--root needs a value" in out("config", "nothing", "--root", code=2)
    assert "did you mean --json?" in out("config", "--jso", code=2)


FILE = {
    "model": {"base": "qwen3_8b", "dtype": "bf16"},
    "data": {"path": "rows.jsonl", "max_length": 4096, "sources": [{"path": "a.jsonl", "weight": 2.0}]},
    "optim": {"lr": 1e-5},
    "train": {"epochs": 2, "global_batch_size": 64},
    "cluster": {"base": "slurm", "nodes": 2, "account": "me", "partition": "gpus"},
    "deepspeed": "zero3",
    "tracking": "none",
    "run": {"name": "sft-1"},
    "experiment": None,
}


@pytest.fixture(scope="module")
def validator() -> Draft7Validator:
    schema = build_schema()
    Draft7Validator.check_schema(schema)
    return Draft7Validator(schema)


def changed(**sections: Any) -> dict[str, Any]:
    return {**FILE, **sections}


def test_the_verb_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == build_schema()


@pytest.mark.parametrize(
    "file",
    [
        FILE,
        {"model": "qwen3_8b", "data": "jsonl"},
        changed(model="an-option-of-my-own"),
        changed(model={"base": None, "path": "owner/name"}),
        changed(optim={"lr": "${train.global_batch_size}"}, data={"path": "???"}),
        changed(cluster={"env": {"NCCL_DEBUG": "INFO"}}),
        {},
    ],
)
def test_files_that_are_accepted(validator: Draft7Validator, file: dict[str, Any]) -> None:
    assert [error.message for error in validator.iter_errors(file)] == []


@pytest.mark.parametrize(
    "file",
    [
        changed(trian={}),
        changed(train={"max_step": 3}),
        changed(train={"global_batch_size": "many"}),
        changed(model={"dtype": "int4"}),
        changed(data={"sources": [{"weight": 1.0}]}),
        changed(cluster={"nodes": 0}),
        changed(model=["qwen3_8b"]),
    ],
)
def test_files_that_are_refused(validator: Draft7Validator, file: dict[str, Any]) -> None:
    assert list(validator.iter_errors(file))


def test_settings_and_options_are_offered_with_their_descriptions() -> None:
    schema = build_schema()
    names, free, *sections = schema["properties"]["cluster"]["anyOf"]
    assert {"local", "slurm", "ray"} <= set(names["enum"])
    assert free == {"type": "string"}
    keys = {key: value for part in sections for key, value in schema["$defs"][part["$ref"].split("/")[-1]]["properties"].items()}
    assert keys["partition"]["description"]
    assert names in keys["base"]["anyOf"]
