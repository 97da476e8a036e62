"""Encodes batches in several processes: batches are sent as they are read, mostly unparsed, and returned in that order."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import multiprocessing.util
import os
import pickle
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from launcher import collect_garbage_rarely
from launcher.config.sections.data import DataSection
from launcher.data.tokenization.batch_encoder import BatchEncoder, EncodedTask, EncodeTask
from launcher.errors import DataError, Problem

# Worker processes start 1.7 s after the builder could begin encoding, because they repeat its imports. Two workers finish as
# early as the builder alone if that takes 3.4 s, about the time for this size.
MIN_BYTES = 12 << 20
# Parsing and checking the rows of a batch costs as much as encoding this much text.
_BATCH_BYTES = 50_000


def num_workers(data: DataSection) -> int:
    """Return the number of processes of a build: data.workers, or one per CPU that this process may use."""
    return data.workers or len(os.sched_getaffinity(0))


def encode(tasks: Iterator[EncodeTask], data: DataSection, tokenizer_path: str) -> Iterator[EncodedTask]:
    """Encode each batch; yield the results in order, with the problems of rows that cannot be used.

    Raises:
        DataError: if a tokenizer or a template cannot be used, or if a worker ended without reporting an exception.
    """
    workers = num_workers(data)
    first, is_small = ([], True) if workers == 1 else _read_ahead(tasks)
    tasks = itertools.chain(first, tasks)
    if is_small:
        encoder = BatchEncoder(data, tokenizer_path)
        for task in tasks:
            yield encoder.encode_usable(task)
        return
    # In Python 3.11.0, every user of the machine can reach such a socket of the fork server, which runs what it receives:
    # CVE-2022-42919.
    multiprocessing.util.abstract_sockets_supported = False  # type: ignore[misc]
    context = multiprocessing.get_context("forkserver")
    # The fork server imports once; the workers are forked from it before it has threads.
    context.set_forkserver_preload(["launcher.data.tokenization.forkserver_preload"])
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    settings = data.model_dump_json()
    try:
        running: deque[Future[EncodedTask]] = deque()
        for task in tasks:
            running.append(pool.submit(_encode, settings, tokenizer_path, task))
            # Batches that are read but not yet encoded are in memory.
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        message = "a process that builds the data cache ended: its messages are above, or the memory ran out"
        remedy = f"set data.workers below {workers}, or give the machine more memory, and try again"
        raise DataError(Problem(message, "data.workers", str(workers), remedy)) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(tasks: Iterator[EncodeTask]) -> tuple[list[EncodeTask], bool]:
    """Return the first batches, and True if these are all batches and too few for several processes."""
    first: list[EncodeTask] = []
    num_bytes = 0
    for task in tasks:
        first.append(task)
        num_bytes += len(pickle.dumps(task)) + _BATCH_BYTES
        if num_bytes >= MIN_BYTES:
            return first, False
    return first, True


def _start_worker() -> None:
    collect_garbage_rarely()
    # The workers end with the builder, even if it is killed.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One thread per process: the processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(settings: str, tokenizer_path: str, task: EncodeTask) -> EncodedTask:
    return _encoder(settings, tokenizer_path).encode_usable(task)


@functools.cache
def _encoder(settings: str, tokenizer_path: str) -> BatchEncoder:
    return BatchEncoder(DataSection.model_validate_json(settings), tokenizer_path)
