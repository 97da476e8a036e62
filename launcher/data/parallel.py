"""Encoding in several processes: batches go out as they are read and come back in that order."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from launcher.config.data import DataSection
from launcher.data.encode import BatchEncoder, EncodedBatch, Item
from launcher.data.sources import Chat, Completion, Document, PlainText
from launcher.errors import DataError, Problem

BATCH_DOCS = 256
BATCH_CHARS = 1 << 20
# Processes take a few seconds to start: with so few batches the builder is done by itself as soon.
MIN_BATCHES = 24


def num_workers(data: DataSection) -> int:
    """Processes that a build uses: as many as set, or one for each CPU that this process may use."""
    return data.workers or len(os.sched_getaffinity(0))


def batched(items: Iterable[Item]) -> Iterator[list[Item]]:
    """Batches of up to BATCH_DOCS documents; one of BATCH_CHARS characters is full."""
    batch: list[Item] = []
    num_chars = 0
    for item in items:
        batch.append(item)
        num_chars += _num_chars(item.document)
        if len(batch) == BATCH_DOCS or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _num_chars(document: Document) -> int:
    match document:
        case Chat(messages=messages):
            return sum(len(message.content or "") for message in messages)
        case Completion(prompt=prompt, completion=completion):
            return len(prompt) + len(completion)
        case PlainText(text=text):
            return len(text)


def encode(batches: Iterator[list[Item]], data: DataSection, tokenizer_path: str) -> Iterator[EncodedBatch]:
    """Each batch encoded, in order; errors: DataError, also where a process was killed."""
    first = list(itertools.islice(batches, MIN_BATCHES))
    workers = num_workers(data)
    batches = itertools.chain(first, batches)
    if workers == 1 or len(first) < MIN_BATCHES:
        encoder = BatchEncoder(data, tokenizer_path)
        for batch in batches:
            yield encoder.encode(batch)
        return
    context = multiprocessing.get_context("forkserver")
    # One process pays for the imports; the workers are forks of it, made before it has any thread.
    context.set_forkserver_preload([BatchEncoder.__module__, "transformers.models.auto.tokenization_auto"])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    settings = data.model_dump_json()
    try:
        running: deque[Future[EncodedBatch]] = deque()
        for batch in batches:
            running.append(pool.submit(_encode, settings, tokenizer_path, batch))
            # What is read and not yet encoded lies in memory.
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        what = "a process that builds the data cache was killed, as the system does where memory runs out"
        remedy = f"set data.workers below {workers}, or give the machine more memory, and try again"
        raise DataError(Problem(what, "data.workers", str(workers), remedy)) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    # The builder hears Ctrl-C and ends the workers; where it is killed itself, they end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(settings: str, tokenizer_path: str, batch: Sequence[Item]) -> EncodedBatch:
    return _encoder(settings, tokenizer_path).encode(batch)


@functools.cache
def _encoder(settings: str, tokenizer_path: str) -> BatchEncoder:
    return BatchEncoder(DataSection.model_validate_json(settings), tokenizer_path)
