"""The beginning and the end of an evaluation, on CPU and without torch; between them, launcher.evaluate.answers answers.

    python -m launcher.evaluate.evaluation prepare PLAN_JSON --step N
    python -m launcher.evaluate.evaluation conclude FOLDER

The first reads the run's settings, with the command's overrides, as JSON from standard input, and writes task.json. The second
writes verdict.json for each set; the first set's is beside answers.json. Each prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from launcher.child_process import print_result, run_process
from launcher.config.schema import RunConfig
from launcher.config.sections.evaluation import HELD_OUT
from launcher.data.tokenization.encoder import Encoder, import_tokenizers_without_torch, load_tokenizer
from launcher.errors import ConfigError, DataError, Problem, RunError, did_you_mean
from launcher.evaluate.evaluation_folder import (
    EvaluatedExport,
    EvaluationFolder,
    EvaluationTask,
    SideAnswers,
    StoredAnswer,
    reuse_base_answers,
)
from launcher.evaluate.metrics import AnswerScorer, copy_metric_files
from launcher.evaluate.prompts import (
    AUTO_SHOTS,
    NUM_LONGEST,
    SELECTION_PROMPTS,
    BasePrompts,
    PromptStyle,
    list_shots,
    write_as_trained,
)
from launcher.evaluate.questions import (
    TRAINING,
    EvalQuestion,
    QuestionSet,
    TrainingOverlap,
    describe_copies,
    find_training_copies,
    read_set,
)
from launcher.evaluate.verdict import judge, with_examples
from launcher.evaluate.vllm_engine import read_version
from launcher.evaluate.weights import count_context, export_tuned_weights, find_base_weights
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.security.folders import private_files
from launcher.tracking.progress import Advance, live_line
from launcher.tracking.run_metrics import read_general_loss
from launcher.tracking.verdicts import EvaluationVerdict, GeneralLoss, SideUsage, digest_checkpoint, remove_verdicts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prepare(config: RunConfig, run: RunDir, step: int, sets: Sequence[str] = ()) -> EvaluationFolder:
    """Write everything that the processes of the evaluation need; `sets` are the sets to evaluate, empty for all."""
    settings, plan = config.evaluate, run_store.load_plan(run).model_copy(update={"config": config})
    names, engine = _require_usable(plan, sets)
    folder = EvaluationFolder.of(run.root, step)
    folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy_metric_files(settings, folder.root)
    scorer = AnswerScorer(settings, folder.root)
    import_tokenizers_without_torch()
    plan = _keep_template(plan, folder)
    tokenizer = load_tokenizer(plan.model.tokenizer_path or "")
    encoder, fit = Encoder(tokenizer, plan.config.data), _PromptFit(plan, tokenizer)
    max_shots = max(list_shots(settings.shots), default=0)
    base = find_base_weights(plan)
    read, training, overlap = _read_questions(plan, names, encoder, max_shots + SELECTION_PROMPTS if base else 0)
    others = [question for one in read for question in one.questions]
    training = fit.keep_fitting(training, fit.make_base_prompts(training, 0, others))
    # Rows that serve to choose the prompt style are not used as examples; if there are few rows, examples take precedence.
    num_examples = min(max_shots, max(0, len(training) - SELECTION_PROMPTS)) or min(max_shots, len(training))
    base_prompts = fit.make_base_prompts(training, num_examples, others)
    asked = {one.name: fit.keep_fitting(one.questions, base_prompts) for one in read}
    left_out = {one.name: describe_left_out(one, len(asked[one.name])) for one in read}
    if empty := [name for name, several in asked.items() if not several and (sets or not any(asked.values()))]:
        value = f"the model takes {fit.context:,} tokens, evaluate.max_new_tokens is {settings.max_new_tokens}"
        remedy = "evaluate sets with prompts and answers, such as chats, or lower evaluate.max_new_tokens"
        texts = {name: f"no prompt of {name} can be used: {'; '.join(left_out[name])}" for name in empty}
        raise DataError([Problem(text, where=name, value=value, remedy=remedy) for name, text in texts.items()])
    asked = {name: several for name, several in asked.items() if several}
    everything = [question for several in asked.values() for question in several]

    scored = [*everything, *training[num_examples:]]
    scorer.check_references([one.reference for one in scored], [one.where for one in scored])
    shots = fit.find_shots(scored, fit.make_base_prompts(training, num_examples, everything)) if base else ()
    if base is not None and settings.shots == "auto" and not shots:
        rows = format_count(len(training), "training row")
        few = f"no baseline with examples: {min(AUTO_SHOTS)} of {rows} do not fit before the prompts"
        left_out = {name: (*lines, few) for name, lines in left_out.items()}
    for name, several in asked.items():
        folder.write_questions(several, name)
    folder.write_questions(training)
    if base is not None:
        # The model's own settings may only name the end of a text; each side also stops where its template ends a turn.
        base = replace(base, stop_ids=tuple(dict.fromkeys((*base.stop_ids, *base_prompts.turn_end_ids))))
        steps = sorted(path for path in folder.root.parent.glob("step-*") if path != folder.root)
        reuse_base_answers(folder.root, list(reversed(steps)))
    places = {question.where for question in everything}
    task = EvaluationTask(
        run_name=plan.run_name,
        step=step,
        config=plan.config.model_dump(mode="json"),
        sets=tuple(asked),
        base=base,
        tuned=export_tuned_weights(plan, run, folder, step),
        tokenizer=str(plan.model.tokenizer_path),
        code=plan.model.path,
        context=fit.context,
        shots=shots,
        num_examples=num_examples,
        left_out=left_out,
        training_copies={name: tuple(one for one in copies if one.question in places) for name, copies in overlap.copies.items()},
        overlap_gap=overlap.gap,
        engine=engine,
    )
    folder.answers.unlink(missing_ok=True)
    remove_verdicts(folder.root)
    json_records.write(folder.task, task)
    return folder


def _read_questions(
    plan: LaunchPlan, names: Sequence[str], encoder: Encoder, num_training: int
) -> tuple[list[QuestionSet], list[EvalQuestion], TrainingOverlap]:
    """Read the questions of each set and `num_training` training rows, and find prompts that are in the training data too."""
    with live_line() as (say, make_pace):

        def count_documents(activity: str) -> Advance:
            pace, num_read = make_pace(), 0

            def advance(num_documents: int) -> None:
                nonlocal num_read
                num_read += num_documents
                if pace.is_due():
                    say(f"{activity}: {num_read:,} documents")

            return advance

        advance = count_documents("looking for the questions")
        read = [read_set(plan, name, encoder, plan.config.evaluate.max_prompts, advance) for name in names]
        training = read_set(plan, TRAINING, encoder, num_training, advance).questions if num_training else ()
        advance = count_documents("comparing prompts with training documents")
        return read, list(training), find_training_copies(plan, encoder, read, advance)


class _PromptFit:
    """Which prompts fit the model's context together with an answer."""

    def __init__(self, plan: LaunchPlan, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = plan.config, tokenizer
        self._encoder = Encoder(tokenizer, plan.config.data)
        self.context = count_context(plan)
        self._room = self.context - plan.config.evaluate.max_new_tokens

    def make_base_prompts(self, rows: Sequence[EvalQuestion], num_examples: int, others: Sequence[EvalQuestion]) -> BasePrompts:
        """Return prompts whose examples are the first training rows."""
        return BasePrompts(self._tokenizer, self._config.data, rows[:num_examples], [*rows[num_examples:], *others])

    def keep_fitting(self, questions: Sequence[EvalQuestion], base: BasePrompts) -> list[EvalQuestion]:
        """Return the questions that fit all sides' prompts without examples."""
        styles = [PromptStyle(form, 0) for form in base.forms(questions)]
        batches = [write_as_trained(self._encoder, questions), *(base.write(questions, style) for style in styles)]
        longest = [max(map(len, prompts)) for prompts in zip(*(batch.prompts for batch in batches), strict=True)]
        return [one for one, length in zip(questions, longest, strict=True) if length <= self._room]

    def find_shots(self, questions: Sequence[EvalQuestion], base: BasePrompts) -> tuple[int, ...]:
        """Return the candidate numbers of examples: those with which every prompt and its answer fit."""
        settings, fitting = self._config.evaluate, []
        longest = sorted(questions, key=lambda one: -len(str(one.document)))[:NUM_LONGEST]
        for count in list_shots(settings.shots):
            styles = [PromptStyle(form, count, max(settings.instructions, key=len)) for form in base.forms(questions)]
            needed = max(len(prompt) for style in styles for prompt in base.write(longest, style).prompts)
            if count <= base.num_examples and needed <= self._room:
                fitting.append(count)
            elif settings.shots != "auto":
                many = f"the longest prompt has {needed:,} tokens with {base.num_examples} examples, and {self._room:,} fit"
                remedy = "lower evaluate.shots or evaluate.max_new_tokens, or set evaluate.shots=auto"
                message = f"{count} examples cannot be shown to the base model"
                raise ConfigError(message, where="evaluate.shots", value=many, remedy=remedy)
        return tuple(fitting)


def _require_usable(plan: LaunchPlan, chosen: Sequence[str]) -> tuple[list[str], str]:
    """Check the sets and the engine; return the sets to evaluate, held-out documents first, and the engine with its version."""
    known = [HELD_OUT] if plan.data is not None and plan.data.num_eval_rows else []
    known += [one.name for one in plan.config.eval.all_sets if one.name in plan.eval_sets]
    if not known:
        remedy = "hold documents out with data.eval_fraction or data.eval_path, or name files in eval.sets, and train again"
        raise ConfigError("the run has no held-out documents and no evaluation sets", where=plan.run_dir, remedy=remedy)
    for name in chosen:
        if name not in known:
            remedy = f"{did_you_mean(name, known)} its sets are {', '.join(known)}".strip()
            raise ConfigError(f"the run has no evaluation set {name}", where="--set", value=name, remedy=remedy)
    settings = plan.config.evaluate
    names = list(chosen) or known
    if settings.vllm_python is None:
        if settings.vllm_gpus > 1:
            remedy = "set evaluate.vllm_python, or remove the setting"
            raise ConfigError("only vLLM can divide a model over GPUs", where="evaluate.vllm_gpus", remedy=remedy)
        return names, f"transformers {version('transformers')}"
    if (vllm := read_version(Path(settings.vllm_python).expanduser())) is None:
        raise ConfigError(
            "this is not the Python interpreter of an environment with vLLM",
            where="evaluate.vllm_python",
            value=settings.vllm_python,
            remedy="make one with: python -m venv /opt/vllm && /opt/vllm/bin/pip install vllm, or remove the setting",
        )
    return names, f"vllm {vllm}"


def describe_left_out(question_set: QuestionSet, num_questions: int) -> tuple[str, ...]:
    """Return which documents of a set are not used as questions, and why, as lines of text."""
    lines = [f"{num_questions} prompts of {question_set.num_documents:,} documents"]
    if question_set.num_without_answer:
        lines.append(f"{question_set.num_without_answer} documents left out: no prompt with an answer in text")
    if num_too_long := len(question_set.questions) - num_questions:
        lines.append(f"{num_too_long} prompts left out: with evaluate.max_new_tokens, they do not fit the model's context")
    return tuple(lines)


def _keep_template(plan: LaunchPlan, folder: EvaluationFolder) -> LaunchPlan:
    """Return the plan with the chat template that the data was rendered with, even if its file has changed or is gone."""
    if plan.data is None or plan.data.chat_template is None:
        return plan
    file = folder.root / "chat_template.jinja"
    with private_files():
        file.write_text(plan.data.chat_template, encoding="utf-8")
    data = plan.config.data.model_copy(update={"chat_template": str(file)})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"data": data})})


