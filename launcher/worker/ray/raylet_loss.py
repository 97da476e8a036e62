"""Records the loss of the driver's raylet: `python -m launcher.worker.ray.raylet_loss PLAN ATTEMPT DRIVER EPOLL RAYLET`.

Ray notices the loss at once, or 15 s later through its health checks. It then ends the driver within milliseconds, often before
the driver can write why. This process starts with the driver, in its own session, waits for the end of both, and writes the
cause if the driver did not.

DRIVER is the driver's process id; EPOLL and RAYLET are the numbers of inherited descriptors. RAYLET is a connection to the
raylet. EPOLL watches this connection and a pipe from the driver, and reports the one that closed first:

- The connection, if the raylet ended by itself and the driver after it. Linux closes the files of a dead process from the newest
  to the oldest, so the raylet's end of this connection closes before the older connection by which the driver notices the loss.
- The pipe, if the driver ended for another reason.

If the driver started the raylet, Linux ends the raylet when the driver's main thread ends. The other threads may end later, and
the pipe closes with them: if the driver was already ending when the connection closed, either may have ended first.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_CONNECT_S = 5.0
_END_S = 5.0
# PF_EXITING of Linux' sched.h.
_EXITING = 0x4
MESSAGE = f"the raylet of {os.uname().nodename} (Ray's process on the driver's node) was killed or has ended"
_EITHER_MESSAGE = f"the run's driver or {MESSAGE}"


@dataclass(frozen=True)
class LocalRaylet:
    """This node's raylet, which listens at `socket_name`."""

    socket_name: str

    @property
    def has_ended(self) -> bool:
        """Return whether nothing listens at its socket any more. Everything that Ray runs on this node ends with the raylet."""
        try:
            with self.connect():
                return False
        except (ConnectionRefusedError, FileNotFoundError):
            return True
        except OSError:
            # A live raylet may have a full connection queue, or this process may have no descriptor left.
            return False

    def connect(self) -> socket.socket:
        """Connect to the raylet, which accepts silent connections; raises OSError if it has ended or is busy."""
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.settimeout(_CONNECT_S)
            connection.connect(self.socket_name)
        except OSError:
            connection.close()
            raise
        return connection


@contextmanager
def recorded(plan_path: str, attempt: int, raylet: LocalRaylet) -> Iterator[dict[str, object]]:
    """Ensure that a loss of the raylet is recorded, whatever happens to this process; yields the recording process's `job` entry.

    If the raylet has ended by the end of the block, the recording process stays until this process ends. The entry is empty if
    the raylet accepts no connection: the driver must then record the loss itself.
    """
    from launcher.clusters import detached_process

    with ExitStack() as stack:
        try:
            connection = stack.enter_context(raylet.connect())
        except OSError:
            yield {}
            return
        # Only this process holds the write end.
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        # Register here: the ready list keeps the order in which both ended, however late the other process looks.
        epoll = stack.enter_context(select.epoll())
        for descriptor in (connection.fileno(), reader):
            # epoll reports the end of a connection without being asked to.
            epoll.register(descriptor, 0)
        descriptors = [epoll.fileno(), connection.fileno(), reader]
        numbers = (attempt, os.getpid(), *descriptors[:2])
        command = [sys.executable, "-m", __name__, plan_path, *map(str, numbers)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors, start_new_session=True)
        try:
            yield detached_process.describe_process(process.pid)
        finally:
            if not raylet.has_ended:
                process.kill()
                # If an error ends this block, that is the error to report.
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_S)


def main(plan_path: str, attempt: int, driver_pid: int, epoll_fd: int, raylet_fd: int) -> None:
    """Wait for the driver to end; write the cause if its raylet ended first and the end of the run is not recorded."""
    os.umask(0o077)
    epoll = select.epoll.fromfd(epoll_fd)
    ((first, _),) = epoll.poll(maxevents=1)
    if first != raylet_fd:
        # The driver ended for another reason; a private Ray ends with it.
        return
    message = _EITHER_MESSAGE if _is_ending(driver_pid) else MESSAGE
    epoll.unregister(raylet_fd)
    epoll.poll(maxevents=1)
    # Few drivers lose their raylet: the process of each would otherwise spend a second of CPU time on imports.
    from launcher.clusters import detached_process
    from launcher.errors import LauncherError
    from launcher.plan.launch_plan import LaunchPlan
    from launcher.plan.run_dir import RunDir
    from launcher.worker.ray.run_end import newest_own_attempt, record_end, retry
    from launcher.worker.wandb_closing import close_wandb_run

    plan = retry(lambda: LaunchPlan.load(plan_path))
    run = RunDir(Path(plan.run_dir))
    with suppress(OSError, LauncherError):
        number = retry(lambda: newest_own_attempt(run, attempt))
        record_end(run, number, "failed", f"{message}; {detached_process.resume_hint(run)}")
        close_wandb_run(plan, plan_path, run, number)


def _is_ending(pid: int) -> bool:
    """Return whether a process has ended, or one of its threads is exiting."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except OSError:
        return True
    # The flags are the seventh field after the command's name, which may contain blanks and parentheses.
    return any(int(stat.rpartition(")")[2].split()[6]) & _EXITING for stat in stats)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
