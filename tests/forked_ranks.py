"""Ranks of tests, forked from one process that has imported torch, transformers and DeepSpeed.

Importing them takes seconds of CPU in each rank, and most tests of ranks take less than that. `python -m forked_ranks DESCRIPTOR`
is the process that forks: it serves one request after the other until its pytest process ends.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

TESTS = Path(__file__).resolve().parent
_POLL_S = 0.005
# Importing the stack takes longer on a busy machine; a request waits for it.
_IMPORT_DEADLINE_S = 180.0
# Read while the server imports, so that ranks cannot have others: see launcher/worker/rank_process.py.
_VARIABLES = {
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class EndedRank:
    """How a rank ended: its exit code, negative for a signal, what its function returned, and all that it printed."""

    code: int
    value: Any
    output: str


class RankServer:
    """The pytest process's end: runs a function on several ranks, none of which outlives the call."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    def run(
        self,
        function: str,
        arguments: Sequence[Sequence[Any]],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        deadline_s: float = 120.0,
    ) -> list[EndedRank]:
        """Call `function`, spelled `module:name`, on as many new processes as there are lists of arguments (JSON).

        Each has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and RENDEZVOUS, a file for the ranks to meet, which lies in
        `folder` with their output. Whoever runs after `deadline_s` is killed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        size = str(len(arguments))
        meeting = folder / "rendezvous"
        meeting.unlink(missing_ok=True)
        sizes = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        common = {**kept, **_VARIABLES, **sizes, "RENDEZVOUS": str(meeting), **(environment or {})}
        ranks = [
            {
                "arguments": [*of_rank],
                "environment": {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                "output": str(folder / f"rank-{rank}.log"),
                "value": str(folder / f"rank-{rank}.json"),
            }
            for rank, of_rank in enumerate(arguments)
        ]
        for rank in ranks:
            Path(rank["value"]).unlink(missing_ok=True)
        codes = self._ask({"function": function, "ranks": ranks, "deadline_s": deadline_s}, deadline_s)
        return [
            EndedRank(code, _read_value(Path(rank["value"])), Path(rank["output"]).read_text())
            for code, rank in zip(codes, ranks, strict=True)
        ]

    def values(self, function: str, arguments: Sequence[Sequence[Any]], folder: Path, **options: Any) -> list[Any]:
        """What the function returned on each rank; fails where one of them failed."""
        ended = self.run(function, arguments, folder, **options)
        assert not any(rank.code for rank in ended), "\n".join(f"exit code {rank.code}:\n{rank.output[-3000:]}" for rank in ended)
        return [rank.value for rank in ended]

    def close(self) -> None:
        """End the server; ranks that run die with it."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
            self._process = self._connection = None

    def _ask(self, request: Mapping[str, Any], deadline_s: float) -> list[int]:
        if self._connection is None:
            self._start()
        assert self._connection is not None
        self._connection.settimeout(_IMPORT_DEADLINE_S + deadline_s)
        try:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
            with self._connection.makefile("r", encoding="utf-8") as answers:
                codes: list[int] = json.loads(answers.readline())
        except BaseException:
            # A test that was interrupted leaves a server that still waits for its ranks.
            self.close()
            raise
        return codes

    def _start(self) -> None:
        self._connection, theirs = socket.socketpair()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        # Modules of ranks lie beside the tests that use them.
        paths = [str(TESTS.parent), str(TESTS), *(str(path) for path in TESTS.iterdir() if path.is_dir())]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "forked_ranks", str(theirs.fileno())],
                env={**environment, **_VARIABLES, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )


def _read_value(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def serve(descriptor: int) -> None:
    """Fork the ranks of each request, wait for them, and answer with their exit codes."""
    from launcher.worker.fork_server import why_unsafe
    from launcher.worker.rank import die_with_parent

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import_stack()
    gc.freeze()
    gc.enable()
    assert (refusal := why_unsafe()) is None, refusal
    connection = socket.socket(fileno=descriptor)
    requests = connection.makefile("r", encoding="utf-8")
    while line := requests.readline():
        request = json.loads(line)
        pids = []
        for rank in request["ranks"]:
            pid = os.fork()
            if pid == 0:
                requests.close()
                connection.close()
                _be_rank(request["function"], rank)
            pids.append(pid)
        codes = _wait(pids, time.monotonic() + request["deadline_s"])
        connection.sendall(json.dumps(codes).encode() + b"\n")


def import_stack() -> None:
    """Import what ranks of any test need. Nothing is built."""
    import deepspeed  # noqa: F401
    import torch._dynamo  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import launcher.train.finish
    import launcher.train.loop
    import launcher.train.start  # noqa: F401
    from launcher.train.engine import import_muon

    import_muon()


def _wait(pids: Sequence[int], until: float) -> list[int]:
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return [codes[pid] for pid in pids]


def _be_rank(function: str, rank: Mapping[str, Any]) -> NoReturn:
    from launcher.worker.rank import die_with_parent

    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    output = os.open(rank["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(rank["environment"])
    code = 0
    try:
        value = pkgutil.resolve_name(function)(*rank["arguments"])
        Path(rank["value"]).write_text(json.dumps(value))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of destroyed engines are still alive in C++ and would abort an orderly exit now and then.
    os._exit(code)


if __name__ == "__main__":
    gc.disable()
    serve(int(sys.argv[1]))
