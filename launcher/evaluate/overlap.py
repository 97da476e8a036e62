"""Finds evaluation prompts that are also in the training data: equal except for case, white space and punctuation, or similar.

The data build compares the held-out documents with the training documents; the sets of eval.sets are compared only here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from launcher.data.checks import overlap
from launcher.data.sources.documents import Document
from launcher.data.split import Split
from launcher.data.tokenization.encoder import Encoder
from launcher.errors import DataError
from launcher.evaluate.questions import EvalQuestion, QuestionSet, digest_tokens, read_documents, render, split_question
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.progress import Advance

# Signatures of as many documents take about half a minute.
MAX_DOCUMENTS = 300_000
_COMPARED_AT_ONCE = 1024
# Maximum number of documents with an equal or similar prompt per question that are looked up in the training data, first ones
# first. If all rows of a data set have the same prompt, each question would otherwise match all documents.
MAX_CANDIDATES = 32
_EXACT = 1.0


@dataclass(frozen=True)
class TrainingCopy:
    """A prompt that is also in the training data: its rows as file and line, and the similarity of the prompts, 1 if equal."""

    question: str
    training: str
    similarity: float

    def __str__(self) -> str:
        alike = "the same prompt as" if self.similarity == _EXACT else f"{self.similarity:.0%} the same as"
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
    try:
        return _compare(plan, encoder, sets, advance, max_documents)
    except DataError as error:
        problem = error.problems[0]
        parts = ": ".join(filter(None, (problem.message, problem.where, problem.value)))
        return TrainingOverlap({}, f"prompts were not compared with the training documents: {parts}")


def _compare(
    plan: LaunchPlan, encoder: Encoder, sets: Sequence[QuestionSet], advance: Advance, max_documents: int
) -> TrainingOverlap:
    data = plan.config.data
    questions = [question for one in sets for question in one.questions]
    prompts = _Prompts(questions)
    candidates: list[tuple[int, float, Document]] = []
    documents = read_documents(data.sources, encoder, data.checks)
    first_documents = islice(documents, max_documents)
    while batch := list(islice(first_documents, _COMPARED_AT_ONCE)):
        candidates += [(i, similarity, batch[at]) for i, similarity, at in prompts.find(batch, data.system)]
        advance(len(batch))
    gap = ""
    if next(documents, None) is not None:
        gap = f"prompts were compared with the first {max_documents:,} training documents only"
    copies = _trained_copies(plan, encoder, questions, candidates)
    names = [one.name for one in sets for _ in one.questions]
    by_set = {one.name: tuple(copy for i, copy in sorted(copies.items()) if names[i] == one.name) for one in sets}
    return TrainingOverlap(by_set, gap)


class _Prompts:
    """The prompts of questions, for comparison with the prompts of documents."""

    def __init__(self, questions: Sequence[EvalQuestion]) -> None:
        texts = [_prompt_text(question) for question in questions]
        self._num_equal, self._num_similar = Counter[bytes](), Counter[int]()
        self._by_text: dict[bytes, list[int]] = {}
        for i, text in enumerate(texts):
            self._by_text.setdefault(text, []).append(i)
        rows = overlap.compute_signatures(texts)
        self._signed = [i for i, row in enumerate(rows) if row is not None]
        self._slots = np.stack([row for row in rows if row is not None]) if self._signed else None

    def find(self, documents: Sequence[Document], system: str | None) -> Iterator[tuple[int, float, int]]:
        """Yield the question, the similarity and the index of each document with an equal or a similar prompt.

        For each question, yields the first MAX_CANDIDATES documents with an equal prompt, and as many with a similar one.
        """
        asked = [(at, question) for at, one in enumerate(documents) if (question := split_question(one, system)) is not None]
        texts = [_prompt_text(question) for _, question in asked]
        for (at, _), text in zip(asked, texts, strict=True):
            if text in self._by_text and self._num_equal[text] < MAX_CANDIDATES:
                self._num_equal[text] += 1
                for i in self._by_text[text]:
                    yield i, _EXACT, at
        rows = overlap.compute_signatures(texts)
        signed = [number for number, row in enumerate(rows) if row is not None]
        if self._slots is None or not signed:
            return
        similar: list[tuple[int, float, int]] = []

        def add(own: np.ndarray, other: np.ndarray, similarity: np.ndarray) -> None:
            for row, number, share in zip(own.tolist(), other.tolist(), similarity.tolist(), strict=True):
                i = self._signed[row]
                if self._num_similar[i] < MAX_CANDIDATES:
                    self._num_similar[i] += 1
                    # An estimate of 1 means that the texts differ little.
                    similar.append((i, min(share, 0.99), asked[signed[number]][0]))

        slots = np.stack([row for row in rows if row is not None])
        overlap.find_near_pairs_between(self._slots, slots, overlap.REACH, add)
        yield from similar


def _trained_copies(
    plan: LaunchPlan, encoder: Encoder, questions: Sequence[EvalQuestion], candidates: Sequence[tuple[int, float, Document]]
) -> dict[int, TrainingCopy]:
    """Return the most similar document for each question, among the candidates that are in the training split."""
    if not candidates or plan.data is None:
        return {}
    data = plan.config.data
    rendered = [(one, text) for one in candidates if (text := render(one[2], encoder, data.checks)) is not None]
    encoded = [tokens.ids[: data.max_length] for tokens in encoder.encode([text for _, text in rendered])]
    trained = _find_documents(Split.open(plan.data), encoded)
    copies: dict[int, TrainingCopy] = {}
    for ((i, similarity, document), _), ids in zip(rendered, encoded, strict=True):
        if digest_tokens(ids) in trained and (i not in copies or copies[i].similarity < similarity):
            copies[i] = TrainingCopy(questions[i].where, document.where, round(similarity, 2))
    return copies


def _find_documents(split: Split, wanted: Sequence[np.ndarray]) -> set[bytes]:
    """Return the digests of those token sequences that are documents of the split; reads only documents of matching lengths."""
    digests = {digest_tokens(ids) for ids in wanted}
    present: set[bytes] = set()
    for i in np.flatnonzero(np.isin(np.diff(split.docs), [len(ids) for ids in wanted])):
        if len(present) == len(digests):
            break
        digest = digest_tokens(np.asarray(split.tokens[split.docs[i] : split.docs[i + 1]]))
        if digest in digests:
            present.add(digest)
    return present


def _prompt_text(question: EvalQuestion) -> bytes:
    return overlap.make_comparable(overlap.normalize(question.prompt))


def describe_copies(num_prompts: int, copies: Sequence[TrainingCopy]) -> str:
    """Return one sentence on how many prompts are also in the training data; empty if none are."""
    if not copies:
        return ""
    share = f"{len(copies):,} of the {num_prompts:,} prompts"
    return f"{share} are in the training data, or nearly so: the answers may have been memorized."
