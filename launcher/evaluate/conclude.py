"""Scores and judges an evaluation's answers: `python -m launcher.evaluate.conclude FOLDER`. Does not import torch.

Writes verdict.json for each set; the first set's is beside answers.json. Prints one JSON object: the verdicts by set, or the
problems.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher import json_records
from launcher.child_process import print_result, run_process
from launcher.errors import RunError
from launcher.evaluate.answer_scores import AnswerScorer
from launcher.evaluate.evaluation_folder import EvaluatedExport, EvaluationFolder, SideAnswers, StoredAnswer
from launcher.evaluate.questions import EvalQuestion, describe_copies
from launcher.evaluate.verdict import judge, with_examples
from launcher.plan.run_dir import RunDir
from launcher.security.folders import private_files
from launcher.tracking.run_metrics import read_general_loss
from launcher.tracking.verdicts import EvaluationVerdict, GeneralLoss, SideUsage, digest_checkpoint


def conclude(folder: EvaluationFolder) -> dict[str, Any]:
    """Score the answers and write the verdicts; returns what the command shows.

    Raises:
        RunError: if answers are missing.
        DataError: if a metric fails.
    """
    task, answers = folder.read_task(), folder.read_answers()
    settings = task.settings.evaluate
    scorer = AnswerScorer(settings, folder.root)
    run = RunDir(folder.root.parents[1])
    general_loss = read_general_loss(run, task.step)
    # The checkpoint may have been removed after its weights were exported.
    exported = json_records.read_if_present(EvaluatedExport, folder.weights_record)
    checkpoint = digest_checkpoint(run, task.step) or ("" if exported is None else exported.checkpoint)
    shown: dict[str, Any] = {}
    for number, (name, sides) in enumerate(answers.sets.items()):
        questions, copies = folder.read_questions(name), task.training_copies.get(name, ())
        stored = {side: _read_answers(folder, side, len(questions)) for side in sides}
        verdict = replace(_judge_set(scorer, questions, stored, general_loss), checkpoint=checkpoint)
        if copies:
            verdict = replace(verdict, sentence=f"{verdict.sentence} {describe_copies(len(questions), copies)}")
        verdict.write(folder.set_folder(name))
        if number == 0:
            verdict.write(folder.root)
        header, rows = verdict.table
        num_cut = {side.name: sum(not answer.is_stopped for answer in several) for side, several in stored.items()}
        limit = f"evaluate.max_new_tokens={settings.max_new_tokens}"
        shown[name] = {
            "verdict": json_records.encode(verdict),
            "header": header,
            "rows": rows,
            "left_out": [
                *task.left_out.get(name, ()),
                *(
                    f"{num} of {len(questions)} answers of {side} were cut off at {limit}, and are scored as far as they go"
                    for side, num in num_cut.items()
                    if num
                ),
            ],
            "training_copies": list(map(str, copies)),
            "styles": {side.name: side.style for side in sides},
        }
    folder.weights_record.unlink(missing_ok=True)
    for left in (folder.weights, folder.processes):
        shutil.rmtree(left, ignore_errors=True)
    selection = [{"style": one.style, "score": one.score} for one in answers.selection]
    return {
        "run": task.run_name,
        "step": task.step,
        "folder": str(folder.root),
        "engine": answers.engine,
        "dtype": answers.dtype,
        "seconds": answers.seconds,
        "num_processes": answers.num_processes,
        "selection": selection,
        "overlap_gap": task.overlap_gap,
        "sets": shown,
    }


def _read_answers(folder: EvaluationFolder, side: SideAnswers, num_questions: int) -> list[StoredAnswer]:
    # Split bytes: on str, splitlines also splits at U+2028 and other characters that answers may contain.
    stored = [StoredAnswer(**json.loads(line)) for line in (folder.root / side.file).read_bytes().splitlines()]
    if len(stored) != num_questions:
        message = f"{side.name} has {len(stored)} answers to {num_questions} prompts"
        raise RunError(message, where=str(folder.root / side.file), remedy="start the evaluation again")
    return stored


def _judge_set(
    scorer: AnswerScorer,
    questions: list[EvalQuestion],
    answers: dict[SideAnswers, list[StoredAnswer]],
    general_loss: GeneralLoss | None,
) -> EvaluationVerdict:
    references, places = [one.reference for one in questions], [one.where for one in questions]
    by_metric: dict[str, dict[str, np.ndarray]] = {metric: {} for metric in scorer.metrics}
    usage: dict[str, SideUsage] = {}
    for side, stored in answers.items():
        gpu_s = sum(answer.gpu_s for answer in stored) if all(answer.gpu_s for answer in stored) else None
        usage[side.name] = SideUsage(len(stored), side.prompt_tokens, sum(answer.num_tokens for answer in stored), gpu_s)
        generated = [answer.as_generated() for answer in stored]
        for metric, scores in by_metric.items():
            scores[side.name] = scorer.score(metric, generated, references, places)
    first, *others = scorer.metrics
    verdict = judge(first, by_metric[first], others={name: by_metric[name] for name in others}, general_loss=general_loss)
    texts = {side.name: [answer.text for answer in stored] for side, stored in answers.items()}
    return replace(with_examples(verdict, [one.text for one in questions], references, texts), usage=usage)


def main(argv: Sequence[str]) -> int:
    with private_files():
        return print_result(lambda: conclude(EvaluationFolder(Path(argv[0]))))


if __name__ == "__main__":
    run_process(main)
