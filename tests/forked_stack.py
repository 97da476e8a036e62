"""Processes of the launcher, forked from one that has imported torch, transformers and DeepSpeed.

These imports take more than half of the CPU time of a short run. Otherwise these are the processes of any run: a command, an
agent, its fork server and its ranks, each with its own environment, streams and parent. They run the code of this checkout, not
the run's snapshot, and variables that libraries read on import, such as HF_HOME and OMP_NUM_THREADS, have no effect. The fixtures
`launch` and `start` are for tests of what processes import and how they start.

A forked process runs `python -m forked_stack MODULE ARGUMENTS`; MODULE may be the path of a script.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from forked import ForkedProcess, ForkServer, run_module
from setproctitle import setproctitle

import launcher

COMMAND, AGENT = "launcher", "launcher.worker.local"
_STATIC_AGENT, _FORK_SERVER = "launcher.worker.static", "launcher.worker.ranks.fork_server"
# The processes that forked processes start are forked again, except those beside the ranks: their agent has threads.
_SIDECARS = "launcher.worker.sidecars."
# What the server imports, besides what ranks of any test need.
MODULES = ("rank_stack", AGENT, _STATIC_AGENT, _FORK_SERVER, "launcher.worker.ranks.elastic")
_BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
_BATCH_HOOK = Path(__file__).with_name("e2e") / "rows_seen/sitecustomize.py"


class ForkingAgents:
    """For `monkeypatch.setattr(detached_process, "subprocess", ...)`: fork agents from `server()`; start other modules."""

    DEVNULL, STDOUT = subprocess.DEVNULL, subprocess.STDOUT

    def __init__(self, server: Callable[[], ForkServer]) -> None:
        self._server = server

    def Popen(self, command: Sequence[str], *, stdout: IO[bytes], env: Mapping[str, str], umask: int, **options: Any) -> Any:
        python, flag, module, *arguments = command
        if (python, flag, module) != (sys.executable, "-m", AGENT):
            return subprocess.Popen(command, stdout=stdout, env=env, umask=umask, **options)
        streams = {"stdout": stdout.fileno(), "stderr": stdout.fileno()}
        return _Agent(self._server().popen("forked_stack", module, *arguments, **streams, env=env, umask=umask))


class _Agent:
    """What detached_process needs of the process. Its exit code is read as soon as it ends: nothing else waits for it."""

    def __init__(self, process: ForkedProcess) -> None:
        self.pid = process.pid
        self._process = process
        threading.Thread(target=self._wait, name=f"agent {process.pid}", daemon=True).start()

    def poll(self) -> int | None:
        return self._process.returncode

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self) -> None:
        # At the end of the session, the server ends before an agent that a test has left.
        with suppress(AssertionError, OSError):
            self._process.wait()


def _popen(command: Sequence[str], **options: Any) -> Any:
    """subprocess.Popen in a forked process."""
    python, *words = (word for word in command if word not in ("-u", "-m"))
    is_own = words[:1] == [COMMAND] or words[0].startswith(("launcher.worker.", "launcher.evaluate.", str(_BENCHMARKS)))
    if python != sys.executable or not is_own or words[0].startswith(_SIDECARS):
        return subprocess.Popen(command, **options)
    return _fork(words[0], words[1:], **options)


def _fork(
    module: str,
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: int = subprocess.DEVNULL,
    stdout: IO[bytes] | int | None = None,
    stderr: IO[str] | int | None = None,
    text: bool = False,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
    umask: int = -1,
    start_new_session: bool = False,
) -> Any:
    given = os.pipe() if stdin == subprocess.PIPE else None
    taken = os.pipe() if stdout == subprocess.PIPE else None
    pid = os.fork()
    if pid:
        return _started(pid, given, taken)
    os.dup2(given[0] if given else os.open(os.devnull, os.O_RDONLY), 0)
    if stdout is not None:
        os.dup2(taken[1] if taken else stdout if isinstance(stdout, int) else stdout.fileno(), 1)
    if stderr is not None:
        os.dup2(1 if isinstance(stderr, int) else stderr.fileno(), 2)
    for descriptor in {*map(int, os.listdir("/proc/self/fd"))} - {0, 1, 2, *pass_fds}:
        with suppress(OSError):
            os.close(descriptor)
    # As after exec: the parent removes its temporary folders itself, and handles its signals.
    atexit._clear()
    weakref.finalize._registry.clear()  # type: ignore[attr-defined]
    weakref.finalize._registered_with_atexit = False  # type: ignore[attr-defined]
    for number in signal.valid_signals():
        if callable(handler := signal.getsignal(number)) and handler is not signal.default_int_handler:
            signal.signal(number, signal.SIG_DFL)
    if start_new_session:
        os.setsid()
    if umask >= 0:
        os.umask(umask)
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    if module == _STATIC_AGENT:
        # The agents of several nodes check that this is the run's code.
        launcher.__file__ = f"{env['PYTHONPATH'].partition(os.pathsep)[0]}/launcher/__init__.py"
    if module == _FORK_SERVER and {"ROWS_SEEN", "SECONDS_PER_STEP"} & env.keys():
        _watch_batches()
    _name(module, arguments)
    run_module(module, arguments)


def _started(pid: int, given: tuple[int, int] | None, taken: tuple[int, int] | None) -> Any:
    """What the launcher uses of subprocess.Popen, for a child of this process that has the other ends of these pipes."""
    from launcher.worker.ranks import rank_process

    class Forked(rank_process.ForkedProcess):
        def terminate(self) -> None:
            self.send_signal(signal.SIGTERM)

        stdin: Any = None
        reader: threading.Thread | None = None
        output = ""

        def communicate(self, text: str = "", timeout: float | None = None) -> tuple[str, None]:
            if self.reader is None:
                if self.stdin:
                    with suppress(BrokenPipeError), self.stdin:
                        self.stdin.write(text.encode())
                self.reader = threading.Thread(target=self._read, daemon=True)
                self.reader.start()
            self.reader.join(timeout)
            if self.reader.is_alive():
                raise subprocess.TimeoutExpired(f"process {pid}", timeout or 0.0)
            self.wait(timeout)
            return self.output, None

        def _read(self) -> None:
            if taken:
                with open(taken[0]) as source:
                    self.output = source.read()

        def __enter__(self) -> Forked:
            return self

        def __exit__(self, *_: object) -> None:
            self.wait()

    for pipe, number in ((given, 0), (taken, 1)):
        if pipe:
            os.close(pipe[number])
    process = Forked(pid)
    if given:
        process.stdin = os.fdopen(given[1], "wb")
    return process


def _watch_batches() -> None:
    """Do what e2e/rows_seen does to a process that has not imported the loader yet."""
    from launcher.data.loader import TrainBatches

    spec = importlib.util.spec_from_file_location("rows_seen", _BATCH_HOOK)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(hook := importlib.util.module_from_spec(spec))
    TrainBatches.step = hook._watched(TrainBatches.step)  # type: ignore[method-assign]


def _name(module: str, arguments: Sequence[str]) -> None:
    """Set the command line by which tests find processes."""
    setproctitle(" ".join([sys.executable, "-m", module, *arguments]))


def main(module: str, *arguments: str) -> None:
    from launcher.cli import worker_process
    from launcher.clusters import detached_process
    from launcher.worker.ranks import rank_process

    if module == AGENT:
        os.setsid()
    _name(module, arguments)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    forking = ModuleType("subprocess")
    vars(forking).update({**vars(subprocess), "Popen": _popen})
    # For modules that are imported already, and for the one that runs now.
    sys.modules["subprocess"] = forking
    for one in (worker_process, detached_process, rank_process):
        one.subprocess = forking
    run_module(module, arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
