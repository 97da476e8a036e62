"""Drift from the training prompts: how prompts are read; the comparison keeps its significance level and detects changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.config.schema import RunConfig
from launcher.data.build import build
from launcher.data.tokenization.encoder import Encoder, load_tokenizer
from launcher.evaluate import drift
from launcher.evaluate.drift import DriftReport, Measure, Numbers, Prompt, compare_prompts
from launcher.plan.launch_plan import LaunchPlan


def sample(number: int, seed: int, *, first: int = 0, words: int = 300, length: int = 20) -> list[Prompt]:
    """Return prompts of two common tokens followed by random words from a part of the vocabulary."""
    generator = np.random.default_rng(seed)
    prompts = []
    for i in range(number):
        ids = [1, 2, *(10 + first + generator.integers(words, size=max(1, int(generator.poisson(length)))))]
        prompts.append(Prompt(f"line {i}", tuple(int(one) for one in ids), "a text"))
    return prompts


def measure(report: DriftReport, name: str) -> Measure:
    return next(one for one in report.measures if one.name.startswith(name))


@pytest.mark.rest  # many simulated comparisons
def test_prompts_of_one_distribution_are_rarely_called_others() -> None:
    reports = [compare_prompts(sample(60, seed), sample(120, 1_000 + seed), {}) for seed in range(40)]
    assert sum(report.has_drifted for report in reports) <= 1
    assert np.mean([measure(report, "words").p_value for report in reports]) == pytest.approx(0.5, abs=0.2)
    assert reports[0].sentence.startswith("The prompts are like the training prompts (p = ")


def test_other_words_are_found() -> None:
    report = compare_prompts(sample(60, 1, first=200), sample(120, 2), {})
    assert report.has_drifted
    assert report.sentence.startswith("The prompts have drifted: different words (p = ")
    assert measure(report, "words").now > 0.5
    assert report.farthest[0].similarity <= report.farthest[-1].similarity
    assert report.farthest[0].where.startswith("line ")


def test_other_lengths_are_found() -> None:
    report = compare_prompts(sample(60, 1, length=40), sample(120, 2), {})
    assert report.has_drifted
    assert "different lengths (p = " in report.sentence
    assert measure(report, "lengths").now > 1.5 * measure(report, "lengths").training


def test_what_all_prompts_have_says_nothing() -> None:
    training = [(1, 2, 5), (1, 2, 6)]
    assert not drift.make_vectors([(1, 2)], training).any()
    (vector,) = drift.make_vectors([(1, 2, 7)], training)
    assert np.linalg.norm(vector) == pytest.approx(1)


def test_the_length_test_has_the_published_distribution() -> None:
    """The 5% point of the Kolmogorov distribution is 1.358 (Smirnov 1948)."""
    first, second = np.arange(1000.0), np.arange(1000.0)
    assert drift.kolmogorov_smirnov_p_value(first, second) == 1.0
    shift = round(1.358 * np.sqrt(2 / 1000) * 1000)
    assert drift.kolmogorov_smirnov_p_value(first, second + shift) == pytest.approx(0.05, abs=0.005)


def losses(seed: int, shift: float) -> dict[str, tuple[Numbers, Numbers]]:
    """Return losses of 60 prompts, increased by `shift`, and of 120 training prompts."""
    generator = np.random.default_rng(seed)
    return {"tuned": (generator.normal(3 + shift, 0.5, 60), generator.normal(3, 0.5, 120))}


def test_prompts_that_are_less_likely_have_drifted() -> None:
    report = compare_prompts(sample(60, 1), sample(120, 2), losses(3, 0.6))
    assert report.has_drifted
    one = measure(report, "likelihoods (tuned model)")
    assert one.now - one.training == pytest.approx(0.6, abs=0.2)
    likelier = compare_prompts(sample(60, 1), sample(120, 2), losses(3, -0.6))
    assert not likelier.has_drifted
    assert likelier.sentence.startswith("The prompts differ slightly from the training prompts: different likelihoods")


def prompt_of(row: dict[str, Any]) -> list[str]:
    document = drift.parse_prompt(row, "rows.jsonl:1")
    if document.prompt:
        assert document.text == drift._ANSWER
        return [document.prompt]
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
    read = drift.encode_prompts([drift.parse_prompt(row, "") for row in rows], completions, encoder, generator)
    assert {one.tokens for one in training} == {one.tokens for one in read}
    assert len(training) == 12
    # The shortened text would contain a part of the credential.
    (one,) = drift.encode_prompts([drift.parse_prompt({"prompt": "ghp_" + "a" * 36}, "")], completions, encoder, generator)
    assert "ghp_" not in one.text
