"""One evaluation in its folder: which questions go to which weights, the answers, and the results. Without torch.

    <run>/evaluations/step-00000100/<set>/
      tuned.jsonl               one answer per line, by the index of its prompt
      tuned.json                written last: the key of the answers, and the digest of tuned.jsonl
      .tuned-<digest>/          answers so far, one file per generating process; removed at the end

Answers are committed as they arrive, and complete once their record exists. A side is generated again if any part of its key has
changed: weights, prompts, engine, types, lengths.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from launcher.config.schema import RunConfig
from launcher.errors import RunError
from launcher.evaluate.metrics import GeneratedAnswer
from launcher.evaluate.questions import TRAINING, EvalQuestion, TrainingCopy
from launcher.models.found_model import read_stop_ids
from launcher.models.weight_files import weight_files
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records

_NOT_ABOUT_THE_MODEL = ("_name_or_path", "transformers_version")
# Parts of a side may be merged while they are read.
_NUM_READS = 3


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

    def questions(self, name: str = TRAINING) -> Path:
        return self.root / f"{name}.questions.jsonl"

    def read_task(self) -> EvaluationTask:
        return json_records.read(EvaluationTask, self.task, "start the evaluation again")

    def read_answers(self) -> EvaluationAnswers:
        return json_records.read(EvaluationAnswers, self.answers, "start the evaluation again: existing answers are used")

    def write_questions(self, questions: Sequence[EvalQuestion], name: str = TRAINING) -> None:
        lines = "".join(json.dumps(json_records.encode(question)) + "\n" for question in questions)
        atomic_files.write_bytes(self.questions(name), lines.encode(), mode=0o600)

    def read_questions(self, name: str = TRAINING) -> list[EvalQuestion]:
        path = self.questions(name)
        return [json_records.loads(EvalQuestion, line, str(path)) for line in path.read_bytes().splitlines()]


@dataclass(frozen=True)
class EvaluationTask:
    """task.json: everything that the processes of an evaluation need, on any node.

    `base` is None for a run that started from random weights. `code` is the folder of the model's own Python files. `shots` are
    the numbers of examples that fit every prompt. `left_out` lists, by set, which documents are not used as questions.
    `training_copies` lists which prompts are also in the training data. `overlap_gap` says which training documents were not
    compared, empty if all were. `engine` is transformers or vllm, with its version.
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
    engine: str = ""

    @property
    def settings(self) -> RunConfig:
        return RunConfig.model_validate(self.config)


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
        # Without what config.json says about the program that wrote it.
        config = json.loads((folder / "config.json").read_bytes())
        config = {key: value for key, value in config.items() if key not in _NOT_ABOUT_THE_MODEL}
        config_digest = xxhash.xxh3_128_hexdigest(json.dumps(config, sort_keys=True).encode())
        return cls(str(folder), digest or digest_weights(folder), stop_ids, config_digest)


@dataclass(frozen=True)
class EvaluatedExport:
    """weights.json: the checkpoint in the folder of weights, by the digest of its manifest, and the dtype."""

    checkpoint: str
    dtype: str
    digest: str


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
class SideAnswers:
    """The answers of one side: `name` as in the verdict, the file next to answers.json, and how the prompts were written."""

    name: str
    file: str
    style: str
    prompt_tokens: int = 0


@dataclass(frozen=True)
class StyleScore:
    """The mean score of one style of prompting the base model, on training rows."""

    style: str
    score: float


def read_exported(folder: EvaluationFolder, checkpoint: str) -> EvaluatedExport | None:
    """Return the record of the weights in an evaluation's folder; None if there is none, or if it is for another checkpoint.

    `checkpoint` is the digest of the step's checkpoint, empty if that was removed: the earlier export then counts as its weights.
    """
    existing = json_records.read_if_present(EvaluatedExport, folder.weights_record)
    if existing is None or not folder.weights.is_dir() or checkpoint not in ("", existing.checkpoint):
        return None
    return existing


def digest_weights(folder: Path) -> str:
    """Return a digest of the weight files in a folder, independent of its path."""
    return "-".join(atomic_files.digest_file(file).xxh3_128 for file in weight_files(folder, with_pickled=True))


