"""Prompts from a file are rendered like a run's training prompts, whatever the row format."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launcher import hardware
from launcher.config.schema import RunConfig
from launcher.data.build import build
from launcher.data.sources import Chat, Completion, files
from launcher.data.tokenization.encoder import Encoder, load_tokenizer
from launcher.errors import DataError
from launcher.evaluate.choices.questions import read_questions
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.worker import drift
from launcher.worker.scoring import prompt_losses


def prompt_of(row: object) -> list[str]:
    document = drift._parse(row, "rows.jsonl:1")
    if isinstance(document, Completion):
        assert document.completion == drift._ANSWER
        return [document.prompt]
    assert isinstance(document, Chat)
    assert document.messages[-1].content == drift._ANSWER
    return [message.content for message in document.messages[:-1]]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ("text alone", ["text alone"]),
        ({"text": "a"}, ["a"]),
        ({"prompt": "a"}, ["a"]),
        ({"prompt": "a", "completion": "b"}, ["a"]),
        ({"question": "a", "answer": "b"}, ["a"]),
        ({"instruction": "a", "input": "b", "output": "c"}, ["a\n\nb"]),
        ({"messages": [{"role": "user", "content": "a"}]}, ["a"]),
        (
            {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate("abcd")]},
            ["a", "b", "c"],
        ),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ["a"]),
    ],
)
def test_a_row_gives_its_prompt(row: object, prompt: list[str]) -> None:
    assert prompt_of(row) == prompt


def test_a_file_may_be_one_json_array(tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {i}."} for i in range(3)]
    lines, array = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    array.write_text(f"\ufeff \n{json.dumps(rows, indent=1)}\n", encoding="utf-8")
    prompts = [[document.prompt for document in drift._read(file)] for file in (lines, array)]
    assert prompts[0] == prompts[1] == ["Say 0.", "Say 1.", "Say 2."]
    array.write_text('[{"prompt": "a"}, {"answer": 1}, {"answer": 2}]')
    with pytest.raises(DataError) as error:
        list(drift._read(array))
    assert [problem.where for problem in error.value.problems] == [f"{array}:row 2"]


def test_lines_without_a_prompt_are_named_once_for_each_kind(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"answer": 1}\nno json\n[1]\n{"prompt": "a"}\nno json\n')
    with pytest.raises(DataError) as error:
        list(drift._read(file))
    assert [problem.where for problem in error.value.problems] == [f"{file}:{number}" for number in (1, 2, 3)]
    with pytest.raises(DataError, match="the prompts cannot be read"):
        list(drift._read(tmp_path / "missing.jsonl"))


def test_a_line_of_any_depth_or_length_is_refused_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n' + "[" * 100_000 + "]" * 100_000 + "\n")
    with pytest.raises(DataError, match="the line is not JSON") as error:
        list(drift._read(file))
    assert error.value.problems[0].where == f"{file}:2"
    monkeypatch.setattr(files, "MAX_ROW_BYTES", 1 << 20)
    # A sparse file: reading the whole line would exhaust memory.
    os.truncate(file, 2**40)
    with pytest.raises(DataError, match="the line is longer than 1 MiB") as error:
        list(drift._read(file))
    assert error.value.problems[0].where == f"{file}:3"
    with pytest.raises(DataError, match="the line is longer than 1 MiB"):
        read_questions(file, None)


@pytest.mark.parametrize("completions", ["auto", "text"])
def test_training_prompts_have_the_tokens_of_the_same_prompts_in_a_file(
    config_of: Callable[..., RunConfig],
    plan_of: Callable[..., LaunchPlan],
    model_folder: Path,
    tmp_path: Path,
    completions: str,
) -> None:
    """The rows are chats of two turns, or prompts with completions, rendered by the run's settings."""
    turns = ("user", "assistant", "user", "assistant")
    rows = [
        {"messages": [{"role": role, "content": f"{i} {n} and so on"} for n, role in enumerate(turns)]}
        if completions == "auto"
        else {"prompt": f"What is {i}?", "completion": f" It is {i}."}
        for i in range(12)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("model=tiny", "data=jsonl", "data.max_length=256", f"data.sources=[{{path: {file}, completions: {completions}}}]")
    config = config_of(*settings)
    plan = plan_of(*settings, data=build(config.data, str(model_folder)))
    tokenizer, generator = load_tokenizer(str(model_folder)), np.random.default_rng(0)
    training = drift._training_prompts(plan, tokenizer, generator)
    read = drift._encode(list(drift._read(file)), completions, Encoder(tokenizer, config.data), tokenizer, generator)
    assert {one.tokens for one in training} == {one.tokens for one in read}
    assert len(training) == 12
    # The shortened text would contain a part of the credential.
    file.write_text(json.dumps({"prompt": "x " * 92 + "ghp_" + "a" * 36}))
    (one,) = drift._encode(list(drift._read(file)), completions, Encoder(tokenizer, config.data), tokenizer, generator)
    assert len(one.shown) < len("x " * 92) + 36
    assert "ghp_" not in one.shown


CPU = DeviceFacts(kind="cpu", name="CPU", count=2, host_memory_gib=64)
GPU = DeviceFacts(kind="cuda", name="GPU", count=2, memory_gib=24)


@pytest.mark.parametrize(
    ("device", "num_params", "offload", "reason"),
    [
        (CPU, 135e6, False, ""),
        (CPU, 8e9, False, "this machine has no GPU, and scoring takes up to "),
        (CPU, 70e9, False, "this machine has no GPU, and the model needs 156.46 GiB of its memory"),
        (GPU, 8e9, False, ""),
        (GPU, 70e9, False, "the model needs 156.46 GiB, and the GPUs have 48.00 GiB"),
        (GPU, 70e9, True, ""),
    ],
)
def test_models_score_prompts_unasked_where_that_is_quick(
    plan_of: Callable[..., LaunchPlan],
    monkeypatch: pytest.MonkeyPatch,
    device: DeviceFacts,
    num_params: float,
    offload: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(hardware, "device", lambda: device)
    plan = plan_of("model=tiny", "data=jsonl", "data.path=rows.jsonl", "model.dtype=bf16")
    model = plan.model.model_copy(update={"num_params": int(num_params)})
    zero = {**plan.deepspeed["zero_optimization"], **({"offload_param": {"device": "cpu"}} if offload else {})}
    plan = plan.model_copy(update={"model": model, "deepspeed": {**plan.deepspeed, "zero_optimization": zero}})
    found = prompt_losses.find_obstacle(plan)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
    assert ("--likelihood" in found) == (bool(found) and device is CPU)
