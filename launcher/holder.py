"""Who holds a lock, and the lock of a run while one of its attempts is started."""

from __future__ import annotations

import functools
import getpass
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.config.redaction import redact
from launcher.errors import SubmitError

_LOCK = ".lock"
# Between taking the lock and leaving a name beside it.
_NAMELESS_S = 0.5


@functools.cache
def pid_space() -> str:
    """Within what process ids of this process mean something: one boot of a machine, and there one pid namespace.

    Containers of one machine may share its host name and not its processes, or its processes and not its name.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return os.uname().nodename


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock; `space` see `pid_space`, `started` and `since` are seconds since the epoch."""

    host: str
    space: str
    pid: int
    started: float
    user: str
    since: float
    command: str

    @classmethod
    def this_process(cls) -> Holder:
        pid = os.getpid()
        return cls(os.uname().nodename, pid_space(), pid, _started(pid) or 0.0, _user(), time.time(), _command())

    @property
    def is_gone(self) -> bool:
        """True where this is known of it: of another machine's or container's processes nothing is."""
        if self.space != pid_space():
            return False
        started = _started(self.pid)
        # The number of a process that has ended is given to another one in time.
        return started is None or abs(started - self.started) >= 1

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, of user {self.user}, since {since}: {self.command}"


@contextmanager
def held(folder: Path, wait_s: float) -> Iterator[None]:
    """Hold the lock of the run in `folder`, with this process's identity beside it.

    Raises:
        SubmitError: where another process still holds it after `wait_s`, with who that is.
    """
    # Those who only look at runs take no lock, and it takes a while to load.
    from filelock import FileLock, Timeout

    lock = FileLock(folder / _LOCK, timeout=wait_s)
    try:
        lock.acquire()
    except Timeout:
        holder = _await_name(folder)
        raise SubmitError(
            "another command is starting this run at this moment",
            where=str(folder),
            value="" if holder is None else str(holder),
            remedy="wait until it is done"
            if holder is None
            else f"wait until it is done, or end it on {holder.host}: kill {holder.pid}",
        ) from None
    try:
        with named(folder / _LOCK):
            yield
    finally:
        lock.release()


@contextmanager
def named(lock: Path) -> Iterator[None]:
    """Have this process's identity beside the file `lock`, which it holds."""
    try:
        _leave_name(lock)
        yield
    finally:
        _identity(lock).unlink(missing_ok=True)


def holder_of(folder: Path) -> Holder | None:
    """Who holds the lock of the run in `folder`, as `holder_at` tells it."""
    return holder_at(folder / _LOCK)


def holder_at(lock: Path) -> Holder | None:
    """Who holds the file `lock`; None where nobody does, or where a process has died while it did."""
    try:
        found = Holder(**json.loads(_identity(lock).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return None if found.is_gone else found


def _await_name(folder: Path) -> Holder | None:
    until = time.monotonic() + _NAMELESS_S
    while (found := holder_of(folder)) is None and time.monotonic() < until:
        time.sleep(0.05)
    return found


def _identity(lock: Path) -> Path:
    return lock.with_name(f"{lock.name}.json")


def _leave_name(lock: Path) -> None:
    partial = _identity(lock).with_name(f"{_identity(lock).name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(asdict(Holder.this_process())))
        os.replace(partial, _identity(lock))
    except OSError:
        # The lock holds without a name.
        partial.unlink(missing_ok=True)


def _started(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _command() -> str:
    """This process's command line as a person typed it, without what looks like a credential."""
    program, *arguments = sys.orig_argv
    return redact(shlex.join([Path(program).name, *arguments]))
