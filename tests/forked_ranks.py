"""Test ranks, forked from one process that has imported torch, transformers and DeepSpeed.

These imports cost each rank seconds of CPU time, more than most tests of ranks need. A rank runs `python -m forked_ranks FUNCTION
ARGUMENTS FILE`: it calls the function, given as `module:name`, and writes the result to FILE.
"""

from __future__ import annotations

import functools
import json
import os
import pkgutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from forked import ForkedProcess, ForkServer

# The server reads these on import, so ranks cannot change them: see launcher/worker/ranks/rank_process.py.
VARIABLES = {
    **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class EndedRank:
    """How a rank ended: its exit code (negative for a signal), its function's result, and its output."""

    code: int
    value: Any
    output: str


class RankServer:
    """Runs a function on several ranks; none of them outlives the call."""

    def __init__(self, server: Callable[[], ForkServer]) -> None:
        self._server = server

    def run(
        self,
        function: str,
        arguments: Sequence[Sequence[Any]],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
        deadline_s: float = 120.0,
    ) -> list[EndedRank]:
        """Call `function`, given as `module:name`, on one new process per argument list (JSON).

        Each has RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and RENDEZVOUS, a file through which the ranks meet; it is in
        `folder` with their output. Ranks that still run after `deadline_s` are killed.
        """
        folder.mkdir(parents=True, exist_ok=True)
        meeting = folder / "rendezvous"
        meeting.unlink(missing_ok=True)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(arguments)))
        common = {**kept, **VARIABLES, **sizes, "RENDEZVOUS": str(meeting), **(environment or {})}
        ranks: list[ForkedProcess] = []
        try:
            for rank, of_rank in enumerate(arguments):
                value = folder / f"rank-{rank}.json"
                value.unlink(missing_ok=True)
                variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                with open(folder / f"rank-{rank}.log", "w") as log:
                    command = ("forked_ranks", function, json.dumps([*of_rank]), str(value))
                    ranks.append(self._server().popen(*command, stdout=log.fileno(), stderr=log.fileno(), env=variables))
            codes = _wait(ranks, time.monotonic() + deadline_s)
        finally:
            for process in ranks:
                process.kill()
        return [
            EndedRank(code, _read_value(folder / f"rank-{rank}.json"), (folder / f"rank-{rank}.log").read_text())
            for rank, code in enumerate(codes)
        ]

    def values(self, function: str, arguments: Sequence[Sequence[Any]], folder: Path, **options: Any) -> list[Any]:
        """The function's result on each rank; fails if any rank failed."""
        ranks = self.run(function, arguments, folder, **options)
        assert not any(rank.code for rank in ranks), "\n".join(f"exit code {rank.code}:\n{rank.output[-3000:]}" for rank in ranks)
        return [rank.value for rank in ranks]


def _wait(ranks: Sequence[ForkedProcess], until: float) -> list[int]:
    codes = []
    for rank in ranks:
        try:
            codes.append(rank.wait(max(0.0, until - time.monotonic())))
        except subprocess.TimeoutExpired:
            rank.kill()
            codes.append(rank.wait(10.0))
    return codes


def _read_value(path: Path) -> Any:
    return json.loads(path.read_text()) if path.exists() else None


def main(function: str, arguments: str, value: str) -> NoReturn:
    """Run as a rank."""
    import cpuinfo

    from launcher.child_process import die_with_parent
    from launcher.train.engine import lock_builds, skip_unused_kernels

    die_with_parent()
    # DeepSpeed asks several times, and each answer takes a second and several processes.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    lock_builds()
    skip_unused_kernels()
    code = 0
    try:
        Path(value).write_text(json.dumps(pkgutil.resolve_name(function)(*json.loads(arguments))))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of destroyed engines still run in C++ and occasionally abort a normal exit.
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
