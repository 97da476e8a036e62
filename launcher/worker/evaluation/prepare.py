"""Prepares an evaluation on CPU, before any GPU is requested: `python -m launcher.worker.evaluation.prepare PLAN_JSON --step N`.

Reads the run's settings, with the command's overrides, as JSON from standard input. Finds the questions, exports the step if the
run's export holds a different one, and writes task.json. Prints one JSON object: the folder, or the problems.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from launcher import json_records, run_store
from launcher.config.schema import RunConfig
from launcher.config.sections.evaluation import HELD_OUT
from launcher.data.tokenization.encoder import Encoder, import_tokenizers_without_torch, load_tokenizer
from launcher.errors import ConfigError, DataError, LauncherError, Problem, did_you_mean
from launcher.evaluate import questions as reading
from launcher.evaluate.answers import reuse_base_answers
from launcher.evaluate.engines.vllm_engine import read_version
from launcher.evaluate.overlap import TrainingCopy, find_training_copies
from launcher.evaluate.prompting import BasePrompts, PromptStyle, TunedPrompts
from launcher.evaluate.questions import EvalQuestion, QuestionSet
from launcher.evaluate.scoring import AnswerScorer, copy_metric_files
from launcher.evaluate.selection import NUM_LONGEST, list_shots
from launcher.evaluate.task import EvaluationFolder, EvaluationTask
from launcher.models.plan_caches import require_caches
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.security.folders import private_files
from launcher.security.printable_stream import printable_output
from launcher.tracking.progress import Advance, Pace, live_line
from launcher.tracking.verdicts import remove_verdicts
from launcher.worker.evaluation.weights import count_context, export_tuned, find_base
from launcher.worker.ranks.rank_env import die_with_parent
from launcher.worker.signals import exit_on_termination


def prepare(config: RunConfig, run: RunDir, step: int) -> EvaluationFolder:
    """Write everything that the processes of the evaluation need.

    Raises:
        ConfigError, DataError: for settings or data that cannot be evaluated.
        CheckpointError: if the step cannot be exported.
    """
    plan = run_store.load_plan(run).model_copy(update={"config": config})
    require_caches(plan)
    names = _require_sets(plan)
    if config.evaluate.vllm_python is not None:
        _require_vllm(Path(config.evaluate.vllm_python).expanduser())
    elif config.evaluate.vllm_gpus > 1:
        raise ConfigError(
            "only vLLM can divide a model over GPUs",
            where="evaluate.vllm_gpus",
            value=str(config.evaluate.vllm_gpus),
            remedy="set evaluate.vllm_python to the Python of an environment with vLLM, or remove the setting",
        )
    folder = EvaluationFolder.of(run.root, step)
    folder.root.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy_metric_files(config.evaluate, folder.root)
    scorer = AnswerScorer(config.evaluate, folder.root)
    import_tokenizers_without_torch()
    plan = with_own_template(plan, folder)
    tokenizer = load_tokenizer(plan.model.tokenizer_path or "")
    encoder = Encoder(tokenizer, plan.config.data)
    max_shots = max(list_shots(config.evaluate.shots), default=0)
    base = find_base(plan)
    sets, training = _read_questions(plan, encoder, names, max_shots + config.evaluate.selection_prompts if base else 0)
    with live_line() as (say, make_pace):
        overlap = find_training_copies(plan, encoder, sets, _count(say, make_pace, "comparing prompts with training documents"))
    context = count_context(plan)
    room = context - config.evaluate.max_new_tokens
    tuned_prompts = TunedPrompts(tokenizer, plan.config.data)
    read = [question for one in sets for question in one.questions]
    training = _fitting(training, tuned_prompts, BasePrompts(tokenizer, plan.config.data, (), [*training, *read]), room)
    # Rows that serve to choose the prompt style are not used as examples; if there are few rows, examples take precedence.
    num_examples = min(max_shots, max(0, len(training) - config.evaluate.selection_prompts)) or min(max_shots, len(training))

    def base_prompts_of(rows: Sequence[EvalQuestion]) -> BasePrompts:
        return BasePrompts(tokenizer, plan.config.data, rows[:num_examples], [*rows[num_examples:], *read])

    base_prompts = base_prompts_of(training)
    left_out: dict[str, tuple[str, ...]] = {}
    asked: dict[str, list[EvalQuestion]] = {}
    for one in sets:
        fitting = _fitting(one.questions, tuned_prompts, base_prompts, room)
        left_out[one.name] = tuple(reading.describe_left_out(one, len(fitting), len(one.questions) - len(fitting)))
        asked[one.name] = fitting
    _require_questions(config, asked, left_out, context)
    for name, several in asked.items():
        left_out[name] += _describe_long_references(several, encoder, config.evaluate.max_new_tokens)
    asked = {name: several for name, several in asked.items() if several}
    everything = [question for several in asked.values() for question in several]
    scored = [*everything, *training[num_examples:]]
    scorer.check_references([one.reference for one in scored], [one.where for one in scored])
    shots = _fitting_shots(config, scored, base_prompts, context) if base else ()
    if base is not None and config.evaluate.shots == "auto" and not shots:
        # Short examples may fit where these do not.
        training = sorted(training, key=lambda one: len(str(one.document)) + len(one.reference))
        base_prompts, chosen_by = base_prompts_of(training), training[num_examples:]
        scorer.check_references([one.reference for one in chosen_by], [one.where for one in chosen_by])
        shots, fewest = _fitting_shots(config, [*everything, *chosen_by], base_prompts, context), min(list_shots("auto"))
        if not shots:
            few = f"{fewest} of them do not fit before the prompts"
            if num_examples < fewest:
                few = f"only {format_count(len(training), 'training row')} with an answer in text can be shown in the context"
            left_out = {name: (*lines, f"no baseline with examples: {few}") for name, lines in left_out.items()}
    if base is not None:
        # The model's own settings may only name the end of a text; each side also stops where its template ends a turn.
        base = replace(base, stop_ids=tuple(dict.fromkeys((*base.stop_ids, *base_prompts.turn_end_ids))))
    for name, several in asked.items():
        folder.write_questions(several, name)
    folder.write_questions(training)
    task = EvaluationTask(
        run_name=plan.run_name,
        step=step,
        config=plan.config.model_dump(mode="json"),
        sets=tuple(asked),
        base=base,
        tuned=export_tuned(plan, run, folder, step),
        tokenizer=str(plan.model.tokenizer_path),
        code=plan.model.path,
        context=context,
        shots=shots,
        num_examples=num_examples,
        left_out=left_out,
        training_copies={name: _of_questions(overlap.copies.get(name, ()), several) for name, several in asked.items()},
        overlap_gap=overlap.gap,
    )
    if base is not None:
        others = sorted(path for path in folder.root.parent.glob("step-*") if path != folder.root)
        reuse_base_answers(folder.root, list(reversed(others)))
    folder.answers.unlink(missing_ok=True)
    remove_verdicts(folder.root)
    shutil.rmtree(folder.processes, ignore_errors=True)
    json_records.write(folder.task, task)
    return folder


def _require_sets(plan: LaunchPlan) -> list[str]:
    """Return the sets to evaluate, held-out documents first."""
    known = [HELD_OUT] if plan.data is not None and plan.data.num_eval_rows else []
    known += [one.name for one in plan.config.eval.all_sets if one.name in plan.eval_sets]
    chosen = plan.config.evaluate.sets
    problems = [
        Problem(
            f"the run has no evaluation set {name}",
            where="evaluate.sets",
            value=name,
            remedy=f"{did_you_mean(name, known)} its sets are {', '.join(known) or 'none'}".strip(),
        )
        for name in chosen
        if name not in known
    ]
    if not known:
        remedy = "hold documents out with data.eval_fraction or data.eval_path, or name files in eval.sets, and train again"
        problems = [Problem("the run has no held-out documents and no evaluation sets", where=plan.run_dir, remedy=remedy)]
    if problems:
        raise ConfigError(problems)
    return list(chosen) or known


def _require_vllm(python: Path) -> None:
    if read_version(python) is None:
        raise ConfigError(
            "this is not the Python interpreter of an environment with vLLM",
            where="evaluate.vllm_python",
            value=str(python),
            remedy="make one with: python -m venv /opt/vllm && /opt/vllm/bin/pip install vllm, or remove the setting: "
            "transformers then generates the answers",
        )


def with_own_template(plan: LaunchPlan, folder: EvaluationFolder) -> LaunchPlan:
    """Return the plan with the chat template that the data was rendered with, even if its file has changed or is gone."""
    if plan.data is None or plan.data.chat_template is None:
        return plan
    file = folder.root / "chat_template.jinja"
    with private_files():
        file.write_text(plan.data.chat_template, encoding="utf-8")
    data = plan.config.data.model_copy(update={"chat_template": str(file)})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"data": data})})


def _read_questions(
    plan: LaunchPlan, encoder: Encoder, names: Sequence[str], num_training: int
) -> tuple[list[QuestionSet], list[EvalQuestion]]:
    """Return the questions in the sets, and questions from training rows for the base model."""
    count = plan.config.evaluate.max_prompts
    with live_line() as (say, make_pace):
        advance = _count(say, make_pace, "looking for the questions")
        sets = [
            reading.read_held_out(plan, encoder, count, advance)
            if name == HELD_OUT
            else reading.read_eval_set(plan, name, encoder, count, advance)
            for name in names
        ]
        training = reading.read_training(plan, encoder, num_training, advance).questions if num_training else ()
    return sets, list(training)


def _count(say: Callable[[str], None], make_pace: Callable[[], Pace], activity: str) -> Advance:
    """Return a function that counts documents and occasionally shows the count."""
    pace, num_read = make_pace(), 0

    def advance(num_documents: int) -> None:
        nonlocal num_read
        num_read += num_documents
        if pace.is_due():
            say(f"{activity}: {num_read:,} documents")

    return advance


def _of_questions(copies: Sequence[TrainingCopy], questions: Sequence[EvalQuestion]) -> tuple[TrainingCopy, ...]:
    places = {question.where for question in questions}
    return tuple(copy for copy in copies if copy.question in places)


def _fitting(questions: Sequence[EvalQuestion], tuned: TunedPrompts, base: BasePrompts, room: int) -> list[EvalQuestion]:
    """Return the questions that fit all sides' prompts without examples."""
    if not questions:
        return []
    batches = [tuned.write(questions)]
    batches += [base.write(questions, PromptStyle(form, 0)) for form in base.forms(questions)]
    return [question for i, question in enumerate(questions) if max(len(batch.prompts[i]) for batch in batches) <= room]


