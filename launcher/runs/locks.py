"""File locks that name their holder.

The kernel releases a lock when its holder ends. While a process holds the lock NAME, the file NAME.json beside it contains the
process's identity, for the messages of waiting processes.
"""

from __future__ import annotations

import functools
import getpass
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

# The kernel counts starts in ticks of 0.01 s; psutil's conversions round to floats.
_SAME_START_S = 0.5
# A waiting process warns at this interval.
WARN_EVERY_S = 600.0

# A logger without a handler writes warnings unformatted to standard error.
_LOG = logging.getLogger(__name__)


class LockTimeout(Exception):
    """Another process held the lock for longer than the caller waits."""


@functools.cache
def pid_namespace() -> str:
    """Return an id of the scope of this process's pid: one boot of one machine, and one pid namespace there.

    Containers on one machine may share its host name but not its processes, or its processes but not its name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


def read_start(pid: int) -> float | None:
    """Return the seconds from the machine's boot to the start of a process, or None if the process has ended.

    Unlike the time of day of its start, they stay the same when the machine's clock is set, as in the minutes after a boot.
    """
    # Commands that only read runs need no psutil, and the import takes a while.
    import psutil

    try:
        # psutil adds the time of the boot, which follows the clock. Some versions add the one that boot_time has read last.
        booted_at = psutil.boot_time()
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time() - booted_at
    except psutil.Error:
        return None


def is_same_start(one: float, other: float) -> bool:
    """Return whether two starts of a pid are those of one process: the kernel reuses the pids of ended processes."""
    return abs(one - other) < _SAME_START_S


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock; `space` is its `pid_namespace`, `started` in seconds after boot, `since` after the epoch."""

    host: str
    space: str
    pid: int
    started: float
    user: str
    since: float
    command: str

    @classmethod
    def this_process(cls, command: str) -> Holder:
        pid = os.getpid()
        try:
            user = getpass.getuser()
        except (KeyError, OSError):
            user = str(os.getuid())
        return cls(os.uname().nodename, pid_namespace(), pid, read_start(pid) or 0.0, user, time.time(), command)

    @property
    def has_ended(self) -> bool:
        """True if the process is known to have ended; never true for a process on another machine or in another container."""
        if self.space != pid_namespace():
            return False
        started = read_start(self.pid)
        return started is None or not is_same_start(started, self.started)

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, of user {self.user}, since {since}: {self.command}"


@contextmanager
def hold(path: Path, timeout_s: float, command: str, mode: int = -1) -> Iterator[None]:
    """Hold the lock file `path` and publish this process's identity beside it.

    `command` is this process's command line, without credentials: other users may read the identity. `mode` holds the
    permissions of the file if it is created; -1 leaves them to the umask.

    Raises:
        LockTimeout: if another process still holds the lock after `timeout_s` seconds.
        OSError: if the file cannot be created.
    """
    # Commands that only read runs take no lock, and the import takes a while.
    from filelock import FileLock, Timeout

    lock, identity = FileLock(path, timeout=timeout_s, mode=mode), _name_identity(path)
    try:
        lock.acquire()
    except Timeout:
        raise LockTimeout(str(path)) from None
    try:
        # The lock also holds without an identity.
        with suppress(OSError):
            identity.unlink(missing_ok=True)
            # In a folder of a group, a member could have put a link there; "x" follows none.
            with open(identity, "x") as file:
                file.write(json.dumps(asdict(Holder.this_process(command))))
        yield
    finally:
        # An identity file that cannot be removed names a process that has ended.
        with suppress(OSError):
            identity.unlink(missing_ok=True)
        lock.release()


@contextmanager
def wait_and_hold(path: Path, activity: str, command: str) -> Iterator[None]:
    """Hold the lock file `path` of a part of the cache once no other process does; until then, warn every WARN_EVERY_S seconds.

    `activity` describes in the warning what the other process does, as in "builds this data cache".
    """
    timeout_s = 0.0
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(hold(path, timeout_s, command, mode=0o600))
                break
            except LockTimeout:
                _LOG.warning("waiting for another process that %s (%s)", activity, read_holder(path) or path)
                timeout_s = WARN_EVERY_S
        yield


def read_holder(path: Path) -> Holder | None:
    """Return the process that holds the lock file `path`, or None if no process does or its identity is not published."""
    try:
        holder = Holder(**json.loads(_name_identity(path).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return None if holder.has_ended else holder


def _name_identity(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
