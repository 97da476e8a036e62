"""Finds evaluation prompts that are also in the training data: equal except for case, white space and punctuation, or similar.

The data build compares the held-out documents with the training documents; the sets of eval.sets are compared only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from launcher.data.checks import minhash
from launcher.data.sources.origins import DocumentOrigins
from launcher.data.tokenization.encoder import Encoder
from launcher.errors import DataError
from launcher.evaluate.questions import EvalQuestion, QuestionSet, read_documents, split_question
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.progress import Advance

# Signatures of as many documents take about half a minute.
MAX_DOCUMENTS = 300_000
_COMPARED_AT_ONCE = 1024


@dataclass(frozen=True)
class TrainingCopy:
    """A prompt that is also in the training data: its rows as file and line, and the similarity of the prompts, 1 if equal."""

    question: str
    training: str
    similarity: float

    def __str__(self) -> str:
        alike = "the same prompt as" if self.similarity == 1 else f"{self.similarity:.0%} the same as"
        return f"{self.question}: {alike} {self.training}"


@dataclass(frozen=True)
class TrainingOverlap:
    """The prompts of each set that are also in the training data. `gap` says what was not compared, empty if everything was."""

    copies: dict[str, tuple[TrainingCopy, ...]]
    gap: str = ""


def find_training_copies(
    plan: LaunchPlan, encoder: Encoder, sets: Sequence[QuestionSet], advance: Advance, max_documents: int = MAX_DOCUMENTS
) -> TrainingOverlap:
    """Compare the prompts of each set with the first `max_documents` of the sources.

    Sources that no longer exist, or cannot be read, are a gap: an evaluation can do without this comparison.
    """
    if plan.data is None:
        return TrainingOverlap({})
    data, gap = plan.config.data, ""
    questions = [question for one in sets for question in one.questions]
    copies: dict[int, TrainingCopy] = {}
    texts = [_prompt_text(question) for question in questions]
    without_equal: dict[bytes, list[int]] = {}
    for i, text in enumerate(texts):
        without_equal.setdefault(text, []).append(i)
    signed, slots = _sign(texts)
    try:
        origins = DocumentOrigins.open(plan.data.cache_dir)
        trained = {origins.where(document) for document in range(len(origins.values))} - {one.where for one in questions}
        documents = read_documents(data.sources, encoder, data.checks)
        first_documents = islice(documents, max_documents)
        while batch := list(islice(first_documents, _COMPARED_AT_ONCE)):
            asked = [split_question(document, data.system) for document in batch if document.where in trained]
            rows = [(row.where, _prompt_text(row)) for row in asked if row is not None]
            for where, text in rows:
                for i in without_equal.pop(text, ()):
                    copies[i] = TrainingCopy(questions[i].where, where, 1.0)
            signed_rows, row_slots = _sign([text for _, text in rows])

            def add(own: np.ndarray, other: np.ndarray, similarity: np.ndarray) -> None:
                for at, number, share in zip(own.tolist(), other.tolist(), similarity.tolist(), strict=True):
                    # An estimate of 1 means that the texts differ little.
                    i, share = signed[at], min(round(share, 2), 0.99)
                    if i not in copies or copies[i].similarity < share:
                        copies[i] = TrainingCopy(questions[i].where, rows[signed_rows[number]][0], share)  # noqa: B023

            minhash.find_near_pairs_between(slots, row_slots, minhash.REACH, add)
            advance(len(batch))
        if next(documents, None) is not None:
            gap = f"prompts were compared with the first {max_documents:,} training documents only"
    except DataError as error:
        problem = error.problems[0]
        parts = ": ".join(filter(None, (problem.message, problem.where, problem.value)))
        return TrainingOverlap({}, f"prompts were not compared with the training documents: {parts}")
    names = [one.name for one in sets for _ in one.questions]
    by_set = {one.name: tuple(copy for i, copy in sorted(copies.items()) if names[i] == one.name) for one in sets}
    return TrainingOverlap(by_set, gap)


def _sign(texts: Sequence[bytes]) -> tuple[list[int], np.ndarray]:
    """Return the indices of the texts that are long enough for a signature, and their signatures, uint16 [texts, slots]."""
    rows = {i: row for i, row in enumerate(minhash.compute_signatures(texts)) if row is not None}
    return [*rows], np.asarray([*rows.values()], np.uint16).reshape(-1, minhash.NUM_SLOTS)


def _prompt_text(question: EvalQuestion) -> bytes:
    return minhash.make_comparable(minhash.normalize(question.prompt))


def describe_copies(num_prompts: int, copies: Sequence[TrainingCopy]) -> str:
    """Return one sentence on how many prompts are also in the training data; empty if none are."""
    if not copies:
        return ""
    share = f"{len(copies):,} of the {num_prompts:,} prompts"
    return f"{share} are in the training data, or nearly so: the answers may have been memorized."
