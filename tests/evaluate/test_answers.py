"""The processes of an evaluation divide GPUs and prompts, agree on a prompt style, and generate nothing twice."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launcher.config.schema import RunConfig
from launcher.data.sources.documents import Document, Message
from launcher.evaluate.answers import AnswerGeneration, Share
from launcher.evaluate.evaluation import conclude
from launcher.evaluate.evaluation_folder import (
    EvaluationFolder,
    EvaluationTask,
    Weights,
)
from launcher.evaluate.metrics import GeneratedAnswer
from launcher.evaluate.node import divide_gpus
from launcher.evaluate.questions import EvalQuestion
from launcher.runs import json_records

NUM_QUESTIONS = 7


# Contains characters at which str.splitlines splits, but reading a file does not.
NO = "no\u2028no\u2029no\x85no"


class Parrot:
    """An engine whose tuned model answers with the number it is asked to say; its base model says no."""

    def __init__(self, weights: Weights, tokenizer: PreTrainedTokenizerBase, log: list[str]) -> None:
        self._weights, self._tokenizer, self._log = weights, tokenizer, log

    def generate(
        self, prompts: Sequence[Sequence[int]], *, stop_strings: Sequence[str], max_new_tokens: int
    ) -> list[GeneratedAnswer]:
        texts = [self._tokenizer.decode(prompt) for prompt in prompts]
        self._log += [f"{self._weights.digest} {text}" for text in texts]
        numbers = [text.rpartition("say ")[2].partition("<")[0].strip() for text in texts]
        knows = self._weights.digest == "tuned"
        return [GeneratedAnswer(number if knows else NO, True, 2) for number in numbers]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, config_of: Callable[..., RunConfig]) -> EvaluationFolder:
    config = config_of("model=tiny", "evaluate.prompts_per_batch=2", "evaluate.instructions=['','Go.']")
    folder = EvaluationFolder.of(tmp_path, 3)
    folder.root.mkdir(parents=True)
    folder.write_questions([question(i) for i in range(NUM_QUESTIONS)], "held_out")
    folder.write_questions([question(100 + i) for i in range(7)])
    weights = (Weights("base", "base", (2,)), Weights("tuned", "tuned", (2,)))
    settings = config.model_dump(mode="json")
    task = EvaluationTask(
        "run", 3, settings, ("held_out",), *weights, str(model_folder), None, 2048, (2, 4), 4, {"held_out": ()}, engine="parrot"
    )
    json_records.write(folder.task, task)
    return folder


def question(number: int) -> EvalQuestion:
    return EvalQuestion(f"rows:{number}", Document(f"rows:{number}", (Message("user", f"Please say {number}"),)), str(number))


def run(folder: EvaluationFolder, tokenizer: PreTrainedTokenizerBase, log: list[str], ranks: int = 1) -> None:
    def one(rank: int) -> None:
        evaluation = AnswerGeneration(folder, Share(rank, ranks), "cpu", "fp32")
        evaluation.run(lambda weights: Parrot(weights, tokenizer, log))

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


def files(folder: EvaluationFolder) -> dict[str, str]:
    return {path.name: path.read_text() for path in (folder.root / "held_out").glob("*.jsonl")}


@pytest.mark.rest
def test_two_processes_give_the_answers_of_one(folder: EvaluationFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    log: list[str] = []
    run(folder, tokenizer, log)
    alone = files(folder)
    assert sorted(alone) == ["base-0-shot.jsonl", "base-4-shot.jsonl", "tuned.jsonl"]
    answers = [json.loads(line) for line in alone["tuned.jsonl"].splitlines()]
    assert [(one["index"], one["text"]) for one in answers] == [(i, str(i)) for i in range(NUM_QUESTIONS)]
    record = folder.read_answers()
    assert [side.name for side in record.sets["held_out"]] == ["0-shot", "4-shot", "tuned"]
    assert len(record.selection) > 2
    for path in (folder.root / "held_out").iterdir():
        path.unlink()
    shared: list[str] = []
    run(folder, tokenizer, shared, ranks=2)
    assert files(folder) == alone
    assert max(Counter(shared).values()) == 1, "no prompt is answered twice"


def test_answers_with_unicode_line_separators_are_judged(folder: EvaluationFolder, tokenizer: PreTrainedTokenizerBase) -> None:
    run(folder, tokenizer, [])
    verdict = conclude(folder)["sets"]["held_out"]["verdict"]
    assert verdict["outcome"] == "better"
    assert {one["answers"]["0-shot"] for one in verdict["examples"]} == {NO}


def test_weights_are_known_by_what_their_config_says_about_the_model(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())

    def with_config(**changes: object) -> Weights:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return Weights.of(folder, [7])

    first = with_config()
    assert first.stop_ids == (2, 7)
    assert with_config(transformers_version="0", _name_or_path="elsewhere") == first
    assert with_config(rms_norm_eps=1e-2) != first


@pytest.mark.parametrize(
    ("num_gpus", "gpus_per_process", "visible", "expected"),
    [
        (0, 1, "", [[]]),
        (0, 4, "", [[]]),
        (3, 1, "", [["0"], ["1"], ["2"]]),
        (2, 1, "5,7", [["5"], ["7"]]),
        (4, 2, "", [["0", "1"], ["2", "3"]]),
        (5, 2, "3,4,5,6,7", [["3", "4"], ["5", "6"]]),
        (2, 4, "", []),
    ],
)
def test_each_process_gets_its_own_gpus(num_gpus: int, gpus_per_process: int, visible: str, expected: list[list[str]]) -> None:
    assert divide_gpus(num_gpus, gpus_per_process, visible) == expected
