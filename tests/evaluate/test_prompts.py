"""Prompts of the base model: chat and text format, examples, instruction and stop strings, and how their style is chosen."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.config.sections.data import DataSection, Source
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.encoder import Encoder
from launcher.evaluate.prompts import CHAT, TEXT, BasePrompts, PromptBatch, PromptStyle, choose_styles, write_as_trained
from launcher.evaluate.questions import EvalQuestion, split_question
from launcher.runs import json_records

DATA = DataSection(sources=(Source(path="rows.jsonl"),), system="Be exact.")


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


def question(text: str, answer: str) -> EvalQuestion:
    asked = split_question(Document("rows:1", (Message("user", text), Message("assistant", answer))), "Be exact.")
    assert asked is not None
    return asked


EXAMPLES = [question("1+1?", "2"), question("2+2?", "4")]
ASKED = [question("3+3?", "6"), question("What is 40+2?", "42")]


def texts(tokenizer: PreTrainedTokenizerBase, batch: PromptBatch) -> list[str]:
    return [tokenizer.decode(prompt) for prompt in batch.prompts]


def test_text_has_instruction_examples_and_ends_where_the_answer_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = BasePrompts(tokenizer, DATA, EXAMPLES, ()).write(ASKED, PromptStyle(TEXT, 2, "Give a number."))
    assert texts(tokenizer, prompts)[0] == (
        "Be exact.\n\nGive a number.\n\nQuestion: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer: 4\n\nQuestion: 3+3?\nAnswer:"
    )
    assert prompts.stop_strings == ("\n\n", "\nQuestion:", "\nUser:")


def test_a_separator_that_examples_contain_ends_no_answer(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [question("1+1?", "It is\n\n2")]
    assert BasePrompts(tokenizer, DATA, examples, ()).write(ASKED, PromptStyle(TEXT, 1)).stop_strings[0] == "\n\n\n"
    # Without examples, the answers of other training rows count too, but their questions do not.
    without = BasePrompts(tokenizer, DATA, (), [*examples, question("a\n\n\nb", "c")])
    assert without.write(ASKED, PromptStyle(TEXT, 0)).stop_strings[0] == "\n\n\n"


def test_chat_shows_examples_as_turns_and_the_tuned_model_sees_its_training_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    base = BasePrompts(tokenizer, DATA, EXAMPLES, ())
    assert base.forms(ASKED) == (CHAT, TEXT)
    shown = texts(tokenizer, base.write(ASKED, PromptStyle(CHAT, 1, "Give a number.")))[0]
    assert shown == (
        "<|im_start|>system\nBe exact.\n\nGive a number.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2"
        "<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = base.write(ASKED, PromptStyle(CHAT, 0))
    assert plain.prompts == write_as_trained(Encoder(tokenizer, DATA), ASKED).prompts
    assert plain.stop_strings == ()


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_the_base_model_ends_where_its_own_template_ends_a_turn(tokenizer: PreTrainedTokenizerBase, train_on: str) -> None:
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '<|endoftext|>' }}{% endfor %}"
    for text, expected in ((tokenizer.chat_template, "<|im_end|>"), (template, "<|endoftext|>"), (None, None)):
        other = copy.copy(tokenizer)
        other.chat_template = text
        ends = BasePrompts(other, DATA.model_copy(update={"train_on": train_on}), EXAMPLES, ()).turn_end_ids
        assert ends == (() if expected is None else (tokenizer.convert_tokens_to_ids(expected),))


def test_a_completion_goes_on_from_its_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [split_question(Document("rows:1", prompt=text, text=" four"), None) for text in ("two two ->", "one three ->")]
    asked = [row for row in rows if row is not None]
    base = BasePrompts(tokenizer, DATA, asked[:1], ())
    assert base.forms(asked) == (TEXT,)
    assert texts(tokenizer, base.write(asked[1:], PromptStyle(TEXT, 1)))[0].endswith("two two -> four\n\none three ->")


def test_a_document_without_a_prompt_or_an_answer_is_no_question() -> None:
    assert split_question(Document("rows:1", (Message("assistant", "Hello."),)), None) is None
    assert split_question(Document("rows:1", (Message("user", "Hi."), Message("assistant", " "))), None) is None
    assert split_question(Document("rows:1", prompt="", text="text"), None) is None


def test_a_question_is_the_same_after_its_way_through_a_file() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    chat = Document("rows:1", (Message("user", "a"), Message("assistant", "", (call,)), Message("tool", "1")), ({"name": "f"},))
    for one in (EvalQuestion("rows:1", chat, "b"), EvalQuestion("rows:2", Document("rows:2", prompt="p", text=""), "c")):
        assert json_records.decode(EvalQuestion, json_records.encode(one), "") == one


def test_the_best_form_number_of_examples_and_instruction_are_found() -> None:
    asked: list[PromptStyle] = []

    def score(styles: Sequence[PromptStyle]) -> dict[PromptStyle, float]:
        asked.extend(styles)
        return {
            style: 0.5 * (style.form == TEXT)
            + 0.1 * (style.shots == 8)
            + 0.3 * (style.instruction == "Be brief." and not style.shots)
            for style in styles
        }

    chosen = choose_styles((CHAT, TEXT), (2, 4, 8), ("", "Be brief."), score)
    assert chosen.zero_shot == PromptStyle(TEXT, 0, "Be brief.")
    assert chosen.few_shot == PromptStyle(TEXT, 8)
    assert len(asked) == len({*asked}) == len(chosen.scores), "nothing is tried twice"
    assert len(asked) <= 10


def test_of_equal_scores_the_plainest_question_and_the_most_examples_win() -> None:
    chosen = choose_styles((CHAT, TEXT), (2, 4, 8), ("", "Be brief."), lambda styles: dict.fromkeys(styles, 0.0))
    assert (chosen.zero_shot, chosen.few_shot) == (PromptStyle(CHAT, 0), PromptStyle(CHAT, 8))


def test_nothing_is_tried_where_there_is_no_choice() -> None:
    def score(styles: Sequence[PromptStyle]) -> dict[PromptStyle, float]:
        raise AssertionError(styles)

    chosen = choose_styles((TEXT,), (3,), ("",), score)
    assert (chosen.zero_shot, chosen.few_shot) == (PromptStyle(TEXT, 0), PromptStyle(TEXT, 3))
    assert choose_styles((TEXT,), (), ("",), score).few_shot is None
