"""Ranks as the processes of their agent: forked from the node's fork server, or started as new Python processes."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from launcher.worker.ranks.fork_server import find_differing
from launcher.worker.signals import CANCEL

_PR_SET_CHILD_SUBREAPER = 36
_ADOPTION_S = 10.0
# If storage does not answer, the same imports may succeed in separate processes, each with its own deadline.
_IMPORT_S = 900.0
_POLL_S = 0.01
_END_S = 5.0
# Variables of the server and of the ranks that it forks.
_VARIABLES = {
    # OpenBLAS starts its threads when numpy is imported; ranks compute with torch.
    "OPENBLAS_NUM_THREADS": "1",
    # Otherwise torch initializes CUDA as soon as something asks for the number of GPUs.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}


class RankProcess(Protocol):
    """The common interface of subprocess.Popen and ForkedProcess."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int) -> None: ...

    def kill(self) -> None: ...


# Starts a rank with the given environment variables.
StartRank = Callable[[Mapping[str, str]], RankProcess]


class ForkedProcess:
    """A child that this process did not start itself."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        # A process id may be reused as soon as the process has been waited for.
        self._lock = threading.Lock()

    def poll(self) -> int | None:
        """Return the exit code (negative for a signal), or None while the process runs."""
        with self._lock:
            return self._poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the process to end, and return the exit code."""
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(_POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        """Send a signal; do nothing if the process has ended."""
        with self._lock:
            if self._poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class ForkFailed(Exception):
    """No rank can be forked; the message says why."""


class ForkServer:
    """The agent's end of `python -m launcher.worker.ranks.fork_server`."""

    def __init__(self, plan_path: str, environment: Mapping[str, str], folder: Path | None = None) -> None:
        """Start the server in `folder` with the variables that are read during imports; do not wait for it."""
        self._environment = {**environment, **_VARIABLES}
        self._connection, theirs = socket.socketpair()
        self._connection.settimeout(_IMPORT_S)
        self._has_answered = False
        self._answers = self._connection.makefile("r", encoding="utf-8")
        with theirs:
            command = [sys.executable, "-u", "-m", "launcher.worker.ranks.fork_server", str(theirs.fileno()), plan_path]
            self._process = subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], cwd=folder
            )

    def is_importing(self) -> bool:
        """True while a fork would have to wait."""
        return not self._has_answered and not select.select([self._connection], [], [], 0)[0]

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess:
        """Fork a rank with these arguments for launcher.worker.ranks.rank_main, when the server has finished its imports."""
        environment = {**environment, **_VARIABLES}
        if names := find_differing(environment, self._environment):
            raise ForkFailed(f"{', '.join(names)} must be set before anything is imported")
        request = json.dumps({"arguments": [*arguments], "environment": environment})
        if not self._has_answered:
            self._read_answer()
            self._has_answered = True
        with _adopt_orphans():
            return ForkedProcess(_await_child(self._read_answer(request)["pid"]))

    def _read_answer(self, request: str = "") -> dict[str, Any]:
        try:
            if request:
                self._connection.sendall(request.encode() + b"\n")
            answer: dict[str, Any] = json.loads(self._answers.readline())
        except TimeoutError:
            raise ForkFailed(f"importing has taken longer than {_IMPORT_S:.0f} s") from None
        except (OSError, ValueError):
            raise ForkFailed(f"the fork server has ended with exit code {self._process.wait()}") from None
        if refusal := answer.get("refusal"):
            raise ForkFailed(refusal)
        return answer

    def kill(self) -> None:
        """End the server at once; ranks stay."""
        self._process.kill()

    def close(self) -> None:
        """End the server; ranks stay."""
        self.kill()
        # A process that hangs in the kernel cannot be waited for.
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        self._answers.close()
        self._connection.close()


@contextmanager
def _adopt_orphans() -> Iterator[None]:
    """Become a child subreaper (Linux), the new parent of orphaned descendants, for the duration of this block.

    Outside the block, processes that killed ranks leave behind go to init, as they do without a fork server.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise ForkFailed(f"the kernel does not let a process adopt orphans: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _await_child(pid: int) -> int:
    until = time.monotonic() + _ADOPTION_S
    while True:
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            if time.monotonic() > until:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                raise ForkFailed("the forked process did not become a child of the agent") from None
            time.sleep(0.0005)
        else:
            return pid


class RankProcesses:
    """Starts the ranks of one node in `folder`, and sends signals to running ranks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server: ForkServer | None = None
        self._lock = threading.Lock()
        self._started: list[RankProcess] = []

    def warm_up(self, plan_path: str, environment: Mapping[str, str]) -> None:
        """Start a fork server that imports what this plan's ranks need; do not wait for it."""
        self._server = ForkServer(plan_path, environment, self._folder)

    def start(self, plan_path: str, attempt: int, environment: Mapping[str, str]) -> RankProcess:
        """Start a rank with these variables; a forked rank also gets the fork server's variables."""
        arguments = (plan_path, str(attempt))
        process: RankProcess | None = None
        if self._server is not None:
            try:
                process = self._server.fork(arguments, environment)
            except ForkFailed as error:
                print(f"ranks are started as new processes: {error}", flush=True)
                self.close()
        if process is None:
            command = [sys.executable, "-u", "-m", "launcher.worker.ranks.rank_main", *arguments]
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, cwd=self._folder)
        with self._lock:
            self._started = [*(other for other in self._started if other.returncode is None), process]
        return process

    def send_signal(self, number: int) -> None:
        """Send a signal to every running rank. SIGKILL also ends the fork server; CANCEL ends a server that is still importing.

        A rank that starts after a cancel ends at once, whereas imports take minutes on slow storage.
        """
        with self._lock:
            started = self._started
        for process in started:
            process.send_signal(number)
        if self._server is not None and (number == signal.SIGKILL or (number == CANCEL and self._server.is_importing())):
            self._server.kill()

    def close(self) -> None:
        """End the fork server."""
        if self._server is not None:
            self._server.close()
            self._server = None
