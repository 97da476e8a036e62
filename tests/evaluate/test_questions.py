"""Evaluation prompts that equal training prompts are found."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from launcher.config.schema import RunConfig
from launcher.data.build import build
from launcher.data.sources.documents import Document, Message
from launcher.data.tokenization.encoder import Encoder, load_tokenizer
from launcher.evaluate.questions import (
    EvalQuestion,
    QuestionSet,
    describe_copies,
    find_training_copies,
    read_set,
)
from launcher.plan.launch_plan import LaunchPlan

SYLLABLES = ("ba", "ce", "di", "fo", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "ti", "vo", "zu")


def ask(number: int) -> str:
    choice = random.Random(number)
    words = ["".join(choice.choices(SYLLABLES, k=3)) for _ in range(25)]
    return f"{' '.join(words)}. What comes first, and to whom?"


def question(number: int, text: str) -> EvalQuestion:
    return EvalQuestion(f"seen.jsonl:{number}", Document(f"seen.jsonl:{number}", (Message("user", text),)), "Nothing.")


def test_prompts_of_training_rows_are_found(
    config_of: Callable[..., RunConfig], plan_of: Callable[..., LaunchPlan], model_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": ask(i), "answer": f"The answer {i}."}) + "\n" for i in range(40)))
    settings = ("model=tiny", "data=jsonl", f"data.path={file}", "data.eval_fraction=0.2", "data.max_length=256")
    config = config_of(*settings)
    plan = plan_of(*settings, data=build(config.data, str(model_folder)))
    encoder = Encoder(load_tokenizer(str(model_folder)), config.data)
    held_out = read_set(plan, "held_out", encoder, 100, lambda num_documents: None)
    asked = {one.prompt for one in held_out.questions}
    trained = [i for i in range(40) if ask(i) not in asked]
    assert 0 < len(asked) < 20
    others = [ask(50), ask(trained[0]).upper().replace(".", " ;"), ask(trained[1]).replace("to whom", "to which person"), *asked]
    seen = QuestionSet("seen", tuple(question(i, text) for i, text in enumerate(others)), len(others), 0)
    num_read: list[int] = []
    overlap = find_training_copies(plan, encoder, [held_out, seen], num_read.append)
    assert sum(num_read) == 40
    assert overlap.gap == ""
    assert overlap.copies["held_out"] == (), "a held-out row is in the same file as the training rows"
    (exact,) = overlap.copies["seen"]
    assert (exact.question, exact.training) == ("seen.jsonl:1", f"{file}:{trained[0] + 1}")
    assert str(exact) == f"seen.jsonl:1: the same prompt as {file}:{trained[0] + 1}"
    assert describe_copies(len(others), (exact,)).startswith(f"1 of the {len(others)} prompts are in the training data")
    assert describe_copies(5, ()) == ""
    # A limit on the documents, or missing files, leave a gap that is reported but does not stop an evaluation.
    first = find_training_copies(plan, encoder, [seen], num_read.append, max_documents=trained[0] + 1)
    assert first.copies["seen"] == (exact,)
    assert first.gap == f"prompts were compared with the first {trained[0] + 1} training documents only"
    assert find_training_copies(plan, encoder, [seen], num_read.append, max_documents=40).gap == ""
    file.unlink()
    gone = find_training_copies(plan, encoder, [seen], num_read.append)
    assert gone.copies == {}
    assert gone.gap.startswith("prompts were not compared with the training documents: ")
    assert str(file) in gone.gap
