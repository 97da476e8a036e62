"""Caches of evaluation sets, and their problems in terms of their own settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.sections.data import DataSection
from launcher.config.sections.evaluation import EvalSet
from launcher.data.build import build_eval_sets
from launcher.data.sources.eval_set import make_set_data
from launcher.data.sources.splits import HELD_OUT
from launcher.errors import DataError

Section = Callable[..., DataSection]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_problems_of_all_sets_are_reported_with_their_names(section: Section, tokenizer_dir: Path, tmp_path: Path) -> None:
    question = {"role": "user", "content": "Which?"}
    answered = {"messages": [question, {"role": "assistant", "content": "This."}]}
    sets = (
        EvalSet(name="good", path=write(tmp_path / "good.jsonl", [answered])),
        EvalSet(name="silent", path=write(tmp_path / "silent.jsonl", [{"messages": [question]}] * 2)),
        EvalSet(name="odd", path=write(tmp_path / "odd.jsonl", [{"foo": 1}])),
        EvalSet(name="few", path=write(tmp_path / "few.jsonl", [answered, *[{"messages": [question]}] * 9])),
    )
    with pytest.raises(DataError) as error:
        build_eval_sets(sets, section(), str(tokenizer_dir), lambda stage, done, total: None)
    silent, odd, few = error.value.problems
    assert (silent.message, silent.where) == ("no document of the evaluation set has a trained token", "eval.sets[1] (silent)")
    assert odd.where == f"eval.sets[2] (odd), {sets[2].path}:1"
    assert f"'eval.sets=[{{name: odd, path: {sets[2].path}, columns:" in odd.remedy
    assert few.where.startswith("eval.sets[3] (few)")
    built = build_eval_sets(sets[:1], section(), str(tokenizer_dir), lambda stage, done, total: None)
    assert (built["good"].num_docs, built["good"].num_eval_rows) == (1, 0)


def test_a_set_is_read_as_held_out_data_is(section: Section, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": split}])
    data = section(eval_fraction=0.5, checks={"max_dropped": 0.5, "empty_answer": "fail"})
    made = make_set_data(EvalSet(name="own", path=str(tmp_path), format="text"), data)
    (source,) = made.sources
    assert (source.name, source.split, source.format) == ("own", HELD_OUT, "text")
    assert (made.eval_fraction, made.max_length, made.checks.max_dropped) == (0.0, data.max_length, 0.5)
    (file,) = make_set_data(EvalSet(name="own", path=write(tmp_path / "a.jsonl", [{"text": "a"}])), data).sources
    assert file.split is None