class AnswerStore:
    """The answers of one side. Several processes may write at once, because each has its own file."""

    def __init__(self, folder: Path, name: str, key: AnswerKey) -> None:
        self.key = key
        self.path = folder / f"{name}.jsonl"
        self._record = folder / f"{name}.json"
        self._partial = folder / f".{name}-{key.digest()[:16]}"

    def read_complete(self) -> list[StoredAnswer] | None:
        """Return all answers in the order of the prompts; None if they are incomplete, damaged, or have another key."""
        try:
            record = json_records.read_if_present(SideRecord, self._record)
            if record is None or record.key != self.key:
                return None
            content = self.path.read_bytes()
            if xxhash.xxh3_128_hexdigest(content) != record.xxh3_128:
                return None
            return [StoredAnswer(**json.loads(line)) for line in content.splitlines()]
        except (OSError, RunError, ValueError, TypeError):
            return None

    def read(self) -> dict[int, StoredAnswer]:
        """Return the existing answers, by prompt. A line that a killed process left unfinished is skipped."""
        for _ in range(_NUM_READS):
            if (complete := self.read_complete()) is not None:
                return {answer.index: answer for answer in complete}
            try:
                parts = [file.read_bytes() for file in sorted(self._partial.glob("*.jsonl"))]
            except FileNotFoundError:
                # The first process has meanwhile merged the parts.
                continue
            answers: dict[int, StoredAnswer] = {}
            for line in (line for part in parts for line in part.splitlines(keepends=True) if line.endswith(b"\n")):
                with suppress(ValueError, TypeError):
                    answer = StoredAnswer(**json.loads(line))
                    answers.setdefault(answer.index, answer)
            return answers
        return {}

    def append(self, writer: str, answers: Sequence[StoredAnswer]) -> None:
        """Append answers durably to the file of the process `writer`."""
        self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers).encode()
        atomic_files.append_lines(self._partial / f"{writer}.jsonl", content, mode=0o600)

    def complete(self) -> list[StoredAnswer]:
        """Write all answers into one file and remove the parts; return the answers in the order of the prompts."""
        if (existing := self.read_complete()) is None:
            answers = self.read()
            if missing := self.key.num_prompts - len(answers):
                message = f"{missing} of {self.key.num_prompts} answers are missing"
                raise RunError(message, where=str(self.path), remedy="start the same evaluation again: it continues")
            existing = [answers[index] for index in sorted(answers)]
            content = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in existing).encode()
            self._record.unlink(missing_ok=True)
            atomic_files.write_bytes(self.path, content, mode=0o600)
            json_records.write(self._record, SideRecord(self.key, xxhash.xxh3_128_hexdigest(content)))
        # Also remove parts of this side that belong to other weights or prompts.
        for folder in self.path.parent.glob(f".{self.path.stem}-*"):
            shutil.rmtree(folder, ignore_errors=True)
        return existing


@dataclass(frozen=True)
class AnswerKey:
    """Everything that answers depend on. `weights`, `config` and `prompts` are digests; `style` is how the prompts were written.

    `config` is the digest of the model's config.json. `stop_ids` are the tokens that end an answer.
    """

    weights: str
    config: str
    stop_ids: tuple[int, ...]
    prompts: str
    num_prompts: int
    style: str
    engine: str
    dtype: str
    device: str
    max_new_tokens: int

    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())


@dataclass(frozen=True)
class SideRecord:
    """NAME.json next to NAME.jsonl."""

    key: AnswerKey
    xxh3_128: str


@dataclass(frozen=True)
class StoredAnswer(GeneratedAnswer):
    """One line of a side: the answer, and the index of its prompt.

    `gpu_s` is its share of the GPU time of its batch, 0 on CPUs and with engines that divide a model over GPUs.
    """

    index: int
    gpu_s: float = 0.0


def reuse_base_answers(folder: Path, others: Sequence[Path]) -> None:
    """Copy the base model's answers from the folders of other steps, so that they are not generated again.

    Like any answers, they are used only if they belong to the same weights, prompts and settings.
    """
    for other in others:
        # Answers on training rows stay in parts, in a folder whose name contains their key.
        parts = [*other.glob("selection/.*/*.jsonl")]
        for record in other.glob("*/base-*.json"):
            if not list((folder / record.relative_to(other)).parent.glob(f".{record.stem}-*")):
                # The record is written last; without it, the answers are incomplete.
                parts += [record.with_suffix(".jsonl"), record]
        for part in parts:
            target = folder / part.relative_to(other)
            with suppress(FileNotFoundError):
                if not target.exists():
                    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    atomic_files.write_bytes(target, part.read_bytes(), mode=0o600)


def digest_prompts(prompts: Sequence[Sequence[int]], stop_strings: Sequence[str]) -> str:
    """Return a digest of the token ids and of the texts that end an answer."""
    return xxhash.xxh3_128_hexdigest(json.dumps([list(map(list, prompts)), list(stop_strings)]).encode())
