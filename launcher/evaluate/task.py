"""One evaluation in its folder: what is asked of which weights, and what has come of it. Without torch."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher import atomic_files, json_records
from launcher.config.schema import RunConfig
from launcher.errors import RunError
from launcher.evaluate.prompting import PromptStyle
from launcher.evaluate.questions import EvalQuestion
from launcher.models.weight_files import weight_files

TUNED = "tuned"
_TRAINING = "training"
# A command that was killed, or whose machine is gone, counts this file up no more.
ALIVE = "alive"
_ALIVE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Weights:
    """A model that answers: its folder, the digest of its weights, and the tokens at which it stops."""

    folder: str
    digest: str
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class EvaluationTask:
    """task.json: everything that the processes of an evaluation need, on any node.

    `base` is None for a run that began with random weights. `code` is the folder of the model's own Python files. `shots` are the
    numbers of examples that fit every prompt. `left_out` says which documents are not asked, by set.
    """

    run_name: str
    step: int
    config: dict[str, Any]
    sets: tuple[str, ...]
    base: Weights | None
    tuned: Weights
    tokenizer: str
    code: str | None
    context: int
    shots: tuple[int, ...]
    num_examples: int
    left_out: dict[str, tuple[str, ...]]

    @property
    def settings(self) -> RunConfig:
        return RunConfig.model_validate(self.config)


@dataclass(frozen=True)
class StyleScore:
    """The mean score of a way to ask the base model, on training rows."""

    style: str
    score: float


@dataclass(frozen=True)
class SideAnswers:
    """The answers of one side: `name` as in the verdict, the file beside answers.json, and how the prompts were written."""

    name: str
    file: str
    style: str
    prompt_tokens: int = 0


@dataclass(frozen=True)
class EvaluationAnswers:
    """answers.json: all answers are there. `sets` has the sides of each set, `selection` the ways to ask that were compared."""

    sets: dict[str, tuple[SideAnswers, ...]]
    selection: tuple[StyleScore, ...] = ()
    engine: str = ""
    dtype: str = ""
    seconds: float = 0.0
    num_processes: int = 1


@dataclass(frozen=True)
class EvaluationFolder:
    """The paths of one evaluation: runs/NAME/evaluations/step-XXXXXXXX."""

    root: Path

    @classmethod
    def of(cls, run: Path, step: int) -> EvaluationFolder:
        return cls(run / "evaluations" / f"step-{step:08d}")

    @property
    def task(self) -> Path:
        return self.root / "task.json"

    @property
    def answers(self) -> Path:
        return self.root / "answers.json"

    @property
    def weights(self) -> Path:
        """The export of a step that the run's own export does not have; removed with the end of the evaluation."""
        return self.root / "weights"

    def questions(self, name: str = _TRAINING) -> Path:
        return self.root / f"{name}.questions.jsonl"

    def set_folder(self, name: str) -> Path:
        return self.root / name

    def read_task(self) -> EvaluationTask:
        return json_records.read(EvaluationTask, self.task, "start the evaluation again")

    def read_answers(self) -> EvaluationAnswers:
        return json_records.read(EvaluationAnswers, self.answers, "start the evaluation again: answers that exist are used")

    def write_questions(self, questions: Sequence[EvalQuestion], name: str = _TRAINING) -> None:
        lines = "".join(json.dumps(question.to_json()) + "\n" for question in questions)
        atomic_files.write_bytes(self.questions(name), lines.encode(), mode=0o600)

    def read_questions(self, name: str = _TRAINING) -> list[EvalQuestion]:
        lines = self.questions(name).read_text(encoding="utf-8").splitlines()
        return [EvalQuestion.from_json(json.loads(line)) for line in lines]


@dataclass
class CommandWatch:
    """Ends a process of an evaluation whose command has ended without saying so."""

    folder: Path
    _content: bytes = b""
    _changed_at: float = field(default_factory=time.monotonic)

    def require_alive(self) -> None:
        """Raises: RunError where the command has given no sign of life for two minutes."""
        now = time.monotonic()
        try:
            content = (self.folder / ALIVE).read_bytes()
        except OSError:
            content = self._content
        if content != self._content:
            self._content, self._changed_at = content, now
        elif now - self._changed_at > _ALIVE_TIMEOUT_S:
            raise RunError(
                "the command of this evaluation has ended", where=str(self.folder), remedy="start it again: it continues"
            )


def describe(style: PromptStyle | None) -> str:
    """Return how prompts were written; None for those of training."""
    return "as in training" if style is None else str(style)


def digest_weights(folder: Path) -> str:
    """Return a digest of the weight files in a folder, whatever its path."""
    return "-".join(atomic_files.digest_file(file).xxh3_128 for file in weight_files(folder, with_pickled=True))