def conclude(folder: EvaluationFolder) -> dict[str, Any]:
    """Score the answers and write the verdicts; returns what the command shows."""
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
        stored: dict[SideAnswers, list[StoredAnswer]] = {}
        for side in sides:
            # Split bytes: on str, splitlines also splits at U+2028 and other characters that answers may contain.
            lines = (folder.root / side.file).read_bytes().splitlines()
            stored[side] = [StoredAnswer(**json.loads(line)) for line in lines]
            if len(lines) != len(questions):
                message = f"{side.name} has {len(lines)} answers to {len(questions)} prompts"
                raise RunError(message, where=str(folder.root / side.file), remedy="start the evaluation again")
        verdict = replace(_judge_set(scorer, questions, stored, general_loss), checkpoint=checkpoint)
        if copies:
            verdict = replace(verdict, sentence=f"{verdict.sentence} {describe_copies(len(questions), copies)}")
        verdict.write(folder.root / name)
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
    shutil.rmtree(folder.weights, ignore_errors=True)
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
        for metric, scores in by_metric.items():
            scores[side.name] = scorer.score(metric, stored, references, places)
    first, *others = scorer.metrics
    verdict = judge(first, by_metric[first], others={name: by_metric[name] for name in others}, general_loss=general_loss)
    texts = {side.name: [answer.text for answer in stored] for side, stored in answers.items()}
    return replace(with_examples(verdict, [one.text for one in questions], references, texts), usage=usage)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.evaluate.evaluation")
    parts = parser.add_subparsers(dest="part", required=True)
    preparation = parts.add_parser("prepare")
    preparation.add_argument("plan", type=Path)
    preparation.add_argument("--step", type=int, required=True)
    preparation.add_argument("--set", action="append", default=[])
    parts.add_parser("conclude").add_argument("folder", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.part == "conclude":
        with private_files():
            return print_result(lambda: conclude(EvaluationFolder(arguments.folder)))
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    config = RunConfig.model_validate_json(sys.stdin.read())
    # Use plan.json's folder, because the run may have been moved.
    run = RunDir(arguments.plan.absolute().parent)
    return print_result(lambda: {"folder": str(prepare(config, run, arguments.step, arguments.set).root)})


if __name__ == "__main__":
    run_process(main)
