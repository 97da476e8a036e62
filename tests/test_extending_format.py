"""A row format is a function and an entry in FORMATS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher.config.sections.data import COLUMNS, DataSection, Source
from launcher.data.build import build
from launcher.data.sources.documents import Completion, Row, read_value
from launcher.data.sources.formats import FORMATS, RowFormat
from launcher.data.split import Split


def parse_flashcard(row: Row, where: str) -> Completion:
    return Completion(where, f"{read_value(row, 'front', str, where)}\n", read_value(row, "back", str, where))


def save_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*alphabet, "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def test_an_added_format_is_recognized_and_its_rows_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(FORMATS, "flashcards", RowFormat(parse_flashcard, required_keys=frozenset({"front", "back"})))
    path = tmp_path / "cards.jsonl"
    path.write_text(
        "".join(json.dumps({"front": f"{i} + {i}?", "back": str(2 * i), "deck": "sums"}) + "\n" for i in range(10, 20))
    )
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    facts = build(DataSection(sources=(Source(path=str(path)),), max_length=64, workers=1), str(tokenizer))
    assert facts.num_docs == 10
    split = Split.open(facts)
    first = slice(split.docs[0], split.docs[1])
    trained = split.tokens[first][split.trained[first] == 1].tolist()
    decoded = PreTrainedTokenizerFast.from_pretrained(str(tokenizer)).decode(trained)
    assert decoded in {f"{2 * i}</s>" for i in range(10, 20)}


def test_the_settings_name_the_formats_of_the_table() -> None:
    assert get_args(Source.model_fields["format"].annotation) == ("auto", *FORMATS)


def test_the_columns_of_the_settings_are_keys_of_the_formats() -> None:
    keys = {key for row_format in FORMATS.values() for key in row_format.keys}
    # `functions` is OpenAI's older name for `tools`.
    assert set(COLUMNS) == keys - {"functions"}
