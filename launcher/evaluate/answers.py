"""Answers on disk: committed as they arrive, complete once their record exists. Without torch.

    <run>/evaluations/step-00000100/<set>/
      tuned.jsonl               one answer per line, by the index of its prompt
      tuned.json                written last: the key of the answers, and the digest of tuned.jsonl
      .tuned-<digest>/          answers so far, one file per generating process; removed at the end

A side is generated again if any part of its key has changed: weights, prompts, engine, types, lengths.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from launcher import atomic_files, json_records
from launcher.errors import RunError
from launcher.evaluate.metrics import GeneratedAnswer

_NUM_READS = 3


@dataclass(frozen=True)
class AnswerKey:
    """Everything that answers depend on. `weights`, `config` and `prompts` are digests; `style` is how the prompts were written.

    `config` is the digest of the model's config.json. `stop_ids` are the tokens that end an answer. `engine` includes its version
    unless the engine is transformers.
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
    transformers: str

    def digest(self) -> str:
        return xxhash.xxh3_128_hexdigest(json.dumps(asdict(self), sort_keys=True).encode())


@dataclass(frozen=True)
class GeneratedIds:
    """An engine's answer: its token ids without those that end it, its text, and whether it ended within the maximum length."""

    ids: tuple[int, ...]
    text: str
    is_stopped: bool


@dataclass(frozen=True)
class StoredAnswer:
    """One line of a side: the index of the prompt, and the answer. `is_stopped` is False if the maximum length cut it off.

    `gpu_s` is its share of the GPU time of its batch, 0 on CPUs and with engines that divide a model over GPUs.
    """

    index: int
    text: str
    is_stopped: bool
    num_tokens: int
    gpu_s: float = 0.0

    def as_generated(self) -> GeneratedAnswer:
        """Return the answer in the form that metrics take."""
        return GeneratedAnswer(self.text, self.is_stopped, self.num_tokens)


@dataclass(frozen=True)
class SideRecord:
    """NAME.json next to NAME.jsonl."""

    key: AnswerKey
    xxh3_128: str


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
                return self._read_parts()
            except FileNotFoundError:
                # The first process has meanwhile merged the parts.
                continue
        return {}

    def _read_parts(self) -> dict[int, StoredAnswer]:
        answers: dict[int, StoredAnswer] = {}
        for file in sorted(self._partial.glob("*.jsonl")):
            for line in file.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    continue
                try:
                    answer = StoredAnswer(**json.loads(line))
                except (ValueError, TypeError):
                    continue
                answers.setdefault(answer.index, answer)
        return answers

    def append(self, writer: str, answers: Sequence[StoredAnswer]) -> None:
        """Append answers durably to the file of the process `writer`."""
        self._partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._partial / f"{writer}.jsonl"
        content = "".join(json.dumps(asdict(answer)) + "\n" for answer in answers).encode()
        if path.is_file() and (before := path.read_bytes()) and not before.endswith(b"\n"):
            content = b"\n" + content
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def complete(self) -> list[StoredAnswer]:
        """Write all answers into one file and remove the parts; return the answers in the order of the prompts.

        Raises:
            RunError: if some are missing.
        """
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