def _describe_long_references(questions: Sequence[EvalQuestion], encoder: Encoder, max_new_tokens: int) -> tuple[str, ...]:
    """Return a line on the references that no answer of `max_new_tokens` tokens can contain, or nothing."""
    references = [one.reference for one in questions]
    if not references:
        return ()
    encoded = encoder.tokenizer(references, add_special_tokens=False, verbose=False).input_ids
    long = sum(len(ids) > max_new_tokens for ids in encoded)
    if not long:
        return ()
    return (f"{long} of {len(questions)} references are longer than evaluate.max_new_tokens={max_new_tokens}: raise it",)


def _require_questions(
    config: RunConfig, asked: dict[str, list[EvalQuestion]], left_out: dict[str, tuple[str, ...]], context: int
) -> None:
    required = config.evaluate.sets or tuple(asked)
    empty = [name for name in required if not asked[name]]
    if empty and (config.evaluate.sets or len(empty) == len(asked)):
        raise DataError(
            [
                Problem(
                    f"no prompt of {name} can be used: {'; '.join(left_out[name])}",
                    where="evaluate.sets",
                    value=f"the model takes {context:,} tokens, evaluate.max_new_tokens is {config.evaluate.max_new_tokens}",
                    remedy="evaluate sets with prompts and answers, such as chats, or lower evaluate.max_new_tokens",
                )
                for name in empty
            ]
        )


