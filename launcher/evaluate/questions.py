"""The questions of an evaluation: held-out documents split into a prompt and a reference answer, and training rows as examples.

The caches of a run hold only tokens. A document is found in its source by its tokens, so the questions are exactly the documents
of the split, however they were selected. Prompts that are also in the training data are found too: the data build compares only
the held-out documents with the training documents, not the sets of eval.sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import xxhash

from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.config.sections.evaluation import HELD_OUT
from launcher.data.checks import overlap
from launcher.data.sources import reading
from launcher.data.sources.documents import Document
from launcher.data.sources.reading import find_path_problem, list_inputs, make_set_data
from launcher.data.split import Split
from launcher.data.tokenization.chat_template import with_system
from launcher.data.tokenization.encoder import Encoder, RenderedDocument
from launcher.errors import DataError, Problem
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.progress import Advance

TRAINING = "training"
"""Name of the questions from training documents: examples for the base model, and rows for choosing its prompt."""
# Extra documents to read, because those without a prompt are replaced by others.
_SPARE = 1.5
_ENCODED_AT_ONCE = 256
# Reading as many documents takes seconds.
MAX_DOCUMENTS = 300_000
# The most documents with one prompt that are looked up in the training data: all rows of a data set may have the same prompt.
MAX_CANDIDATES = 32


@dataclass(frozen=True)
class EvalQuestion:
    """A prompt and its reference answer; `document` is a chat without its last answer, or a prompt without text."""

    where: str
    document: Document
    reference: str

    @property
    def text(self) -> str:
        """The question itself: the last message, or the prompt."""
        document = self.document
        return document.messages[-1].content if document.messages else document.prompt

    @property
    def prompt(self) -> str:
        """The whole question: the messages without system messages, or the prompt."""
        messages = self.document.messages
        return "\n".join(one.content for one in messages if one.role != "system") if messages else self.document.prompt


@dataclass(frozen=True)
class QuestionSet:
    """The questions of one set, in a fixed random order. `num_documents` is the size of the set; `num_without_answer` of the
    inspected documents have no prompt with a text answer."""

    name: str
    questions: tuple[EvalQuestion, ...]
    num_documents: int
    num_without_answer: int


def split_question(document: Document, system: str | None) -> EvalQuestion | None:
    """Return the question in a document: a chat up to its last answer, or a prompt; None if it has none."""
    if not document.messages:
        is_question = document.prompt.strip() and document.text.strip()
        return EvalQuestion(document.where, replace(document, text=""), document.text) if is_question else None
    chat = with_system(document, system)
    last = max((i for i, message in enumerate(chat.messages) if message.role == "assistant"), default=0)
    answer = chat.messages[last].content
    if last == 0 or not answer.strip() or chat.messages[last].tool_calls:
        return None
    return EvalQuestion(chat.where, replace(chat, messages=chat.messages[:last]), answer)


def read_set(plan: LaunchPlan, name: str, encoder: Encoder, max_questions: int, advance: Advance) -> QuestionSet:
    """Return questions of the run's held-out documents, of one of eval.sets, or of its training documents, in a random order."""
    data = plan.config.data
    if name in (HELD_OUT, TRAINING):
        if plan.data is None:
            raise DataError(Problem("the run has no data cache", where=plan.run_dir, remedy="evaluate a run that was trained"))
        split = Split.open(plan.data, held_out=name == HELD_OUT)
    else:
        data = make_set_data(next(one for one in plan.config.eval.all_sets if one.name == name), data)
        split = Split.open(plan.eval_sets[name])
    order = np.random.default_rng(plan.config.run.seed).permutation(split.num_docs)
    chosen = order[: int(max_questions * _SPARE) + 16]
    keys = [digest_tokens(np.asarray(split.tokens[split.docs[i] : split.docs[i + 1]])) for i in chosen]
    documents = _find_by_tokens(data, encoder, set(keys), advance)
    if len(documents) < len({*keys}) and data.long_documents != "split":
        message = f"the data files no longer contain the documents of {name}: {len(documents)} of {len({*keys})} were found"
        remedy = "restore the files that the run was trained on, or choose another set with --set"
        raise DataError(message, where=", ".join(source.path for source in list_inputs(data)), remedy=remedy)
    questions = [split_question(documents[key], data.system) for key in dict.fromkeys(keys) if key in documents]
    usable = [question for question in questions if question is not None]
    return QuestionSet(name, tuple(usable[:max_questions]), split.num_docs, len(questions) - len(usable))


def digest_tokens(ids: np.ndarray) -> bytes:
    """Return the digest for finding a cached document in its source."""
    return xxhash.xxh3_128_digest(np.ascontiguousarray(ids, dtype=np.uint32).tobytes())


def _find_by_tokens(data: DataSection, encoder: Encoder, keys: set[bytes], advance: Advance) -> dict[bytes, Document]:
    """Return the documents whose first row has the tokens of one of `keys`; reads the sources until all are found."""
    documents: dict[bytes, Document] = {}
    batch: list[Document] = []

    def match() -> None:
        rendered = [(document, one) for document in batch if (one := render(document, encoder, data.checks)) is not None]
        for (document, _), encoded in zip(rendered, encoder.encode([one for _, one in rendered]), strict=True):
            key = digest_tokens(encoded.ids[: data.max_length])
            if key in keys:
                documents.setdefault(key, document)
        advance(len(batch))
        batch.clear()

    # The file of the held-out documents is last in the list.
    for document in read_documents(list_inputs(data)[::-1], encoder, data.checks):
        batch.append(document)
        if len(batch) == _ENCODED_AT_ONCE:
            match()
            if len(documents) == len(keys):
                return documents
    match()
    return documents


