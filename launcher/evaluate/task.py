"""One evaluation in its folder: which questions go to which weights, and the results. Without torch."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from launcher import atomic_files, json_records
from launcher.checkpoint.generation import read_stop_ids
from launcher.config.schema import RunConfig
from launcher.errors import RunError
from launcher.evaluate.overlap import TrainingCopy
from launcher.evaluate.prompting import PromptStyle
from launcher.evaluate.questions import TRAINING, EvalQuestion
from launcher.models.weight_files import weight_files
from launcher.plan.run_dir import RunDir
from launcher.tracking.verdicts import BENCHMARKS

TUNED = "tuned"
# The command counts up in this file; if it was killed or its machine is gone, the count stops.
ALIVE = "alive"
_ALIVE_TIMEOUT_S, _ALIVE_POLL_S, _END_S = 120.0, 5.0, 60.0
# Keys of config.json about the program that wrote it.
_NOT_ABOUT_THE_MODEL = ("_name_or_path", "transformers_version")


@dataclass(frozen=True)
class Weights:
    """A model that answers: its folder, the digest of its weights, the tokens at which it stops, and the digest of its config."""

    folder: str
    digest: str
    stop_ids: tuple[int, ...]
    config: str = ""

    @classmethod
    def of(cls, folder: Path, turn_end_ids: Sequence[int] = (), digest: str | None = None) -> Weights:
        """Return the weights in a folder; answers also stop at `turn_end_ids`. `digest` is the weights' digest, if known."""
        stop_ids = tuple(dict.fromkeys((*read_stop_ids(folder), *turn_end_ids)))
        return cls(str(folder), digest or digest_weights(folder), stop_ids, _digest_config(folder))


@dataclass(frozen=True)
class EvaluatedExport:
    """weights.json: the checkpoint in the folder of weights, by the digest of its manifest, and the dtype."""

    checkpoint: str
    dtype: str
    digest: str


@dataclass(frozen=True)
class EvaluationTask:
    """task.json: everything that the processes of an evaluation need, on any node.

    `base` is None for a run that started from random weights. `code` is the folder of the model's own Python files. `shots` are
    the numbers of examples that fit every prompt. `left_out` lists, by set, which documents are not used as questions.
    `training_copies` lists which prompts are also in the training data. `overlap_gap` says which training documents were not
    compared, empty if all were.
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
    training_copies: dict[str, tuple[TrainingCopy, ...]] = field(default_factory=dict)
    overlap_gap: str = ""

    @property
    def settings(self) -> RunConfig:
        return RunConfig.model_validate(self.config)


@dataclass(frozen=True)
class StyleScore:
    """The mean score of one style of prompting the base model, on training rows."""

    style: str
    score: float


@dataclass(frozen=True)
class SideAnswers:
    """The answers of one side: `name` as in the verdict, the file next to answers.json, and how the prompts were written."""

    name: str
    file: str
    style: str
    prompt_tokens: int = 0


@dataclass(frozen=True)
class EvaluationAnswers:
    """answers.json: written when all answers exist. `sets` has the sides of each set, `selection` the compared styles."""

    sets: dict[str, tuple[SideAnswers, ...]]
    selection: tuple[StyleScore, ...] = ()
    engine: str = ""
    dtype: str = ""
    seconds: float = 0.0
    num_processes: int = 1


@dataclass(frozen=True)
class ProcessFacts:
    """Facts that must be equal in all processes of an evaluation; otherwise their answers would not be comparable."""

    device: str
    dtype: str
    engine: str
    transformers: str
    num_processes: int


@dataclass(frozen=True)
class EvaluationFolder:
    """The paths of one evaluation: runs/NAME/evaluations/step-00000100."""

    root: Path

    @classmethod
    def of(cls, run: Path, step: int) -> EvaluationFolder:
        return cls(RunDir(run).evaluation(step))

    @property
    def task(self) -> Path:
        return self.root / "task.json"

    @property
    def answers(self) -> Path:
        return self.root / "answers.json"

    @property
    def lock(self) -> Path:
        """The lock that the command working on the evaluation holds."""
        return self.root / ".lock"

    @property
    def weights(self) -> Path:
        """The export of a step that the run's own export does not contain; removed at the end of the evaluation."""
        return self.root / "weights"

    @property
    def weights_record(self) -> Path:
        """Written when the export is complete, so that an interrupted evaluation reuses it."""
        return self.root / "weights.json"

    @property
    def benchmarks(self) -> Path:
        """Scores on the tasks of lm-evaluation-harness."""
        return self.root / BENCHMARKS

    @property
    def processes(self) -> Path:
        """One record per answering process; emptied when a command starts."""
        return self.root / ".processes"

    def write_facts(self, rank: int, facts: ProcessFacts) -> None:
        self.processes.mkdir(mode=0o700, exist_ok=True)
        json_records.write(self.processes / f"{rank:05d}.json", facts)

    def require_alike(self, rank: int, facts: ProcessFacts) -> None:
        """Compare a process with the first one, and the first process with all that have started.

        Raises:
            RunError: if they differ, because each would wait for answers that no other process generates.
        """
        files = sorted(self.processes.glob("*.json")) if rank == 0 else [self.processes / f"{0:05d}.json"]
        for file in files:
            other = json_records.read_if_present(ProcessFacts, file)
            if other is not None and other != facts:
                raise RunError(
                    f"process {rank or int(file.stem)} of the evaluation differs from the first one",
                    where=str(self.root),
                    value=f"{facts} and {other}",
                    remedy="install the same packages on all nodes, and check their GPUs with: python -m launcher doctor",
                )

    def questions(self, name: str = TRAINING) -> Path:
        return self.root / f"{name}.questions.jsonl"

    def set_folder(self, name: str) -> Path:
        return self.root / name

    def read_task(self) -> EvaluationTask:
        return json_records.read(EvaluationTask, self.task, "start the evaluation again")

    def read_answers(self) -> EvaluationAnswers:
        return json_records.read(EvaluationAnswers, self.answers, "start the evaluation again: existing answers are used")

    def write_questions(self, questions: Sequence[EvalQuestion], name: str = TRAINING) -> None:
        lines = "".join(json.dumps(question.to_json()) + "\n" for question in questions)
        atomic_files.write_bytes(self.questions(name), lines.encode(), mode=0o600)

    def read_questions(self, name: str = TRAINING) -> list[EvalQuestion]:
        lines = self.questions(name).read_text(encoding="utf-8").splitlines()
        return [EvalQuestion.from_json(json.loads(line)) for line in lines]