def _fitting_shots(config: RunConfig, questions: Sequence[EvalQuestion], base: BasePrompts, context: int) -> tuple[int, ...]:
    """Return the candidate numbers of examples: those with which every prompt and its answer fit the context.

    Raises:
        ConfigError: if a requested number does not fit, or there are not enough training rows.
    """
    shots = config.evaluate.shots
    longest = sorted(questions, key=lambda one: -len(str(one.document)))[:NUM_LONGEST]
    room = context - config.evaluate.max_new_tokens
    fitting = []
    for count in list_shots(shots):
        styles = [PromptStyle(form, count, max(config.evaluate.instructions, key=len)) for form in base.forms(questions)]
        needed = max(len(prompt) for style in styles for prompt in base.write(longest, style).prompts)
        if count <= base.num_examples and needed <= room:
            fitting.append(count)
        elif shots != "auto":
            many = f"the longest prompt has {needed:,} tokens with them, and {room:,} fit"
            raise ConfigError(
                f"{count} examples cannot be shown to the base model",
                where="evaluate.shots",
                value=many
                if count <= base.num_examples
                else f"the training rows have {base.num_examples} with an answer in text",
                remedy="lower evaluate.shots or evaluate.max_new_tokens, or set evaluate.shots=auto",
            )
    return tuple(fitting)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.evaluation.prepare")
    parser.add_argument("plan", type=Path)
    parser.add_argument("--step", type=int, required=True)
    arguments = parser.parse_args(argv)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    config = RunConfig.model_validate_json(sys.stdin.read())
    # Use plan.json's folder, because the run may have been moved.
    run = RunDir(arguments.plan.absolute().parent)
    try:
        folder = prepare(config, run, arguments.step)
    except LauncherError as error:
        print(json.dumps(error.to_report()))
        return error.exit_code
    print(json.dumps({"folder": str(folder.root)}))
    return 0


if __name__ == "__main__":
    exit_on_termination()
    die_with_parent(signal.SIGTERM)
    # Libraries log names from other users' files to the command's terminal.
    with printable_output():
        code = main()
    sys.exit(code)
