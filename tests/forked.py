"""Python processes that are forked from one with their imports loaded, but otherwise run as if started with `python -m`.

A new process needs a second to import W&B or the launcher; a fork starts in milliseconds. Everything else is as in a new process:
environment, working directory, standard streams, exit code, and waiting for threads and exit functions at the end.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Self

import setproctitle

REPO = Path(__file__).resolve().parents[1]
_LONGEST_MESSAGE = 2**20
# Fixtures that run the launcher to completion: `launch`, `launch_here`, `train_here`.
Launch = Callable[..., subprocess.CompletedProcess[str]]


def require_exit(done: subprocess.CompletedProcess[str], code: int = 0) -> None:
    """Fail with the output of a command unless it ended with this exit code."""
    assert done.returncode == code, f"{done.stdout}{done.stderr}"


class ForkServer:
    """A process that has imported `modules`, with `variables` in its environment, and forks others.

    Forked processes that import one of `forbidden` end with exit code 77.
    """

    def __init__(self, *modules: str, forbidden: Sequence[str] = (), variables: Mapping[str, str] | None = None) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        # Helper modules are in the same folders as the tests that use them.
        folders = (REPO, REPO / "tests", *(path for path in (REPO / "tests").iterdir() if path.is_dir()))
        arguments = json.dumps({"descriptor": theirs.fileno(), "modules": modules, "forbidden": forbidden})
        # The server ends when this end of the socket is closed, at the latest with this process.
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import sys, forked; forked.serve(sys.argv[1])", arguments],
            env={**os.environ, **(variables or {}), "PYTHONPATH": os.pathsep.join(map(str, folders))},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()

    def popen(
        self,
        module: str,
        *arguments: str,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        stderr: int = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        text: bool = False,
        umask: int = -1,
    ) -> ForkedProcess:
        """Start `python -m MODULE ARGUMENTS`, or with `-c` the code in the first argument; the streams are file
        descriptors, subprocess.PIPE or subprocess.DEVNULL, and `stderr` may be subprocess.STDOUT.
        """
        ours: list[Any] = []
        passed: list[int] = []
        for number, stream in enumerate((stdin, stdout, stderr)):
            if stream == subprocess.PIPE:
                reader, writer = os.pipe()
                own, other = (writer, reader) if number == 0 else (reader, writer)
                file: Any = open(own, "wb" if number == 0 else "rb", buffering=-1 if number else 0)  # noqa: SIM115
                ours.append(io.TextIOWrapper(file, write_through=True) if text else file)
                passed.append(other)
            else:
                ours.append(None)
                source = passed[1] if stream == subprocess.STDOUT else stream
                passed.append(os.open(os.devnull, os.O_RDWR) if stream == subprocess.DEVNULL else os.dup(source))
        request = {"module": module, "arguments": arguments, "environ": dict(env or os.environ), "cwd": str(cwd or os.getcwd())}
        # Like a child, it keeps this process's umask by default.
        os.umask(own := os.umask(0))
        request["umask"] = umask if umask >= 0 else own
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], passed)
            pid = int(self._answer())
        for descriptor in passed:
            os.close(descriptor)
        return ForkedProcess(self, pid, *ours)

    def run(
        self, module: str, *arguments: str, input: str | None = None, timeout: float = 60, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run such a process to completion and return its output; it is killed after `timeout`."""
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = self.popen(module, *arguments, **streams, text=True, **options)
        try:
            outputs = process.communicate(input or "", timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate("", timeout=10)
            raise
        assert process.returncode is not None
        return subprocess.CompletedProcess([module, *arguments], process.returncode, *outputs)

    def exit_code(self, pid: int) -> int:
        """The exit code of a process that has ended; call this only once."""
        with self._lock:
            self._socket.send(json.dumps({"ended": pid}).encode())
            return int(self._answer())

    def close(self) -> None:
        """End the server."""
        self._socket.close()
        self._process.kill()
        self._process.wait()

    def _answer(self) -> str:
        answer = self._socket.recv(_LONGEST_MESSAGE)
        assert answer, "the process that forks others has ended"
        return json.loads(answer)


class ForkedProcess:
    """The parts of subprocess.Popen that tests need, for a process that is not a child of this one."""

    def __init__(self, server: ForkServer, pid: int, stdin: Any, stdout: Any, stderr: Any) -> None:
        self.pid, self.stdin, self.stdout, self.stderr = pid, stdin, stdout, stderr
        self.returncode: int | None = None
        self._server, self._descriptor = server, os.pidfd_open(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self.wait()

    def poll(self) -> int | None:
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._descriptor], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = self._server.exit_code(self.pid)
            os.close(self._descriptor)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[Any, Any]:
        """Write `input`, close standard input and wait; returns stdout and stderr."""
        outputs: dict[str, Any] = {}

        def read(name: str, stream: Any) -> None:
            outputs[name] = stream.read()

        streams = {name: stream for name in ("stdout", "stderr") if (stream := getattr(self, name)) is not None}
        readers = [threading.Thread(target=read, args=item, daemon=True) for item in streams.items()]
        for reader in readers:
            reader.start()
        if self.stdin is not None:
            with suppress(BrokenPipeError, ValueError):
                if input:
                    self.stdin.write(input)
                self.stdin.close()
        self.wait(timeout)
        for reader in readers:
            reader.join(timeout)
        return outputs.get("stdout"), outputs.get("stderr")


@functools.cache
def preloaded(*modules: str, forbidden: tuple[str, ...] = ()) -> ForkServer:
    """The server for these modules, one per test process."""
    return ForkServer(*modules, forbidden=forbidden)


class ForkingSubprocess:
    """For `monkeypatch.setattr(MODULE, "subprocess", ...)`: the module's `python -m` commands are forked from `server`."""

    DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    SubprocessError, TimeoutExpired = subprocess.SubprocessError, subprocess.TimeoutExpired

    def __init__(self, server: ForkServer) -> None:
        self._server = server

    def run(
        self, command: Sequence[str], *, timeout: float, input: str | None = None, env: Mapping[str, str] | None = None, **_: Any
    ) -> subprocess.CompletedProcess[str]:
        python, flag, module, *arguments = command
        assert (python, flag) == (sys.executable, "-m"), command
        return self._server.run(module, *arguments, input=input, timeout=timeout, env=env)


class ForkingWorkers:
    """For `monkeypatch.setattr(worker_process, "subprocess", ...)`: fork worker modules from a process that has imported them.

    `stack()` has imported torch and DeepSpeed, see forked_stack.py.

    Two kinds still get a new process: one for another Hub, whose address libraries read on import; and one that prepares in a
    cache without a converted model, because it may need torch, which the imported tokenizers consider missing.
    """

    DEVNULL, PIPE, TimeoutExpired = subprocess.DEVNULL, subprocess.PIPE, subprocess.TimeoutExpired
    _WITHOUT_TORCH = ("launcher.worker.prepare", "launcher.worker.data_sample", "launcher.data.tokenization.forkserver_preload")
    _PROBE = (
        "launcher.train.isolation",
        "launcher.train.model",
        "launcher.worker.checks.model_check",
        "transformers.models.llama.modeling_llama",
    )

    _WITH_TORCH = ("launcher.worker.export", "launcher.evaluate.")

    def __init__(self, variables: Mapping[str, str], stack: Callable[[], ForkServer] | None = None) -> None:
        self._variables, self._stack = variables, stack
        self._server = functools.cache(lambda *modules: ForkServer(*modules, variables=variables))

    def Popen(self, command: Sequence[str], *, stdin: int, stdout: int | None, text: bool, env: Mapping[str, str]) -> Any:
        python, flag, module, *arguments = (word for word in command if word != "-u")
        imported = next((modules for modules in (self._WITHOUT_TORCH, self._PROBE) if module in modules), None)
        is_other = (python, flag) != (sys.executable, "-m") or _of_the_hub(env) != _of_the_hub(self._variables)
        may_need_torch = imported is self._WITHOUT_TORCH and not any(Path(env["LAUNCHER_CACHE"]).glob("models/*/config.json"))
        streams = {"stdin": stdin, "stdout": 1 if stdout is None else stdout, "stderr": 2}
        if self._stack is not None and module.startswith(self._WITH_TORCH) and not is_other:
            return self._stack().popen("forked_stack", module, *arguments, **streams, text=text, env=env)
        if imported is None or is_other or may_need_torch:
            return subprocess.Popen(command, stdin=stdin, stdout=stdout, text=text, env=env)
        return self._server(*imported).popen(module, *arguments, **streams, text=text, env=env)


def _of_the_hub(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(("HF_", "TRANSFORMERS_"))}


class _Wall:
    """End the process when it imports one of `names`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self._names:
            sys.stderr.write(f"import of {name}\n")
            sys.stderr.flush()
            os._exit(77)


def serve(arguments: str) -> None:
    """Import the modules, then fork a process for each request until the client is gone."""
    settings = json.loads(arguments)
    # It finds the command line in memory only before the environment changes.
    setproctitle.getproctitle()
    if settings["forbidden"]:
        sys.meta_path.insert(0, _Wall(settings["forbidden"]))
    # Imports create no garbage, and children do not copy pages of frozen objects.
    gc.disable()
    for name in settings["modules"]:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    connection = socket.socket(fileno=settings["descriptor"])
    while True:
        message, descriptors, _, _ = socket.recv_fds(connection, _LONGEST_MESSAGE, 3)
        if not message:
            return
        request = json.loads(message)
        if "ended" in request:
            _, status = os.waitpid(request["ended"], 0)
            connection.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())
            continue
        pid = os.fork()
        if pid == 0:
            connection.close()
            _become(request, descriptors)
            run_module(request["module"], request["arguments"])
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(json.dumps(pid).encode())


def _become(request: Mapping[str, Any], descriptors: Sequence[int]) -> None:
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    # The existing stream objects are set up for the kind of file they were opened on.
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(number, "r" if number == 0 else "w", closefd=False) for number in range(3))
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    # Imported modules run again as the main module.
    warnings.filterwarnings("ignore", message=".*found in sys.modules")


def run_module(module: str, arguments: Sequence[str]) -> NoReturn:
    """Run the module, or the script at a path, as `python` does.

    Does not free memory at the end, which takes longer than most tests.
    """
    code = 0
    try:
        if module == "-c":
            sys.argv[1:] = arguments[1:]
            exec(arguments[0], {"__name__": "__main__"})
        elif module.endswith(".py"):
            sys.argv = [module, *arguments]
            sys.path.insert(0, os.path.dirname(module))
            runpy.run_path(module, run_name="__main__")
        else:
            sys.argv[1:] = arguments
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
