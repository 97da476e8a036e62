"""Runs a user's own metric in a separate process, which is killed if it hangs. Without torch."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from launcher.errors import DataError, Problem
from launcher.evaluate.metrics import GeneratedAnswer

# The file may import large packages.
_IMPORT_S = 120.0
_MAX_REPLY_BYTES = 2**16
_SIGNATURE = "it takes an answer and its reference, both texts, and returns a number"


class MetricProcess:
    """A process that runs one function, on one answer at a time, with a time limit per answer.

    Raises:
        DataError: if the file cannot be imported.
    """

    def __init__(self, metric: str, file: Path, function: str, limit_s: float) -> None:
        self._metric, self._limit_s = metric, limit_s
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "launcher.evaluate.metric_worker", str(file), function, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Import nothing from the working directory, which another user may own.
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            # So that it can be killed together with the processes that it has started.
            start_new_session=True,
        )
        self._selector = selectors.DefaultSelector()
        assert self._process.stdout is not None
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        try:
            reply = self._read_reply(_IMPORT_S)
            if reply is None or "error" in reply:
                raise self._failure("could not be imported", str(file), reply, _IMPORT_S)
        except BaseException:
            self.close()
            raise

    def score(self, answer: GeneratedAnswer, reference: str, place: str) -> float:
        """Return the score of an answer; `place` names the row.

        Raises:
            DataError: if the function fails, hangs, ends its process, or does not return a number.
        """
        row = json.dumps({"answer": answer.text, "reference": reference})
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(row.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure("failed", place, None, self._limit_s) from None
        reply = self._read_reply(self._limit_s)
        if reply is None or "score" not in reply:
            raise self._failure("failed", place, reply, self._limit_s)
        return float(reply["score"])

    def _read_reply(self, limit_s: float) -> dict[str, Any] | None:
        """Return the reply of the process; None if it has ended or does not reply in time."""
        assert self._process.stdout is not None
        deadline, content = monotonic() + limit_s, b""
        while not content.endswith(b"\n") and len(content) <= _MAX_REPLY_BYTES:
            if not self._selector.select(max(0.0, deadline - monotonic())):
                return None
            if not (piece := os.read(self._process.stdout.fileno(), _MAX_REPLY_BYTES)):
                return None
            content += piece
        try:
            reply = json.loads(content)
        except ValueError:
            return None
        return reply if isinstance(reply, dict) else None

    def _failure(self, verb: str, where: str, reply: dict[str, Any] | None, limit_s: float) -> DataError:
        """Return the error for a missing score: an exception, the end of the process, or a timeout."""
        if reply is not None:
            reason, remedy = str(reply.get("error", reply)), f"correct the function; {_SIGNATURE}"
        elif (code := self._wait_briefly()) is not None:
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            reason, remedy = f"its process ended with {ended}", f"correct the function; {_SIGNATURE}"
        else:
            reason = f"it took more than {limit_s:g} s and was ended"
            remedy = "correct the function, or allow more time for each answer with evaluate.metric_time_limit_s"
        return DataError(Problem(f"a metric of your own {verb}: {reason}", where, self._metric, remedy))

    def _wait_briefly(self) -> int | None:
        try:
            # Its output ends before the process does.
            return self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        """Kill the process and the processes that it has started."""
        self._selector.close()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        # Leaving the block closes the pipes and waits.
        with self._process:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
