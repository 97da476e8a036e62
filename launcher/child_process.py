"""A process that another one starts: how it ends, how it reports its result to a command, and how others wait for it.

`python -m launcher.child_process COMMAND` executes a command, in the root directory, which the kernel ends with the process that
started it. The command gets no Python search path from the environment, because it may be another environment's interpreter. With
a leading `--launcher N`, the remaining arguments are for this Python, which keeps the search path, and N is added to its
niceness.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from launcher.errors import LauncherError
from launcher.security.redaction import printable_output

if TYPE_CHECKING:
    import subprocess

# How often processes are looked after, and how long they may take to end.
_POLL_S, _END_S = 0.2, 20.0


def run_process(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run `main` with this process's arguments and exit with its code; the process ends with the one that started it."""
    exit_on_termination()
    die_with_parent(signal.SIGTERM)
    code = main(sys.argv[1:])
    from launcher.models.remote_code import remove_copies

    remove_copies()
    exit_without_shutdown(code)


def print_result(work: Callable[[], dict[str, Any]]) -> int:
    """Print the result of `work`, or its problems, as one JSON line; returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Libraries also print to standard output.
    output = os.dup(1)
    os.dup2(2, 1)
    try:
        # Libraries log names from other users' files to the command's terminal.
        with printable_output():
            result, code = work(), 0
    except LauncherError as error:
        result, code = error.to_report(), error.exit_code
    os.write(output, (json.dumps(result) + "\n").encode())
    return code


def await_processes(processes: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """Wait until all processes have ended or one has failed; return the exit codes then, None for those that it has to end."""
    import subprocess

    try:
        while True:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                return codes
            time.sleep(_POLL_S)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + _END_S
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def exit_on_termination() -> None:
    """Make SIGTERM raise SystemExit in the main thread, so that partly written files are removed; ignore Ctrl-C.

    Ctrl-C reaches the terminal's whole process group; the command that started this process decides what it means. Child
    processes of multiprocessing are killed first: they would print tracebacks when their pool is gone.
    """

    def end(*_: object) -> None:
        for process in multiprocessing.active_children():
            process.kill()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Ask the kernel to signal this process when its parent dies, so that no rank is left behind (Linux)."""
    parent = os.getppid()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)
    # The parent may have died before the call above.
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def exit_without_shutdown(code: int) -> NoReturn:
    """Exit at once: DeepSpeed's threads can abort the interpreter's shutdown, which would look like a failure."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    die_with_parent(signal.SIGTERM)
    # Signals that the starter blocks are delivered to the command again.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    words = sys.argv[1:]
    if words[0] == "--launcher":
        os.nice(int(words[1]))
        words[:2] = [sys.executable]
    else:
        # Python imports modules from the working directory, which may contain another user's files.
        os.chdir("/")
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            os.environ.pop(name, None)
    # The parent-death signal survives exec.
    os.execv(words[0], words)  # noqa: S606
