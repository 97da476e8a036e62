"""Compares prompts with those that a run was trained on: `python -m launcher.worker.drift PLAN_JSON PROMPTS`. Without torch.

Reads the run's settings as JSON from standard input. Prints one JSON object: the report, or the problems.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from launcher import json_records, run_store
from launcher.config.schema import RunConfig
from launcher.data.cache import Split
from launcher.data.checks import patterns
from launcher.data.sources import Chat, Completion, Document, Message
from launcher.data.tokenization.encoder import Encoder, import_tokenizers_without_torch, load_tokenizer
from launcher.errors import DataError, LauncherError, Problem
from launcher.evaluate.drift.comparison import DriftReport, FarPrompt, Prompt, compare
from launcher.models.plan_caches import require_caches
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.security.printable_stream import printable_output
from launcher.worker.ranks.rank_env import die_with_parent
from launcher.worker.signals import exit_on_termination

# Prompts of each side that are compared: a random sample.
MAX_PROMPTS = 2_000
# With fewer, no test finds anything.
MIN_PROMPTS = 10
_KEYS = ("prompt", "question", "instruction", "input", "text", "query")
_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}
_FORM = 'write lines such as {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}'
_ANSWER = "placeholder"


def find_drift(config: RunConfig, run: RunDir, path: Path) -> DriftReport:
    """Compare the prompts of a file with those of the run's training data.

    Raises:
        DataError: for lines that are no prompts, and data without prompts.
    """
    plan = run_store.load_plan(run).model_copy(update={"config": config})
    require_caches(plan)
    import_tokenizers_without_torch()
    tokenizer = load_tokenizer(plan.model.tokenizer_path or "")
    encoder = Encoder(tokenizer, plan.config.data)
    generator = np.random.default_rng(plan.config.run.seed)
    training = _training_prompts(plan, tokenizer, generator)
    prompts = _encode(list(_read(path)), encoder, tokenizer, generator)
    if min(len(training), len(prompts)) < MIN_PROMPTS:
        few = Problem(
            f"too few prompts to compare: {len(prompts)} in the file, {len(training)} in the training data",
            where=str(path),
            remedy=f"compare at least {MIN_PROMPTS}",
        )
        raise DataError(few)
    return _redacted(compare(prompts, training))


def _training_prompts(plan: LaunchPlan, tokenizer: Any, generator: np.random.Generator) -> list[Prompt]:
    """Return a sample of the training documents up to their first trained token."""
    if plan.data is None:
        raise DataError(Problem("the run has no data cache", where=plan.run_dir, remedy="name a run that was trained"))
    split = Split.open(plan.data)
    prompts = []
    for number in generator.permutation(split.num_docs)[:MAX_PROMPTS]:
        document = slice(split.docs[number], split.docs[number + 1])
        trained = np.flatnonzero(np.asarray(split.trained[document]))
        tokens = np.asarray(split.tokens[document])[: trained[0] if len(trained) else 0].tolist()
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


def _read(path: Path) -> Iterator[tuple[Document, str]]:
    """Yield the prompt of each line, with a placeholder for its answer, and its text.

    Raises:
        DataError: with every kind of line that is no prompt.
    """
    problems: dict[str, Problem] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if not line.strip():
                    continue
                try:
                    yield _parse(json.loads(line), where)
                except ValueError as error:
                    kind = "the line is no JSON" if isinstance(error, json.JSONDecodeError) else str(error)
                    problems.setdefault(kind, Problem(kind, where, line[:80].decode(errors="replace").strip(), _FORM))
    except OSError as error:
        raise DataError(Problem(f"the prompts cannot be read: {error.strerror}", where=str(path))) from error
    if problems:
        raise DataError([*problems.values()])


def _parse(row: Any, where: str) -> tuple[Document, str]:
    """Return the prompt of a row: its messages up to the last answer, or the first of its keys that may hold a prompt.

    Raises:
        ValueError: where there is none.
    """
    if isinstance(row, str):
        row = {"prompt": row}
    if not isinstance(row, dict):
        raise ValueError("the line is no object")
    turns = row.get("messages", row.get("conversations"))
    if isinstance(turns, list):
        messages = [_message(turn) for turn in turns]
        while messages and messages[-1].role == "assistant":
            messages.pop()
        if not messages:
            raise ValueError("the messages have no prompt")
        return Chat(where, (*messages, Message("assistant", _ANSWER))), messages[-1].content
    text = next((row[key] for key in _KEYS if isinstance(row.get(key), str) and row[key].strip()), None)
    if text is None:
        raise ValueError(f"the line has no prompt: none of {', '.join(_KEYS)}, messages")
    return Completion(where, text, _ANSWER), text


def _message(turn: Any) -> Message:
    if isinstance(turn, dict):
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role in _ROLES and isinstance(content, str):
            return Message(_ROLES[role], content)
    raise ValueError("a message has no role or no text")


def _encode(
    rows: Sequence[tuple[Document, str]], encoder: Encoder, tokenizer: Any, generator: np.random.Generator
) -> list[Prompt]:
    """Return a sample of the prompts as training would write them."""
    prompts = []
    for number in generator.permutation(len(rows))[:MAX_PROMPTS]:
        document, text = rows[number]
        if (written := encoder.prompt(encoder.write_as_chat(document, "auto"))) is not None:
            tokens = written[1]
            prompts.append(Prompt(document.where, _decode(tokenizer, tokens), tuple(tokens), text))
    return prompts


def _decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _redacted(report: DriftReport) -> DriftReport:
    """Return the report without credentials in its texts."""
    farthest = tuple(FarPrompt(one.where, one.similarity, patterns.redact([one.text])[0]) for one in report.farthest)
    return replace(report, farthest=farthest)


def main(plan: str, path: str) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config = RunConfig.model_validate_json(sys.stdin.read())
    try:
        report = find_drift(config, RunDir(Path(plan).absolute().parent), Path(path))
    except LauncherError as error:
        problems = [[p.message, p.where, p.value, p.remedy] for p in error.problems]
        print(json.dumps({"problems": problems, "exit_code": error.exit_code}))
        return error.exit_code
    print(json.dumps(json_records.encode(report)))
    return 0


if __name__ == "__main__":
    exit_on_termination()
    die_with_parent(signal.SIGTERM)
    with printable_output():
        code = main(*sys.argv[1:3])
    sys.exit(code)
