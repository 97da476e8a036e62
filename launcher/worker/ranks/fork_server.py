"""The fork server, from which ranks are forked: `python -m launcher.worker.ranks.fork_server SOCKET PLAN`.

Importing torch, transformers and DeepSpeed takes seconds at every start and restart. The server imports them once per node
and then forks a rank in milliseconds. It forks twice, and the intermediate process exits. The kernel then reparents the rank to
the node's agent, which is a child subreaper during the fork (launcher.worker.ranks.rank_process). The rank is therefore a
child of the agent, as if the agent had started it, and receives signals in the same way.

A fork copies only the thread that forks. If the server has threads besides the main one, or an open CUDA context, it refuses,
and the agent starts ranks as new processes.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.child_process import die_with_parent
from launcher.plan.launch_plan import LaunchPlan
from launcher.worker.ranks import rank_main
from launcher.worker.ranks.rank_env import name_process

_CUDA_NOT_INITIALIZED = 3
# Seconds from the fork of a rank until the kernel has reparented it to the agent.
_ADOPTION_S = 30.0

# Prefixes of variables that are read after the fork. Variables that libraries may read on import must have the same values in
# the server and the rank.
_READ_LATER = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "TORCH_NCCL_", "NCCL_", "GLOO_"),
    *("LAUNCHER_", "WANDB_", "HF_TOKEN", "AWS_", "GOOGLE_", "TORCH_FR_"),
)


def find_differing(environment: Mapping[str, str], imported_with: Mapping[str, str]) -> list[str]:
    """Return the rank's variables whose values differ from those that libraries may have read when the server imported them."""
    names = environment.keys() | imported_with.keys()
    changed = (name for name in names if environment.get(name) != imported_with.get(name))
    return sorted(name for name in changed if not name.startswith(_READ_LATER))


def main(descriptor: int, plan_path: str) -> None:
    """Import what ranks need, then fork a rank per request until the agent closes the socket. Forked ranks also return here."""
    die_with_parent()
    name_process(f"launcher fork server: {plan_path}", "fork-server")
    # Ctrl-C reaches the terminal's whole process group; the agent decides what it means for a rank.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    agent_pid = os.getppid()
    plan = LaunchPlan.load(Path(plan_path))
    # DeepSpeed reads it on import.
    os.environ["DS_ACCELERATOR"] = plan.topology.device
    from launcher.train.preload import import_stack

    import_stack(plan, tracks=True)
    arguments = _serve(socket.socket(fileno=descriptor), agent_pid)
    if arguments is not None:
        rank_main.main(arguments[0], int(arguments[1]))


def _serve(connection: socket.socket, agent_pid: int) -> Sequence[str] | None:
    """Report whether ranks can be forked, then fork one per request.

    Returns the rank's arguments in the rank, and None in the server when the agent has ended.
    """
    refusal = find_fork_hazard()
    requests = connection.makefile("r", encoding="utf-8")
    connection.sendall(json.dumps({"refusal": refusal}).encode() + b"\n")
    while line := requests.readline():
        request: dict[str, Any] = json.loads(line)
        answer: dict[str, Any]
        try:
            pid = _fork_orphan()
        except OSError as error:
            answer = {"refusal": f"it cannot fork: {error.strerror or error}"}
        else:
            if pid == 0:
                requests.close()
                connection.close()
                until = time.monotonic() + _ADOPTION_S
                while os.getppid() != agent_pid:
                    if time.monotonic() > until:
                        # The agent has ended.
                        os._exit(1)
                    time.sleep(0.0005)
                os.environ.clear()
                os.environ.update(request["environment"])
                arguments: Sequence[str] = request["arguments"]
                sys.argv[1:] = arguments
                return arguments
            answer = {"pid": pid}
        try:
            connection.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            break
    return None


def _fork_orphan() -> int:
    """Fork a process whose parent ends at once; returns its process id in the caller and 0 in the process itself."""
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        os.close(reader)
        try:
            pid = os.fork()
        except OSError as error:
            os.write(writer, f"-{error.errno}".encode())
            os._exit(1)
        if pid == 0:
            os.close(writer)
            return 0
        os.write(writer, str(pid).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        pid = int(answer.read() or 0)
    os.waitpid(between, 0)
    if pid <= 0:
        raise OSError(-pid, os.strerror(-pid))
    return pid


def find_fork_hazard() -> str | None:
    """Return why this process must not be forked, or None if it may be."""
    threads = []
    for task in Path("/proc/self/task").iterdir():
        if task.name != str(os.getpid()):
            with suppress(OSError):
                threads.append((task / "comm").read_text().strip())
    if threads:
        return f"importing has started threads ({', '.join(sorted(threads))}), which a forked process lacks"
    if _has_initialized_cuda():
        return "importing has initialized CUDA, which a forked process cannot use"
    return None


def _has_initialized_cuda() -> bool:
    """Return whether any library has called cuInit, without calling it."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
    except OSError:
        # Nothing has loaded the driver.
        return False
    context = ctypes.c_void_p()
    return bool(driver.cuCtxGetCurrent(ctypes.byref(context)) != _CUDA_NOT_INITIALIZED)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
