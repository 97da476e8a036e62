"""Scores multiple-choice questions by likelihood: `python -m launcher.worker.scoring.choices PLAN_JSON --step N --file FILE`.

Nothing is generated: each choice is scored after its question, under the base model and the tuned model. Reads the run's
settings, with the command's overrides, as JSON from standard input. Writes progress to standard error and one JSON object to
standard output.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher import atomic_files, json_records, run_store
from launcher.config.schema import RunConfig
from launcher.data.sources import find_shared_completions
from launcher.data.tokenization.encoder import Encoder, load_tokenizer
from launcher.errors import ConfigError, DataError, Problem
from launcher.evaluate.choices import accuracy
from launcher.evaluate.choices.accuracy import ScoredChoices
from launcher.evaluate.choices.prompts import ChoiceTokens, encode_choices, to_eval_question
from launcher.evaluate.choices.questions import ChoiceQuestion, read_questions
from launcher.evaluate.overlap import MAX_DOCUMENTS, TrainingCopy, describe_copies, find_training_copies
from launcher.evaluate.prompting import BasePrompts, PromptStyle, TunedPrompts
from launcher.evaluate.questions import EvalQuestion, QuestionSet
from launcher.evaluate.selection import AUTO_SHOTS, NUM_LONGEST, ChosenStyles, choose_styles, list_shots
from launcher.evaluate.task import EvaluationFolder, describe
from launcher.evaluate.verdict import judge, with_examples
from launcher.models.plan_caches import require_caches
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.security.folders import private_files
from launcher.tracking.general_loss import read_general_loss
from launcher.tracking.verdicts import TUNED, EvaluationVerdict, digest_checkpoint
from launcher.worker.evaluation.prepare import with_own_template
from launcher.worker.evaluation.weights import count_context, find_base
from launcher.worker.scoring.command_process import answer, run_process
from launcher.worker.scoring.documents import DocumentGroup, ScoredDocument, score_documents
from launcher.worker.scoring.passes import Progress
from launcher.worker.scoring.weights import ScoredWeights, find_result, find_weights

# At most one in this many questions serves as an example, or to choose how the base model is asked.
_RESERVED = 5
_NOT_PLAIN = re.compile(r"^\.+|[^\w.-]")
# Each question with each of its choices; None for questions that cannot be asked.
_Asked = list[list[ChoiceTokens] | None]


class ChoiceEvaluation:
    """The questions in one file, and the models compared on them."""

    def __init__(self, plan: LaunchPlan, run: RunDir, step: int, on_progress: Progress, num_ranks: int | None) -> None:
        self._plan, self._run, self._step = plan, run, step
        self._on_progress, self._num_ranks = on_progress, num_ranks
        self._settings, self._context = plan.config.evaluate, count_context(plan)
        # Everything that the assistant says may be scored, whatever was trained.
        self._data = plan.config.data.model_copy(update={"train_on": "assistant"})
        self._tokenizer = load_tokenizer(plan.model.tokenizer_path or "")
        self._encoder = Encoder(self._tokenizer, self._data)
        self._tuned = TunedPrompts(self._tokenizer, self._data)
        self._tuned_weights = find_result(run, plan, step)
        self._base_weights = None if find_base(plan) is None else find_weights(run, plan, 0)

    def score(self, file: Path, everything: Sequence[ChoiceQuestion], folder: Path) -> dict[str, Any]:
        """Score a file's questions, write scores and verdict to `folder`, and return what the command shows.

        Raises:
            DataError: if no question can be asked.
            ConfigError: if the examples that evaluate.shots requests do not exist or do not fit.
        """
        examples, selection, questions = self._divide(everything)
        if not questions:
            raise _too_many_examples(self._settings.shots, _few_rows(everything))
        base = BasePrompts(self._tokenizer, self._data, [self._written(one) for one in examples], ())
        without_examples = self._ask_all(questions, base)
        asked = [question for i, question in enumerate(questions) if all(side[i] is not None for side in without_examples)]
        if not asked:
            message = f"no question fits the model's context of {self._context:,} tokens with its choices"
            raise DataError(Problem(message, where=str(file), remedy="shorten the questions"))
        sides: dict[str, tuple[PromptStyle | None, ScoredWeights]] = {}
        chosen = None
        if self._base_weights is not None:
            forms = self._forms([*asked, *selection], base)
            shots = self._fitting_shots(asked, base, forms, _few_rows(everything))
            chosen = self._choose_styles(selection, base, forms, shots, self._base_weights)
            for style in filter(None, (chosen.zero_shot, chosen.few_shot)):
                sides[f"{style.shots}-shot"] = (style, self._base_weights)
        sides[TUNED] = (None, self._tuned_weights)
        documents = {name: self._ask(asked, base, style) for name, (style, _) in sides.items()}
        usable = [i for i in range(len(asked)) if all(side[i] is not None for side in documents.values())]
        kept = [asked[i] for i in usable]
        scored: dict[str, list[ScoredChoices]] = {}
        for name, (_, weights) in sides.items():
            title = "tuned model" if name == TUNED else f"base model, {name}"
            scored |= self._score_sides(weights, {name: title}, {name: [documents[name][i] for i in usable]}, kept)
        verdict = self._judge(kept, scored)
        copies, gap = self._find_copies(file.stem, kept)
        if copies:
            verdict = replace(verdict, sentence=f"{verdict.sentence} {describe_copies(len(kept), copies)}")
        self._write(folder, scored, verdict)
        header, rows = verdict.table
        return {
            "verdict": json_records.encode(verdict),
            "header": header,
            "rows": rows,
            "styles": {name: describe(style) for name, (style, _) in sides.items()},
            "selection": [] if chosen is None else [{"style": str(one), "score": mean} for one, mean in chosen.scores.items()],
            "num_reserved": len(examples) + len(selection),
            "num_left_out": len(questions) - len(kept),
            "training_copies": list(map(str, copies)),
            "overlap_gap": gap,
        }

    def _divide(
        self, questions: Sequence[ChoiceQuestion]
    ) -> tuple[list[ChoiceQuestion], list[ChoiceQuestion], list[ChoiceQuestion]]:
        """Return examples for the base model, questions that decide how it is asked, and questions to score, in order."""
        if self._base_weights is None:
            return [], [], list(questions)
        order = np.random.default_rng(self._plan.config.run.seed).permutation(len(questions)).tolist()
        most = len(questions) // _RESERVED
        shots = self._settings.shots
        num_examples = min(max(AUTO_SHOTS), most) if shots == "auto" else min(shots, len(questions) - 1)
        num_selection = min(self._settings.selection_prompts, most)
        examples, selection = order[:num_examples], order[num_examples : num_examples + num_selection]
        rest = sorted({*range(len(questions))} - {*examples, *selection})
        return [questions[i] for i in examples], [questions[i] for i in selection], [questions[i] for i in rest]

    def _written(self, question: ChoiceQuestion) -> EvalQuestion:
        return to_eval_question(question, self._encoder, self._data, find_shared_completions(self._data))

    def _forms(self, questions: Sequence[ChoiceQuestion], base: BasePrompts) -> tuple[str, ...]:
        return base.forms([self._written(one) for one in questions])

    def _ask(self, questions: Sequence[ChoiceQuestion], base: BasePrompts, style: PromptStyle | None) -> _Asked:
        """Return each question with its choices in a style (None: the training style); None for questions that do not fit."""
        rendered = []
        for question in questions:
            written = self._written(question)
            rendered += (
                self._tuned.render(written, question.choices) if style is None else base.render(written, question.choices, style)
            )
        encoded = iter(encode_choices(self._encoder, rendered))
        asked: _Asked = []
        for question in questions:
            several = [next(encoded) for _ in question.choices]
            fitting = [one for one in several if one is not None and len(one.ids) <= self._context]
            asked.append(fitting if len(fitting) == len(several) else None)
        return asked

    def _ask_all(self, questions: Sequence[ChoiceQuestion], base: BasePrompts) -> list[_Asked]:
        """Return the questions as the tuned model sees them, and as the base model sees them without examples, in all forms."""
        forms = self._forms(questions, base) if self._base_weights is not None else ()
        return [self._ask(questions, base, style) for style in (None, *(PromptStyle(form, 0) for form in forms))]

    def _fitting_shots(
        self, questions: Sequence[ChoiceQuestion], base: BasePrompts, forms: Sequence[str], few_rows: str
    ) -> tuple[int, ...]:
        """Return the candidate numbers of examples: those with which every question fits the context.

        Raises:
            ConfigError: if a requested number does not fit, or the file does not have enough rows.
        """
        shots = self._settings.shots
        longest = sorted(questions, key=lambda one: -len(one.question) - max(map(len, one.choices)))[:NUM_LONGEST]
        fitting = []
        for count in list_shots(shots):
            styles = [PromptStyle(form, count, max(self._settings.instructions, key=len)) for form in forms]
            is_fitting = count <= base.num_examples and all(None not in self._ask(longest, base, style) for style in styles)
            if is_fitting:
                fitting.append(count)
            elif shots != "auto":
                unfitting = f"with them, a question does not fit {self._context:,} tokens"
                raise _too_many_examples(count, few_rows if count > base.num_examples else unfitting)
        return tuple(fitting)

    def _choose_styles(
        self,
        selection: Sequence[ChoiceQuestion],
        base: BasePrompts,
        forms: Sequence[str],
        shots: Sequence[int],
        weights: ScoredWeights,
    ) -> ChosenStyles:
        """Compare prompt styles for the base model on questions that are not part of the evaluation."""

        def score_styles(styles: Sequence[PromptStyle]) -> Mapping[PromptStyle, float]:
            asked = {str(style): self._ask(selection, base, style) for style in styles}
            usable = [i for i in range(len(selection)) if all(side[i] is not None for side in asked.values())]
            if not usable:
                return {}
            titles = {name: f"prompt forms, {number} of {len(asked)}" for number, name in enumerate(asked, 1)}
            documents = {name: [side[i] for i in usable] for name, side in asked.items()}
            scored = self._score_sides(weights, titles, documents, [selection[i] for i in usable])
            return {style: float(accuracy.score(accuracy.METRICS[0], scored[str(style)]).mean()) for style in styles}

        return choose_styles(forms, shots, self._settings.instructions, score_styles)

    def _score_sides(
        self,
        weights: ScoredWeights,
        titles: Mapping[str, str],
        documents: Mapping[str, Sequence[list[ChoiceTokens] | None]],
        questions: Sequence[ChoiceQuestion],
    ) -> dict[str, list[ScoredChoices]]:
        """Score questions under one model in several prompt styles."""
        groups = [
            DocumentGroup(titles[name], [ScoredDocument(one.ids, one.is_choice) for several in side for one in several or ()])
            for name, side in documents.items()
        ]
        log_probs = score_documents(self._plan, weights, groups, self._on_progress, self._num_ranks)
        scored = {}
        for name, parts in zip(documents, log_probs, strict=True):
            sums = iter([float(part.sum(dtype=np.float64)) for part in parts])
            scored[name] = [accuracy.choose(question, [next(sums) for _ in question.choices]) for question in questions]
        return scored

    def _judge(self, questions: Sequence[ChoiceQuestion], scored: Mapping[str, Sequence[ScoredChoices]]) -> EvaluationVerdict:
        by_metric = {
            metric: {side: accuracy.score(metric, several) for side, several in scored.items()} for metric in accuracy.METRICS
        }
        first = accuracy.METRICS[0]
        rise = self._plan.config.eval.forgetting_max_rise
        general_loss = read_general_loss(self._run, self._step, rise)
        verdict = judge(first, by_metric[first], others=by_metric, general_loss=general_loss)
        verdict = replace(verdict, checkpoint=digest_checkpoint(self._run, self._step))
        chosen = {
            side: [question.choices[one.chosen] for question, one in zip(questions, several, strict=True)]
            for side, several in scored.items()
        }
        texts = [one.question for one in questions]
        return with_examples(verdict, texts, [one.choices[one.answer] for one in questions], chosen)

    def _find_copies(self, name: str, questions: Sequence[ChoiceQuestion]) -> tuple[tuple[TrainingCopy, ...], str]:
        """Return the questions that are also in the training data, and what was not compared (empty if everything was)."""
        num_read, num_documents = 0, min(MAX_DOCUMENTS, self._plan.data.num_docs if self._plan.data is not None else 0)

        def advance(count: int) -> None:
            nonlocal num_read
            num_read = min(num_read + count, num_documents)
            self._on_progress("comparing questions with training documents", num_read, num_documents)

        question_set = QuestionSet(name, tuple(self._written(one) for one in questions), len(questions), 0)
        overlap = find_training_copies(self._plan, Encoder(self._tokenizer, self._plan.config.data), [question_set], advance)
        return overlap.copies.get(name, ()), overlap.gap

    def _write(self, folder: Path, scored: Mapping[str, Sequence[ScoredChoices]], verdict: EvaluationVerdict) -> None:
        with private_files():
            folder.mkdir(parents=True, exist_ok=True)
            for side, several in scored.items():
                lines = "".join(json.dumps(asdict(one)) + "\n" for one in several)
                atomic_files.write_bytes(folder / f"{side}.jsonl", lines.encode(), mode=0o600)
            verdict.write(folder)
            for file in folder.glob("*.jsonl"):
                # Left by an earlier evaluation with other sides.
                if file.stem not in scored:
                    file.unlink()


def _too_many_examples(count: int | str, why: str) -> ConfigError:
    return ConfigError(
        f"{count} examples cannot be shown to the base model",
        where="evaluate.shots",
        value=why,
        remedy="lower evaluate.shots, or set evaluate.shots=auto",
    )


def _few_rows(questions: Sequence[ChoiceQuestion]) -> str:
    return f"the file has {len(questions):,} rows, and examples are rows that are not scored"


def score_files(
    config: RunConfig,
    run: RunDir,
    step: int,
    files: Sequence[Path],
    limit: int | None,
    on_progress: Progress,
    num_ranks: int | None = None,
) -> dict[str, Any]:
    """Score the questions in each file; returns what the command shows.

    Raises:
        DataError: for lines that are not multiple-choice questions.
        ConfigError: for two files with the same name, whose scores would overwrite each other.
        Also whatever `ChoiceEvaluation.score` raises.
    """
    questions = {_NOT_PLAIN.sub("_", file.stem): (file, read_questions(file, limit)) for file in files}
    plan = run_store.load_plan(run).model_copy(update={"config": config})
    require_caches(plan)
    folder = EvaluationFolder.of(run.root, step)
    with private_files():
        folder.root.mkdir(parents=True, exist_ok=True)
    if len(questions) < len(files):
        names = ", ".join(map(str, files))
        raise ConfigError("two files have the same name", where="--choices", value=names, remedy="rename one of them")
    evaluation = ChoiceEvaluation(with_own_template(plan, folder), run, step, on_progress, num_ranks)
    sets = {name: evaluation.score(file, several, folder.choices / name) for name, (file, several) in questions.items()}
    return {"run": plan.run_name, "step": step, "folder": str(folder.choices), "sets": sets}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.scoring.choices")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--step", type=int, required=True)
    parser.add_argument("--file", type=Path, action="append", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--ranks", type=int)
    chosen = parser.parse_args(argv)
    config = RunConfig.model_validate_json(sys.stdin.read())
    # Use plan.json's folder, because the run may have been moved.
    run = RunDir(chosen.plan.absolute().parent)
    return answer(lambda on_progress: score_files(config, run, chosen.step, chosen.file, chosen.limit, on_progress, chosen.ranks))


if __name__ == "__main__":
    run_process(main)
