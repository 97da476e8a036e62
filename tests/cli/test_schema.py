"""The JSON Schema of a run's settings file: what it accepts, what it rejects, and what it shows in an editor."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft7Validator

from launcher.cli.config import build_schema
from launcher.cli.main import main

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
