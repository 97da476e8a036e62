"""The transformers engine: tokens equal those of its own `generate`, and where answers end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    PreTrainedTokenizerBase,
)

from launcher.config.sections.model import ModelSection
from launcher.evaluate.metrics import GeneratedAnswer
from launcher.evaluate.transformers_engine import TransformersEngine, cut_at

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


def answers(engine: TransformersEngine, prompts: Sequence[Sequence[int]], *stop: str) -> list[GeneratedAnswer]:
    return engine.generate(prompts, stop_strings=stop, max_new_tokens=NEW_TOKENS)


def test_sampling_settings_of_the_folder_change_no_answer(
    engine: TransformersEngine, model_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "do_sample": True, "temperature": 0.1, "min_new_tokens": 9}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    other = TransformersEngine(folder, ModelSection(path=str(folder)), tokenizer, dtype="fp32", device="cpu", stop_ids=(2,))
    prompts = [tokenizer(f"{text} {text} {text}").input_ids for text in TEXTS]
    assert answers(other, prompts) == answers(engine, prompts)
    other.close()


def test_a_model_without_sdpa_answers(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 16}
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    GPTNeoForCausalLM(GPTNeoConfig(**sizes, **ids, initializer_range=0.4)).save_pretrained(tmp_path)
    model = ModelSection(path=str(tmp_path))
    engine = TransformersEngine(tmp_path, model, tokenizer, dtype="fp32", device="cpu", stop_ids=(2,))
    assert engine.model.config._attn_implementation == "eager"
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    assert answers(engine, prompts) == [answers(engine, [prompt])[0] for prompt in prompts]
    engine.close()


def test_an_answer_ends_at_a_stop_string_that_spans_tokens(
    engine: TransformersEngine, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompts = [tokenizer(text).input_ids for text in TEXTS[:2]]
    whole = answers(engine, prompts)
    stop = whole[0].text[6:14]
    first, second = answers(engine, prompts, stop)
    assert (first.text, first.is_stopped) == (whole[0].text[: whole[0].text.find(stop)], True)
    assert first.num_tokens < NEW_TOKENS
    if stop not in whole[1].text:
        assert second == whole[1]


def test_the_first_of_several_stop_strings_counts() -> None:
    assert cut_at("4\n\nQuestion: 5", ("\nQuestion:", "\n\n")) == "4"
    assert cut_at("4", ("\n\n",)) == "4"
