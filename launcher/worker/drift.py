"""Compares prompts with a run's training prompts: `python -m launcher.worker.drift PLAN_JSON PROMPTS [--[no-]likelihood]`.

Torch is loaded only if models score the prompts. Reads the run's settings as JSON from standard input. Writes progress to
standard error and one JSON object (the report or the problems) to standard output.
"""

from __future__ import annotations

import argparse
import codecs
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from launcher import json_records, run_store
from launcher.config.schema import RunConfig
from launcher.data.cache.split import Split
from launcher.data.checks import patterns
from launcher.data.sources import Document, find_shared_completions
from launcher.data.sources.files import read_lines
from launcher.data.sources.formats import FORMATS, detect_format
from launcher.data.sources.json_array import read_array
from launcher.data.tokenization.encoder import Encoder, import_tokenizers_without_torch, load_tokenizer
from launcher.errors import DataError, Problem
from launcher.evaluate.drift.comparison import DriftReport, Prompt, compare
from launcher.evaluate.drift.likelihood import PromptLikelihoods
from launcher.models.plan_caches import require_caches
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.worker.scoring.command_process import answer, run_process
from launcher.worker.scoring.passes import Progress
from launcher.worker.scoring.prompt_losses import compare_likelihoods, find_obstacle

# Number of prompts to compare from each side, sampled at random.
MAX_PROMPTS = 2_000
# With fewer, no test finds anything.
MIN_PROMPTS = 10
_MAX_SHOWN = 80
# Leading white space and a byte order mark are shorter than this.
_HEAD_BYTES = 256
# Maps the prompt's key to the answer's: a row with both is a training row.
_ANSWER_KEYS = {"prompt": "completion", "question": "answer", "instruction": "output"}
_CHAT_KEYS = ("messages", "conversations")
_ANSWERING_ROLES = ("assistant", "gpt", "model")
_FORM = 'write lines such as {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
# A made-up answer: formats and chat templates require one.
_ANSWER = "answer"


def find_drift(config: RunConfig, run: RunDir, path: Path, with_likelihood: bool | None, on_progress: Progress) -> DriftReport:
    """Compare the prompts in a file with the prompts in the run's training data.

    `with_likelihood` is whether both models score the prompts; None means only if this machine can do it quickly.

    Raises:
        DataError: for lines that are not prompts, and for data without prompts.
    """
    plan = run_store.load_plan(run).model_copy(update={"config": config})
    require_caches(plan)
    obstacle = find_obstacle(plan) if with_likelihood is None else "" if with_likelihood else "left out with --no-likelihood"
    if obstacle:
        import_tokenizers_without_torch()
    tokenizer = load_tokenizer(plan.model.tokenizer_path or "")
    encoder = Encoder(tokenizer, plan.config.data)
    generator = np.random.default_rng(plan.config.run.seed)
    training = _training_prompts(plan, tokenizer, generator)
    prompts = _encode(list(_read(path)), find_shared_completions(plan.config.data), encoder, tokenizer, generator)
    if min(len(training), len(prompts)) < MIN_PROMPTS:
        few = Problem(
            f"too few prompts to compare: {len(prompts)} in the file, {len(training)} in the training data",
            where=str(path),
            remedy=f"compare at least {MIN_PROMPTS}",
        )
        raise DataError(few)
    if obstacle:
        likelihoods = PromptLikelihoods({}, (obstacle,))
    else:
        likelihoods = compare_likelihoods(plan, run, prompts, training, with_likelihood is True, on_progress)
    return compare(prompts, training, likelihoods)


def _training_prompts(plan: LaunchPlan, tokenizer: Any, generator: np.random.Generator) -> list[Prompt]:
    """Return a sample of the training documents, each up to its last answer."""
    if plan.data is None:
        raise DataError(Problem("the run has no data cache", where=plan.run_dir, remedy="name a run that was trained"))
    split = Split.open(plan.data)
    prompts = []
    for number in generator.permutation(split.num_docs)[:MAX_PROMPTS]:
        document = slice(split.docs[number], split.docs[number + 1])
        # The beginning of each span of trained tokens.
        starts = np.flatnonzero(np.diff(np.asarray(split.trained[document]).astype(np.int8), prepend=0) == 1)
        tokens = np.asarray(split.tokens[document])[: starts[-1] if len(starts) else 0].tolist()
        if tokens:
            prompts.append(Prompt(f"training document {number}", _decode(tokenizer, tokens), tuple(tokens)))
    if not prompts:
        raise DataError(
            Problem(
                "the training data has no prompts: every token of its documents is trained",
                where="data",
                remedy="compare prompts with a run on chats, or on prompts with completions",
            )
        )
    return prompts