def render(document: Document, encoder: Encoder, checks: ChecksSection) -> RenderedDocument | None:
    """Return a document in the chat template; None if the template refuses it and the settings leave such rows out."""
    try:
        return encoder.render(document)
    except DataError:
        if checks.bad_rows == "fail":
            raise
        return None


def read_documents(inputs: Sequence[Source], encoder: Encoder, checks: ChecksSection) -> Iterator[Document]:
    """Yield the documents of sources as the build of the cache reads them.

    Raises:
        DataError: if a source is missing, or rows cannot be read.
    """
    for source in inputs:
        if source.is_read:
            # The working directory may differ from the one in which the run was planned.
            if problem := find_path_problem(f"the path of {source.name}", source):
                raise DataError(problem)
            for document, _ in reading.read_documents(source, checks):
                yield encoder.write_as_chat(document, source.completions)


@dataclass(frozen=True)
class TrainingCopy:
    """A prompt that is also in the training data: its rows as file and line."""

    question: str
    training: str

    def __str__(self) -> str:
        return f"{self.question}: the same prompt as {self.training}"


@dataclass(frozen=True)
class TrainingOverlap:
    """The prompts of each set that are also in the training data. `gap` says what was not compared, empty if everything was."""

    copies: dict[str, tuple[TrainingCopy, ...]]
    gap: str = ""


def find_training_copies(
    plan: LaunchPlan, encoder: Encoder, sets: Sequence[QuestionSet], advance: Advance, max_documents: int = MAX_DOCUMENTS
) -> TrainingOverlap:
    """Compare the prompts of each set with the first `max_documents` of the sources, ignoring case, white space and punctuation.

    Sources that no longer exist, or cannot be read, are a gap: an evaluation can do without this comparison.
    """
    if plan.data is None:
        return TrainingOverlap({})
    data, gap = plan.config.data, ""
    questions = [question for one in sets for question in one.questions]
    by_prompt: dict[bytes, list[int]] = {}
    for i, question in enumerate(questions):
        by_prompt.setdefault(_normalize_prompt(question), []).append(i)
    candidates: dict[bytes, list[Document]] = {}
    try:
        documents = read_documents(data.sources, encoder, data.checks)
        for document in islice(documents, max_documents):
            asked = split_question(document, data.system)
            prompt = b"" if asked is None else _normalize_prompt(asked)
            if prompt in by_prompt and len(same := candidates.setdefault(prompt, [])) < MAX_CANDIDATES:
                same.append(document)
            advance(1)
        if next(documents, None) is not None:
            gap = f"prompts were compared with the first {max_documents:,} training documents only"
        trained = _find_trained(plan, encoder, candidates)
    except DataError as error:
        problem = error.problems[0]
        parts = ": ".join(filter(None, (problem.message, problem.where, problem.value)))
        return TrainingOverlap({}, f"prompts were not compared with the training documents: {parts}")
    copies = {i: TrainingCopy(questions[i].where, where) for prompt, where in trained.items() for i in by_prompt[prompt]}
    names = [one.name for one in sets for _ in one.questions]
    by_set = {one.name: tuple(copy for i, copy in sorted(copies.items()) if names[i] == one.name) for one in sets}
    return TrainingOverlap(by_set, gap)


def _find_trained(plan: LaunchPlan, encoder: Encoder, candidates: Mapping[bytes, Sequence[Document]]) -> dict[bytes, str]:
    """Return the place of the first document of each prompt that is in the training split; `candidates` are by prompt."""
    if not candidates or plan.data is None:
        return {}
    data = plan.config.data
    documents = [(prompt, document) for prompt, several in candidates.items() for document in several]
    rendered = [(*one, text) for one in documents if (text := render(one[1], encoder, data.checks)) is not None]
    encoded = [tokens.ids[: data.max_length] for tokens in encoder.encode([text for _, _, text in rendered])]
    keys = [digest_tokens(ids) for ids in encoded]
    split, wanted, trained = Split.open(plan.data), {*keys}, set[bytes]()
    # Only documents of matching lengths are read.
    for at in np.flatnonzero(np.isin(np.diff(split.docs), [len(ids) for ids in encoded])):
        if len(trained) == len(wanted):
            break
        if (key := digest_tokens(np.asarray(split.tokens[split.docs[at] : split.docs[at + 1]]))) in wanted:
            trained.add(key)
    places: dict[bytes, str] = {}
    for (prompt, document, _), key in zip(rendered, keys, strict=True):
        if key in trained:
            places.setdefault(prompt, document.where)
    return places


def _normalize_prompt(question: EvalQuestion) -> bytes:
    return overlap.make_comparable(overlap.normalize(question.prompt))


def describe_copies(num_prompts: int, copies: Sequence[TrainingCopy]) -> str:
    """Return one sentence on how many prompts are also in the training data; empty if none are."""
    if not copies:
        return ""
    share = f"{len(copies):,} of the {num_prompts:,} prompts"
    return f"{share} are in the training data: the answers may have been memorized."
