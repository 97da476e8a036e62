"""The questions of an evaluation: held-out documents split into a prompt and a reference answer, and training rows as examples.

The caches of a run hold only tokens. A document is found in its source by its tokens, so the questions are exactly the documents
of the split, however they were selected.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from launcher.config.sections.data import ChecksSection, DataSection, Source
from launcher.config.sections.evaluation import HELD_OUT
from launcher.data.sources import reading
from launcher.data.sources.documents import Chat, Completion, Document, Message
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


@dataclass(frozen=True)
class EvalQuestion:
    """A prompt and its reference answer; `document` is a chat without its last answer, or a text whose completion is empty."""

    where: str
    document: Chat | Completion
    reference: str

    @property
    def text(self) -> str:
        """The question itself: the last message, or the prompt."""
        document = self.document
        return document.prompt if isinstance(document, Completion) else document.messages[-1].content

    @property
    def prompt(self) -> str:
        """The whole question: the messages without system messages, or the prompt."""
        document = self.document
        if isinstance(document, Completion):
            return document.prompt
        return "\n".join(message.content for message in document.messages if message.role != "system")

    def to_json(self) -> dict[str, Any]:
        return {"where": self.where, "reference": self.reference, "document": asdict(self.document)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EvalQuestion:
        document = values["document"]
        if "messages" in document:
            messages = tuple(Message(**{**one, "tool_calls": tuple(one["tool_calls"])}) for one in document["messages"])
            return cls(values["where"], Chat(document["where"], messages, tuple(document["tools"])), values["reference"])
        return cls(values["where"], Completion(**document), values["reference"])


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
    match document:
        case Chat():
            chat = with_system(document, system)
            last = max((i for i, message in enumerate(chat.messages) if message.role == "assistant"), default=0)
            answer = chat.messages[last].content
            if last == 0 or not answer.strip() or chat.messages[last].tool_calls:
                return None
            return EvalQuestion(chat.where, Chat(chat.where, chat.messages[:last], chat.tools), answer)
        case Completion(where, prompt, completion) if prompt.strip() and completion.strip():
            return EvalQuestion(where, Completion(where, prompt, ""), completion)
    return None


def read_set(plan: LaunchPlan, name: str, encoder: Encoder, max_questions: int, advance: Advance) -> QuestionSet:
    """Return questions of the run's held-out documents, of one of eval.sets, or of its training documents, in a random order.

    Raises:
        DataError: if the data files no longer contain these documents.
    """
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
    documents = _find(data, encoder, set(keys), advance)
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


def _find(data: DataSection, encoder: Encoder, keys: set[bytes], advance: Advance) -> dict[bytes, Document]:
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
