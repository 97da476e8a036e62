"""Multiple-choice questions: accepted row formats, scored documents, and accuracies."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.config.sections.data import DataSection, Source
from launcher.data.tokenization.encoder import Encoder
from launcher.errors import DataError
from launcher.evaluate.choices import accuracy
from launcher.evaluate.choices.prompts import encode_choices, to_eval_question
from launcher.evaluate.choices.questions import ChoiceQuestion, read_questions
from launcher.evaluate.prompting import CHAT, TEXT, BasePrompts, PromptStyle, TunedPrompts

DATA = DataSection(sources=(Source(path="rows.jsonl"),), system="Be exact.")
SUM = ChoiceQuestion("rows:1", "3+3?", ("six", "sixty six"), 0)
OTHER = ChoiceQuestion("rows:2", "1+1?", ("two", "three"), 0)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


def write(folder: Path, *rows: object) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "q", "choices": ["a", "b"], "answer": 1}, 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "y"}, 1),
        ({"question": "q", "choices": ["x", "y"], "answer": "B"}, 1),
        ({"ctx": "q", "endings": ["x", "y"], "label": "1"}, 1),
        # The text of a choice takes precedence over its index.
        ({"question": "q", "choices": ["1", "0"], "answer": "1"}, 0),
        ({"question": "q", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}, 1),
        ({"prompt": "q", "options": ["x", "y"], "target": 0}, 0),
    ],
)
def test_rows_of_known_forms(tmp_path: Path, row: dict, answer: int) -> None:
    (question,) = read_questions(write(tmp_path, row), None)
    assert (question.question, question.answer, len(question.choices)) == ("q", answer, 2)


def test_every_kind_of_bad_line_is_counted_and_named_where_it_is_first(tmp_path: Path) -> None:
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    bad = ["no json", [1], {"choices": ["a", "b"]}, good | {"choices": ["a"]}, good | {"choices": ["a", "a"]}]
    file = write(tmp_path, good, *bad, good | {"answer": 2}, good | {"answer": True}, good | {"answer": "c"}, "no json")
    with pytest.raises(DataError) as error:
        read_questions(file, None)
    told = {problem.where: problem.message for problem in error.value.problems}
    assert [*told] == [f"{file}:{line}" for line in range(2, 8)]
    assert told[f"{file}:2"] == "the line is not JSON (2 lines)"
    assert told[f"{file}:7"] == "the answer to a question is not one of its choices (3 lines)"
    assert len(read_questions(file, 1)) == 1
    with pytest.raises(DataError, match="has no questions"):
        read_questions(write(tmp_path), None)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "missing", None)


def scored(tokenizer: PreTrainedTokenizerBase, side: TunedPrompts | BasePrompts, *style: PromptStyle) -> list[tuple[str, str]]:
    """Return for each choice the preceding text and the scored text."""
    encoder = Encoder(tokenizer, DATA)
    question = to_eval_question(SUM, encoder, DATA, "auto")
    texts = []
    for one in encode_choices(encoder, side.render(question, SUM.choices, *style)):
        assert one is not None
        begin = one.is_choice.index(True)
        assert all(one.is_choice[begin:])
        texts.append((tokenizer.decode(one.ids[:begin]), tokenizer.decode(one.ids[begin:])))
    return texts


@pytest.mark.rest
def test_the_choice_alone_is_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    examples = [to_eval_question(OTHER, Encoder(tokenizer, DATA), DATA, "auto")]
    base = BasePrompts(tokenizer, DATA, examples, ())
    prompt = "Be exact.\n\nQuestion: 1+1?\nAnswer: two\n\nQuestion: 3+3?\nAnswer:"
    assert scored(tokenizer, base, PromptStyle(TEXT, 1)) == [(prompt, " six"), (prompt, " sixty six")]
    chat = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "3+3?"}]
    as_trained = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = [(as_trained, "six"), (as_trained, "sixty six")]
    assert scored(tokenizer, TunedPrompts(tokenizer, DATA)) == expected
    assert scored(tokenizer, base, PromptStyle(CHAT, 0)) == expected
    turns = [chat[0], {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "two"}, chat[1]]
    with_example = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert scored(tokenizer, base, PromptStyle(CHAT, 1))[1] == (with_example, "sixty six")


@pytest.mark.rest
def test_the_empty_thought_before_a_choice_is_not_scored(tokenizer: PreTrainedTokenizerBase) -> None:
    """As in Qwen3's template: it would cost each choice the same, and a short one more of its normalized score."""
    thinking = copy.deepcopy(tokenizer)
    thinking.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    before, choice = zip(*scored(thinking, TunedPrompts(thinking, DATA)), strict=True)
    assert choice == ("six", "sixty six")
    assert all(text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") for text in before)


def test_the_normalized_choice_does_not_favor_short_ones() -> None:
    one = accuracy.choose(SUM, [-4.0, -5.0])
    assert (one.chosen, one.chosen_norm) == (0, 1), "-4/3 against -5/9"
    assert accuracy.choose(SUM, [-1.0, -1.0]).chosen == 0
    for metric, right in (("acc", 1.0), ("acc_norm", 0.0)):
        assert accuracy.score(metric, [one]).tolist() == [right]
