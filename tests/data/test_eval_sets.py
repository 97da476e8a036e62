"""Caches of evaluation sets and of fetched runs, and problems reported under each set's own settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made
import pytest
from plan_fixtures import config_of

from launcher import facts
from launcher.cli import mirror
from launcher.config.schema import RunConfig
from launcher.config.sections.data import GENERAL_TEXT, DataSection
from launcher.config.sections.evaluation import EvalSet
from launcher.data.build import build, build_eval_sets
from launcher.data.sources.builtin import list_texts
from launcher.data.sources.locate import HELD_OUT
from launcher.data.sources.reading import make_set_data
from launcher.errors import ConfigError, DataError
from launcher.models.found_model import find_model

__all__ = ["config_of"]
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
    by_setting = {f"eval.sets[{number}]": one for number, one in enumerate(sets)}
    with pytest.raises(DataError) as error:
        build_eval_sets(by_setting, section(), str(tokenizer_dir), lambda stage, done, total: None)
    silent, odd, few = error.value.problems
    assert silent.where == f"eval.sets[1] (silent), {sets[1].path}"
    assert odd.where == f"eval.sets[2] (odd), {sets[2].path}:1"
    assert few.where.startswith("eval.sets[3] (few)")
    built = build_eval_sets({"eval.sets[0]": sets[0]}, section(), str(tokenizer_dir), lambda stage, done, total: None)
    assert (built["good"].num_docs, built["good"].num_eval_rows) == (1, 0)


def test_a_set_is_read_as_held_out_data_is(section: Section, tmp_path: Path) -> None:
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": split}])
    data = section(eval_fraction=0.5, checks={"dropped": "keep", "empty_answer": "fail"})
    made = make_set_data(EvalSet(name="own", path=str(tmp_path), format="text"), data)
    (source,) = made.sources
    assert (source.name, source.split, source.format) == ("own", HELD_OUT, "text")
    assert (made.eval_fraction, made.max_length, made.checks.dropped) == (0.0, data.max_length, "keep")
    (file,) = make_set_data(EvalSet(name="own", path=write(tmp_path / "a.jsonl", [{"text": "a"}])), data).sources
    assert file.split is None


def test_general_text_is_an_evaluation_set_and_no_training_data(
    section: Section, tokenizer_dir: Path, config_of: Callable[..., RunConfig]
) -> None:
    evaluation = config_of("model=tiny", "eval.forgetting=true", "checkpoint.best_set=forgetting").eval
    (setting,) = evaluation.sets_by_setting
    assert setting == "eval.forgetting"
    built = build_eval_sets(evaluation.sets_by_setting, section(), str(tokenizer_dir), lambda stage, done, total: None)
    assert built["forgetting"].num_docs == 137
    assert 180_000 < sum(len(text) for text in list_texts()) < 220_000
    config = config_of("model=tiny", "data=jsonl", f"data.path={GENERAL_TEXT}")
    with pytest.raises(ConfigError) as error:
        facts.check(config, find_model(config.model))
    problem = next(problem for problem in error.value.problems if problem.value == GENERAL_TEXT)
    assert (problem.where, problem.value) == ("data.sources[0].path", GENERAL_TEXT)
    assert "eval.forgetting=true" in problem.remedy
    for file in (Path(__file__).parents[2] / "conf").rglob("*.yaml"):
        assert GENERAL_TEXT not in file.read_text(), "no preset trains on it"


# The rebuilt data of a fetched run


def test_other_data_with_the_same_counts_is_refused(
    jsonl: Callable[..., Path], tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def built_here(config: RunConfig) -> None:
        build(config.data, str(tokenizer_dir))

    # Build in this process instead of a worker.
    monkeypatch.setattr(mirror, "prepare", built_here)
    rows = [{"prompt": f"{i}:", "completion": f" {i + 1}"} for i in range(8)]
    source = jsonl(rows)
    settings = {
        "model": {"path": str(tokenizer_dir)},
        "data": {"sources": [{"path": str(source), "completions": "text"}], "max_length": 32},
    }
    made = hand_made.plan(tmp_path / "run", {**settings, "train": {"max_steps": 4}})
    trained = build(DataSection.model_validate(settings["data"]), str(tokenizer_dir))
    plan = made.model_copy(update={"data": trained.model_copy(update={"cache_dir": "/elsewhere/data/0123"})})
    assert mirror._find_or_build_data(plan, plan.config) == trained
    jsonl([{**row, "completion": row["completion"][::-1]} if row["prompt"] == "7:" else row for row in reversed(rows)])
    other = build(plan.config.data, str(tokenizer_dir))
    assert other.model_dump(exclude={"cache_dir", "digest"}) == trained.model_dump(exclude={"cache_dir", "digest"})
    with pytest.raises(DataError, match="differs from the data that the run was trained on") as caught:
        mirror._find_or_build_data(plan, plan.config)
    assert caught.value.problems[0].value == f"digest: {other.digest} on this machine, {trained.digest} in the run"
