"""Stored answers survive a killed process, and belong to one set of weights and prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import RunError
from launcher.evaluate.evaluation_folder import AnswerKey, AnswerStore, StoredAnswer, reuse_base_answers

KEY = AnswerKey("weights", "config", (2,), "prompts", 3, "plain text", "transformers", "fp32", "cpu", 8)


def answer(index: int) -> StoredAnswer:
    return StoredAnswer(f"line\nof {index} é", True, index, index)


def test_answers_of_several_processes_become_one_file_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, "tuned", KEY)
    store.append("00001", [answer(2)])
    store.append("00000", [answer(1)])
    with pytest.raises(RunError, match="1 of 3 answers are missing"):
        store.complete()
    assert not store.path.exists()
    store.append("00000", [answer(0)])
    assert store.complete() == [answer(0), answer(1), answer(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tuned.json", "tuned.jsonl"]
    assert AnswerStore(tmp_path, "tuned", KEY).read() == {i: answer(i) for i in range(3)}


def test_a_line_that_was_cut_off_does_not_count_and_harms_no_other(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, "tuned", KEY)
    store.append("00000", [answer(0), answer(1)])
    (part,) = tmp_path.glob(".tuned-*/00000.jsonl")
    part.write_bytes(part.read_bytes()[:-9])
    assert store.read() == {0: answer(0)}
    store.append("00000", [answer(1), answer(2)])
    assert store.complete() == [answer(0), answer(1), answer(2)]


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "others"},
        {"config": "others"},
        {"stop_ids": (2, 3)},
        {"prompts": "others"},
        {"engine": "vllm 0.11.0"},
        {"dtype": "bf16"},
        {"max_new_tokens": 9},
    ],
)
def test_answers_of_other_weights_or_prompts_are_not_used(tmp_path: Path, change: dict[str, object]) -> None:
    store = AnswerStore(tmp_path, "tuned", KEY)
    store.append("00000", [answer(i) for i in range(3)])
    store.complete()
    other = AnswerStore(tmp_path, "tuned", replace(KEY, **change))
    assert other.read_complete() is None
    assert other.read() == {}


def test_a_changed_file_is_not_taken_for_complete(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path, "tuned", KEY)
    store.append("00000", [answer(i) for i in range(3)])
    store.complete()
    store.path.write_text(store.path.read_text().replace("line", "lime"))
    assert store.read_complete() is None


def test_parts_that_are_put_together_meanwhile_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = AnswerStore(tmp_path, "tuned", KEY), AnswerStore(tmp_path, "tuned", KEY)
    first.append("00000", [answer(i) for i in range(3)])
    read_bytes = Path.read_bytes

    def read_late(path: Path) -> bytes:
        if path.name == "00000.jsonl":
            monkeypatch.setattr(Path, "read_bytes", read_bytes)
            first.complete()
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read_late)
    assert other.read() == {i: answer(i) for i in range(3)}


def test_answers_of_the_base_model_are_those_of_another_step_where_their_key_fits(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"step-{number:08d}" for number in (1, 2, 3))
    sides = {"base-0-shot": KEY, "base-8-shot": replace(KEY, style="chat"), "tuned": KEY}
    for name, key in sides.items():
        store = AnswerStore(first / "held_out", name, key)
        store.append("00000", [answer(i) for i in range(3)])
        store.complete()
    # The selection of a prompt style leaves its answers in parts.
    AnswerStore(first / "selection", "0123", KEY).append("00000", [answer(1)])
    # The second step already has answers from other settings.
    AnswerStore(second / "held_out", "base-8-shot", KEY).append("00000", [answer(0)])
    reuse_base_answers(second, [third, first])
    assert AnswerStore(second / "held_out", "base-0-shot", KEY).read_complete() == [answer(i) for i in range(3)]
    assert AnswerStore(second / "held_out", "base-0-shot", replace(KEY, dtype="bf16")).read_complete() is None
    assert AnswerStore(second / "selection", "0123", KEY).read() == {1: answer(1)}
    assert AnswerStore(second / "selection", "0123", replace(KEY, prompts="others")).read() == {}
    assert AnswerStore(second / "held_out", "base-8-shot", KEY).read() == {0: answer(0)}
    assert AnswerStore(second / "held_out", "tuned", KEY).read() == {}, "of other weights in any case"