def read_exported(folder: EvaluationFolder, checkpoint: str) -> EvaluatedExport | None:
    """Return the record of the weights in an evaluation's folder; None if there is none, or if it is for another checkpoint.

    `checkpoint` is the digest of the step's checkpoint, empty if that was removed: the earlier export then counts as its weights.
    """
    existing = json_records.read_if_present(EvaluatedExport, folder.weights_record)
    if existing is None or not folder.weights.is_dir() or checkpoint not in ("", existing.checkpoint):
        return None
    return existing


class CommandWatch:
    """Detects that the command of an evaluation has ended without notice, and then ends this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._content, self._changed_at = self._read(), time.monotonic()

    def has_ended(self) -> bool:
        """Return whether the command has shown no sign of life for two minutes."""
        content, now = self._read(), time.monotonic()
        if content not in (b"", self._content):
            self._content, self._changed_at = content, now
        return now - self._changed_at > _ALIVE_TIMEOUT_S

    def start(self, poll_s: float = _ALIVE_POLL_S) -> None:
        """Watch in a thread, because loading a model or a server request takes longer than the timeout for the command."""
        threading.Thread(target=self._end_process, args=(poll_s,), name="command-watch", daemon=True).start()

    def _end_process(self, poll_s: float) -> None:
        while not self.has_ended():
            time.sleep(poll_s)
        print(f"the command of this evaluation has ended: {self._folder}; start it again, it continues", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_END_S)
        os._exit(1)

    def _read(self) -> bytes:
        try:
            return (self._folder / ALIVE).read_bytes()
        except OSError:
            return b""


def describe(style: PromptStyle | None) -> str:
    """Return how prompts were written; None means as in training."""
    return "as in training" if style is None else str(style)


def _digest_config(folder: Path) -> str:
    """Return a digest of the parts of config.json that describe the model."""
    config = json.loads((folder / "config.json").read_bytes())
    said = {key: value for key, value in config.items() if key not in _NOT_ABOUT_THE_MODEL}
    return xxhash.xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())


def digest_weights(folder: Path) -> str:
    """Return a digest of the weight files in a folder, independent of its path."""
    return "-".join(atomic_files.digest_file(file).xxh3_128 for file in weight_files(folder, with_pickled=True))
