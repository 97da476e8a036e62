"""Answers of transformers: token by token those of its own generation, with shared examples computed once, and where they end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from launcher.config.schema import ModelSection
from launcher.evaluate.answers import GeneratedIds
from launcher.evaluate.engine import TransformersEngine, cut_at

NEW_TOKENS = 12
TEXTS = ("How many apples are there?", "Count to ten, slowly and without haste, and then back to one.", "Why?", "Name a city.")


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder, padding_side="left")


@pytest.fixture(scope="module")
def engine(model_folder: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[TransformersEngine]:
    model = ModelSection(path=str(model_folder))
    engine = TransformersEngine(model_folder, model, tokenizer, dtype="fp32", device="cpu", stop_ids=(2,))
    yield engine
    engine.close()


def answers(engine: TransformersEngine, prompts: Sequence[Sequence[int]], *stop: str, num_shared: int = 0) -> list[GeneratedIds]:
    return engine.generate(prompts, num_shared=num_shared, stop_strings=stop, max_new_tokens=NEW_TOKENS)


def test_a_batch_equals_greedy_generation_of_transformers(
    engine: TransformersEngine, model_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    batch = tokenizer(list(TEXTS), return_tensors="pt", padding=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    output = model.generate(
        **batch, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=2, pad_token_id=tokenizer.pad_token_id
    )
    expected = [row[batch.input_ids.shape[1] :].tolist() for row in output]
    generated = answers(engine, [tokenizer(text).input_ids for text in TEXTS])
    assert [list(one.ids) for one in generated] == [row[: row.index(2)] if 2 in row else row for row in expected]
    assert [one.is_stopped for one in generated] == [2 in row for row in expected]
    assert len({one.ids for one in generated}) > 1, "the answers say something about their prompts"
    assert [one.text for one in generated] == tokenizer.batch_decode(expected, skip_special_tokens=True)


def test_examples_that_all_prompts_share_change_no_answer(engine: TransformersEngine, tokenizer: PreTrainedTokenizerBase) -> None:
    shared = tokenizer("An example: a question, and its answer. " * 12).input_ids
    prompts = [[*shared, *tokenizer(text).input_ids] for text in TEXTS]
    once = answers(engine, prompts, num_shared=len(shared))
    assert [one.ids for one in once] == [one.ids for one in answers(engine, prompts)]
    assert [one.ids for one in answers(engine, prompts[1:3], num_shared=len(shared))] == [one.ids for one in once[1:3]]
    assert [one.ids for one in once] != [one.ids for one in answers(engine, [tokenizer(text).input_ids for text in TEXTS])]


def test_an_answer_ends_at_a_stop_string_that_spans_tokens(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer(text).input_ids for text in TEXTS[:2]]
    whole = answers(engine, prompts)
    stop = whole[0].text[6:14]
    first, second = answers(engine, prompts, stop)
    assert (first.text, first.is_stopped) == (whole[0].text[: whole[0].text.find(stop)], True)
    assert len(first.ids) < NEW_TOKENS
    if stop not in whole[1].text:
        assert (second.text, second.ids, second.is_stopped) == (whole[1].text, whole[1].ids, False)


def test_the_first_of_several_stop_strings_counts() -> None:
    assert cut_at("4\n\nQuestion: 5", ("\nQuestion:", "\n\n")) == "4"
    assert cut_at("4", ("\n\n",)) == "4"