def _read(path: Path) -> Iterator[Document]:
    """Yield the prompt of each line, or of each entry of one JSON array.

    Raises:
        DataError: with every kind of line that has no prompt.
    """
    problems: dict[str, Problem] = {}
    try:
        with path.open("rb") as file:
            if _is_array(file):
                for row, where, _ in read_array(file, str(path)):
                    try:
                        yield _parse(row, where)
                    except DataError as error:
                        for problem in error.problems:
                            problems.setdefault(problem.message, problem)
            for number, line in enumerate(read_lines(file, str(path)), 1):
                if not line.strip():
                    continue
                try:
                    yield _parse(json.loads(line), f"{path}:{number}")
                except (ValueError, RecursionError):
                    value = line[:_MAX_SHOWN].decode(errors="replace").strip()
                    problems.setdefault("json", Problem("the line is not JSON", f"{path}:{number}", value, _FORM))
                except DataError as error:
                    for problem in error.problems:
                        problems.setdefault(problem.message, problem)
    except OSError as error:
        raise DataError(Problem(f"the prompts cannot be read: {error.strerror}", where=str(path))) from error
    if problems:
        raise DataError([*problems.values()])


def _is_array(file: io.BufferedReader) -> bool:
    """Return True if the file is one JSON array: a JSON Lines file with prompts never begins with a bracket."""
    head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES].removeprefix(codecs.BOM_UTF8).lstrip()
    return head.startswith(b"[")


def _parse(row: Any, where: str) -> Document:
    """Return a row's prompt with a made-up answer. For a chat, the prompt is everything before the last answer.

    Raises:
        DataError: if the row has no prompt.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise DataError(Problem("the line is not an object", where=where, remedy=_FORM))
    for prompt_key, answer_key in _ANSWER_KEYS.items():
        if prompt_key in row:
            row = {**row, answer_key: _ANSWER}
    for key in _CHAT_KEYS:
        if isinstance(row.get(key), list):
            row = {**row, key: _with_unknown_answer(row[key])}
    if "text" in row and not {*_ANSWER_KEYS, *_CHAT_KEYS} & row.keys():
        row = {"prompt": row["text"], "completion": _ANSWER}
    return FORMATS[detect_format(row, where)].parse(row, where)


def _with_unknown_answer(turns: list[Any]) -> list[Any]:
    """Return the turns of a chat up to its last answer, which a made-up one replaces."""
    turns = list(turns)
    while turns and isinstance(turns[-1], dict) and turns[-1].get("role", turns[-1].get("from")) in _ANSWERING_ROLES:
        turns.pop()
    if turns and isinstance(turns[-1], dict) and "from" in turns[-1]:
        return [*turns, {"from": "gpt", "value": _ANSWER}]
    return [*turns, {"role": "assistant", "content": _ANSWER}]


def _encode(
    documents: Sequence[Document], completions: str, encoder: Encoder, tokenizer: Any, generator: np.random.Generator
) -> list[Prompt]:
    """Return a sample of the prompts, formatted as in training."""
    prompts = []
    for number in generator.permutation(len(documents))[:MAX_PROMPTS]:
        written = encoder.prompt(encoder.write_as_chat(documents[number], completions))
        if written is not None:
            shown, tokens, _ = written
            # Redact before shortening: a truncated credential has no recognizable form.
            (shown,) = patterns.redact([shown])
            prompts.append(Prompt(documents[number].where, _decode(tokenizer, tokens), tuple(tokens), shown))
    return prompts


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.worker.drift")
    parser.add_argument("plan", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--likelihood", action=argparse.BooleanOptionalAction)
    arguments = parser.parse_args(argv)
    config = RunConfig.model_validate_json(sys.stdin.read())
    run = RunDir(arguments.plan.absolute().parent)

    def describe(on_progress: Progress) -> dict[str, Any]:
        report = find_drift(config, run, arguments.prompts, arguments.likelihood, on_progress)
        return dict(json_records.encode(report))

    return answer(describe)


if __name__ == "__main__":
    run_process(main)
