"""Prompts from a file are rendered like a run's training prompts, whatever the row format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher import hardware
from launcher.config.schema import RunConfig
from launcher.data.build import build
from launcher.data.sources.documents import Chat, Completion
from launcher.data.tokenization.encoder import Encoder, load_tokenizer
from launcher.evaluate import drift
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan


def prompt_of(row: dict[str, Any]) -> list[str]:
    document = drift.parse(row, "rows.jsonl:1")
    if isinstance(document, Completion):
        assert document.completion == drift._ANSWER
        return [document.prompt]
    assert isinstance(document, Chat)
    assert document.messages[-1].content == drift._ANSWER
    return [message.content for message in document.messages[:-1]]


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
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
def test_a_row_gives_its_prompt(row: dict[str, Any], prompt: list[str]) -> None:
    assert prompt_of(row) == prompt


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
    training = drift.read_training_prompts(plan, generator)
    encoder = Encoder(tokenizer, config.data)
    read = drift.encode([drift.parse(row, "") for row in rows], completions, encoder, generator)
    assert {one.tokens for one in training} == {one.tokens for one in read}
    assert len(training) == 12
    # The shortened text would contain a part of the credential.
    (one,) = drift.encode([drift.parse({"prompt": "ghp_" + "a" * 36}, "")], completions, encoder, generator)
    assert "ghp_" not in one.text


@pytest.mark.parametrize(("num_params", "offload", "is_scored"), [(8e9, False, True), (70e9, False, False), (70e9, True, True)])
def test_models_score_prompts_unasked_on_gpus_that_hold_them(
    plan_of: Callable[..., LaunchPlan], monkeypatch: pytest.MonkeyPatch, num_params: float, offload: bool, is_scored: bool
) -> None:
    plan = plan_of("model=tiny", "data=jsonl", "data.path=rows.jsonl", "model.dtype=bf16")
    model = plan.model.model_copy(update={"num_params": int(num_params)})
    zero = {**plan.deepspeed["zero_optimization"], **({"offload_param": {"device": "cpu"}} if offload else {})}
    plan = plan.model_copy(update={"model": model, "deepspeed": {**plan.deepspeed, "zero_optimization": zero}})
    monkeypatch.setattr(hardware, "device", lambda: DeviceFacts(kind="cuda", name="GPU", count=2, memory_gib=24))
    assert (drift.find_obstacle(plan) == "") is is_scored
    monkeypatch.setattr(hardware, "device", lambda: DeviceFacts(kind="cpu", name="CPU", count=2, host_memory_gib=64))
    assert "--likelihood" in drift.find_obstacle(plan)
