"""File locks that name their holder.

The kernel releases a lock when its holder ends. While a process holds the lock NAME, the file NAME.json beside it contains the
process's identity, for the messages of waiting processes.
"""

from __future__ import annotations

import functools
import getpass
import json
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

# A holder writes its identity right after it takes the lock.
_IDENTITY_WAIT_S = 0.5
_MAX_IDENTITY_BYTES = 1 << 16
# The kernel counts starts in ticks of 0.01 s; psutil's conversions round to floats.
_SAME_START_S = 0.5
# No machine runs for 30 years, and no clock shows a time before 2001.
_EPOCH_S = 1e9


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
    """The process that holds a lock.

    `space` is its `pid_namespace`, `started` is in seconds after the machine's boot, `since` in seconds since the epoch.
    """

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
        return cls(os.uname().nodename, pid_namespace(), pid, read_start(pid) or 0.0, _user(), time.time(), command)

    @property
    def has_ended(self) -> bool:
        """True if the process is known to have ended; never true for a process on another machine or in another container."""
        if self.space != pid_namespace():
            return False
        started, recorded = read_start(self.pid), self.started
        if recorded > _EPOCH_S:
            import psutil

            # Earlier versions recorded the time of day.
            recorded -= psutil.boot_time()
        return started is None or not is_same_start(started, recorded)

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

    lock = FileLock(path, timeout=timeout_s, mode=mode)
    try:
        lock.acquire()
    except Timeout:
        raise LockTimeout(str(path)) from None
    try:
        with _published_identity(path, command):
            yield
    finally:
        lock.release()


def read_holder(path: Path) -> Holder | None:
    """Return the process that holds the lock file `path`, or None if no process does or its identity is not published."""
    try:
        holder = Holder(**json.loads(_read_identity(_identity_path(path))))
    except (OSError, ValueError, TypeError):
        return None
    return None if holder.has_ended else holder


def _read_identity(path: Path) -> bytes:
    """Read an identity file; another user may have left a pipe in its place, and reading it would never end."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        return file.read(_MAX_IDENTITY_BYTES) or b""


def wait_for_holder(path: Path) -> Holder | None:
    """Return the process that holds the lock file `path`; wait half a second for its identity, then return None."""
    deadline = time.monotonic() + _IDENTITY_WAIT_S
    while (holder := read_holder(path)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    return holder


@contextmanager
def _published_identity(path: Path, command: str) -> Iterator[None]:
    identity = _identity_path(path)
    # Other users may write to a shared cache's folder: use a name that they cannot guess, and follow none of their links.
    partial = identity.with_name(f".{identity.name}.{secrets.token_hex(8)}")
    try:
        # The lock also holds without an identity. The identity need not survive a crash of the machine: its process does not.
        with suppress(OSError), open(partial, "x") as file:
            json.dump(asdict(Holder.this_process(command)), file)
            file.flush()
            os.replace(partial, identity)
        yield
    finally:
        # An identity file that cannot be removed names a process that has ended.
        for left in (partial, identity):
            with suppress(OSError):
                left.unlink(missing_ok=True)


def _identity_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
