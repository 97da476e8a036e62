"""Encoding in several processes: batches go out as they are read, mostly unparsed, and come back in that order."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

from launcher.config.data import DataSection
from launcher.data.tokenization.batch_encoder import BatchEncoder, EncodedBatch, EncodeTask
from launcher.errors import DataError, LauncherError, Problem, RunError

# Processes start 1.7 s later than the builder itself could encode, since they import what it has imported. Two of them are done
# as soon as the builder alone where that takes 3.4 s: for about this size.
MIN_BYTES = 12 << 20
# Parsing and checking the rows of a batch takes as long as encoding this much text.
_BATCH_BYTES = 50_000


def num_workers(data: DataSection) -> int:
    """Processes that a build uses: as many as set, or one for each CPU that this process may use."""
    return data.workers or len(os.sched_getaffinity(0))


def encode(waiting: Iterator[EncodeTask], data: DataSection, tokenizer_path: str) -> Iterator[EncodedBatch]:
    """Each batch encoded, in order.

    Raises:
        DataError: for a row that cannot be used, and where the system has killed a worker.
        RunError: where a worker ended otherwise before it could report an exception.
    """
    workers = num_workers(data)
    first, is_small = ([], True) if workers == 1 else _read_ahead(waiting)
    waiting = itertools.chain(first, waiting)
    if is_small:
        encoder = BatchEncoder(data, tokenizer_path)
        for work in waiting:
            yield encoder.encode(work)
        return
    context = multiprocessing.get_context("forkserver")
    # One process pays for the imports; the workers are forks of it, made before it has any thread.
    context.set_forkserver_preload(["launcher.data.tokenization.forkserver_preload"])
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
    started: set[BaseProcess] = set()
    settings = data.model_dump_json()
    try:
        running: deque[Future[EncodedBatch]] = deque()
        for work in waiting:
            running.append(pool.submit(_encode, settings, tokenizer_path, work))
            if len(started) < workers:
                started |= set(multiprocessing.active_children()) - others
            # What is read and not yet encoded lies in memory.
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        # The pool ends the workers that are left before their exit codes are read.
        pool.shutdown(cancel_futures=True)
        raise _failure([process.exitcode for process in started], workers) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _read_ahead(waiting: Iterator[EncodeTask]) -> tuple[list[EncodeTask], bool]:
    """The first batches, and True where there are no more and they are too few for several processes."""
    first: list[EncodeTask] = []
    num_bytes = 0
    for work in waiting:
        first.append(work)
        num_bytes += len(pickle.dumps(work)) + _BATCH_BYTES
        if num_bytes >= MIN_BYTES:
            return first, False
    return first, True


def _failure(exit_codes: Sequence[int | None], workers: int) -> LauncherError:
    """Why the workers ended, by their exit codes. The pool sends TERM to those that outlive the first."""
    failures = [code for code in exit_codes if code]
    causes = [code for code in failures if code != -signal.SIGTERM] or failures
    if -signal.SIGKILL in causes:
        what = "a process that builds the data cache was killed, as the system does where memory runs out"
        remedy = f"set data.workers below {workers}, or give the machine more memory, and try again"
        return DataError(Problem(what, "data.workers", str(workers), remedy))
    code = causes[0] if causes else 0
    how = f"was ended by {signal.strsignal(-code) or f'signal {-code}'}" if code < 0 else f"ended with exit code {code}"
    what = f"a process that builds the data cache {how}; its messages are above"
    return RunError(Problem(what, remedy="data.workers=1 builds without such processes"))


def _start_worker() -> None:
    # Where the builder is killed, they end with it.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The processes are the parallelism.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(settings: str, tokenizer_path: str, work: EncodeTask) -> EncodedBatch:
    return _encoder(settings, tokenizer_path).encode(work)


@functools.cache
def _encoder(settings: str, tokenizer_path: str) -> BatchEncoder:
    return BatchEncoder(DataSection.model_validate_json(settings), tokenizer_path)
