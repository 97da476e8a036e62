"""How the commands of several machines meet: the others connect to node 0's command, and stay connected until the attempt ends.

Node 0 greets a machine with a random number that it has also written to run.root. The machine answers who it is, what it was told
to run, and whether it has found the number there: otherwise it has a different run.root. Then node 0 tells what the start is
waiting for, which attempt begins, and how it ends. It names no file and no command: the plan is read from the run directory,
which is checked like any run that other users could have changed.

A machine is lost if its connection closes while the attempt runs, or if its kernel does not answer the probes of an idle
connection. Everything else about an attempt stands in its journal.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import connection as framed
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from launcher.clusters import network
from launcher.errors import EXIT_REFUSED, LauncherError, Problem, SubmitError, printable
from launcher.runs import atomic_files, json_records

if TYPE_CHECKING:
    from launcher.config.sections.static import NodeIdentity

M = TypeVar("M", "Join", "Notice")

# Seconds that node 0 waits for the others to start, and they for node 0; while node 0 is connected, they wait for its plan.
WAIT_S = 1800.0
# Seconds without an answer after which a machine counts as lost; tests shorten it.
LOST_S = int(os.environ.get("LAUNCHER_LOST_NODE_SECONDS", "60"))
# Probes in that time.
_NUM_PROBES = 6
# A network file system may show a file this late.
SHARED_S = 20.0
# Seconds between attempts to connect, and those that node 0 gives the others to read how the start or the attempt ended.
_CONNECT_EVERY_S, _LINGER_S = 0.25, 5.0
_CONNECT_S = 5.0
_MAX_MESSAGE_BYTES = 1 << 20
_MAX_DIFFERENCES = 5
# The kinds of node 0's notices.
GREETING, WAIT, BUSY, READY, END = "greeting", "wait", "busy", "ready", "end"


@dataclass(frozen=True)
class Join:
    """Machine `node`, the host `host`, was told to run `command` (by keys); `sees_root`: it has found node 0's number."""

    node: int
    host: str
    sees_root: bool
    command: dict[str, str]


@dataclass(frozen=True)
class Notice:
    """Of node 0; `kind` determines what `text` is.

    GREETING: the number in run.root. WAIT: what the start waits for. BUSY: why the machine has to try again. READY: `attempt` has
    begun. END: why the attempt or its start has ended; `code` is the exit code.
    """

    kind: str
    text: str = ""
    attempt: int = 0
    code: int = 0


class Connection:
    """A connection between two commands; their kernels probe whether the other machine is still there."""

    def __init__(self, connected: socket.socket) -> None:
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        probe_s = max(1, LOST_S // _NUM_PROBES)
        options = (socket.TCP_KEEPIDLE, probe_s), (socket.TCP_KEEPINTVL, probe_s), (socket.TCP_KEEPCNT, _NUM_PROBES - 1)
        # What was sent and not confirmed would postpone the probes.
        for option, value in (*options, (socket.TCP_USER_TIMEOUT, LOST_S * 1000)):
            connected.setsockopt(socket.IPPROTO_TCP, option, value)
        self._framed = framed.Connection(connected.detach())
        self.poll, self.close = self._framed.poll, self._framed.close

    def send(self, message: Join | Notice) -> None:
        """Send a message; a failure is left to the next `receive`."""
        with suppress(OSError):
            self._framed.send_bytes(json.dumps(asdict(message)).encode())

    def receive(self, kind: type[M]) -> M:
        """Wait for the next message. Raises OSError, with the reason, if the connection has ended or carries something else."""
        try:
            return json_records.loads(kind, self._framed.recv_bytes(_MAX_MESSAGE_BYTES), "a message")
        except EOFError:
            raise OSError("its command has ended") from None
        except LauncherError:
            raise OSError("it sent something else than messages of this launcher") from None


def marker(run: Path) -> Path:
    """Return the path of the file in run.root with the current start's number."""
    return run.parent / f".{run.name}.start"


class Meeting:
    """Node 0's side. `endpoint` is where it listens, None for a single machine."""

    def __init__(self, here: NodeIdentity, run: Path, command: Mapping[str, str], endpoint: network.Endpoint | None) -> None:
        self._here, self._run, self._command = here, run, dict(command)
        self.endpoint = endpoint
        self._number, self._host = secrets.token_hex(16), network.node_name()
        self._lock = threading.Lock()
        # The connections and hosts of the machines that have joined.
        self._members: dict[int, tuple[Connection, str]] = {}
        self._problem: Problem | None = None
        self._latest = Notice(WAIT, "node 0 is planning")
        # What to do when a machine is lost, with its number and the reason; None before the attempt.
        self._on_loss: Callable[[int, str], None] | None = None
        self._listener: socket.socket | None = None

    def open(self) -> Meeting:
        """Write the number of this start and listen."""
        if self.endpoint is None:
            return self
        address, port = self.endpoint.address, self._here.port
        action, where, value = "listen", "cluster.master_port", f"{address}:{port}"
        try:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            listener = socket.create_server((address, port), family=family, backlog=4096)
            action, where, value = "write", "run.root", str(self._run.parent)
            self._run.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.write_text(marker(self._run), self._number)
        except OSError as error:
            raise SubmitError(f"node 0 cannot {action} here: {error.strerror or error}", where=where, value=value) from None

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connected, _ = listener.accept()
                    threading.Thread(target=self._serve, args=(connected,), daemon=True).start()

        self._listener = listener
        threading.Thread(target=accept, name="meeting", daemon=True).start()
        print(f"{self._here.label}: the others find it at {address}:{port} ({self.endpoint.interface})", flush=True)
        return self

    def await_everyone(self) -> tuple[str, ...]:
        """Wait until every machine has joined; returns their names, unique even if host names repeat."""
        until, printed = time.monotonic() + WAIT_S, ""
        where = "" if self.endpoint is None else f"{self.endpoint.address}:{self._here.port}"
        while True:
            with self._lock:
                hosts = self._hosts()
            if self._problem is not None:
                raise SubmitError(self._problem)
            missing = ", ".join(f"node {node}" for node in range(self._here.nodes) if node not in hosts)
            if not missing:
                names = [*hosts.values()]
                return tuple(hosts[node] if names.count(hosts[node]) == 1 else f"{hosts[node]}-{node}" for node in sorted(hosts))
            if missing != printed:
                printed = missing
                self._tell(Notice(WAIT, f"node 0 is waiting for {missing}"))
                print(f"{self._here.label}: waiting for {missing} at {where}", flush=True)
            if time.monotonic() > until:
                remedy = "start the same command on every machine; check that they reach node 0 at this address"
                raise SubmitError(f"{missing} of {self._here.nodes} did not join", where=where, remedy=remedy)
            time.sleep(0.05)

    def begin(self, attempt: int, on_loss: Callable[[int, str], None]) -> None:
        """Tell the machines that the attempt has begun; no other can join it. `on_loss` receives the lost ones, and why."""
        self._on_loss = on_loss
        self._tell(Notice(READY, attempt=attempt))
        for node in {*range(1, self._here.nodes)} - self._members.keys():
            on_loss(node, "its command has ended")

    def close(self, code: int, text: str) -> None:
        """Tell the machines how the attempt or its start has ended; machines that start a moment late learn of a refusal, too."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._tell(Notice(END, text, code=code))
        until = time.monotonic() + _LINGER_S
        while time.monotonic() < until and (self._members or self._on_loss is None):
            time.sleep(0.02)
        # Closing alone would not end the thread that accepts connections.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        with suppress(OSError):
            marker(self._run).unlink()

    def _hosts(self) -> dict[int, str]:
        return {0: self._host} | {node: host for node, (_, host) in self._members.items()}

    def _tell(self, notice: Notice) -> None:
        with self._lock:
            self._latest = notice
            for connection, _ in self._members.values():
                connection.send(notice)

    def _serve(self, connected: socket.socket) -> None:
        """Greet a machine, and wait for the end of its connection."""
        connection = Connection(connected)
        connection.send(Notice(GREETING, self._number))
        try:
            joined = connection.receive(Join)
        except OSError:
            return connection.close()
        node = joined.node
        with self._lock:
            refusal: Notice | None = None
            if self._on_loss is not None and self._latest.kind != END:
                refusal = Notice(BUSY, "the attempt that runs has begun without this command")
            elif (problem := self._find_problem(joined)) is not None:
                self._problem = self._problem or problem
                refusal = Notice(END, str(problem), code=EXIT_REFUSED)
            else:
                self._members[node] = connection, joined.host
            connection.send(refusal or self._latest)
        if refusal is None:
            try:
                connection.receive(Join)
            except OSError as error:
                reason = error.strerror or str(error)
            with self._lock:
                del self._members[node]
                on_loss = self._on_loss if self._latest.kind != END else None
            if on_loss is not None:
                on_loss(node, reason)
        return connection.close()

    def _find_problem(self, joined: Join) -> Problem | None:
        """Return why the machine does not belong to this start."""
        both = [(key, *(one.get(key, "-") for one in (joined.command, self._command))) for key in joined.command | self._command]
        different = [(key, f"{key}: {there} there, {here} on node 0") for key, there, here in both if there != here]
        if different:
            keys, values = zip(*different[:_MAX_DIFFERENCES], strict=True)
            message = f"node {joined.node} ({joined.host}) was started with a different command from node 0"
            remedy = "start the same command on every machine, with the same version of the launcher"
            return Problem(message, keys[0], "; ".join(values), remedy)
        if joined.node in (hosts := self._hosts()):
            value = f"{joined.host} and {hosts[joined.node]}"
            remedy = "start the command once on each machine, each with its own index, from 0"
            return Problem(f"two commands claim to be node {joined.node}", "cluster.node_rank", value, remedy)
        if not joined.sees_root:
            return Problem(
                f"run.root is not shared: {joined.host} does not see what {self._host} writes there",
                "run.root",
                str(self._run.parent),
                "set run.root to a folder on storage that every machine mounts under the same path",
            )
        return None


def join(
    here: NodeIdentity, run: Path, command: Mapping[str, str], describe_end: Callable[[], str | None]
) -> tuple[int, Connection] | str:
    """Join node 0 and wait for the attempt that it begins, and show what it is waiting for.

    Returns the attempt and the connection; or why nothing is left to do: `describe_end` returns why the run is over, None if it
    continues, because node 0 may have ended before this machine connected.

    Raises:
        SubmitError: if node 0 is unreachable in time, refuses, or ends.
    """
    address, printed, begun = f"{here.address}:{here.port}", "", time.monotonic()

    def show(awaited: str) -> None:
        nonlocal printed
        if awaited != printed:
            printed = awaited
            print(printable(f"{here.label}: waiting for {awaited}"), flush=True)

    while True:
        try:
            connection = Connection(socket.create_connection((str(here.address), here.port), timeout=_CONNECT_S))
        except OSError:
            show(f"node 0 at {address}")
            if (reason := describe_end()) is not None:
                return reason
            if time.monotonic() - begun > WAIT_S:
                remedy = "start the command on node 0; check cluster.master_addr and cluster.master_port"
                raise SubmitError("node 0 did not start", where=address, remedy=remedy) from None
            time.sleep(_CONNECT_EVERY_S)
            continue
        has_joined = False
        try:
            sees_root = _finds_marker(run, connection.receive(Notice).text)
            connection.send(Join(here.node, network.node_name(), sees_root, dict(command)))
            while (notice := connection.receive(Notice)).kind in (WAIT, BUSY):
                has_joined, begun = notice.kind == WAIT, time.monotonic()
                show(f"the plan ({notice.text})")
            if notice.kind == READY:
                return notice.attempt, connection
            connection.close()
            if notice.code:
                raise SubmitError(f"node 0 has refused the start: {notice.text}", where=address)
            return notice.text
        except OSError:
            if has_joined:
                remedy = "look at the output of the command on node 0, then repeat the command on every machine"
                raise SubmitError("node 0 ended before its plan was ready", where=address, remedy=remedy) from None
        time.sleep(_CONNECT_EVERY_S)


def _finds_marker(run: Path, number: str) -> bool:
    """Return whether node 0's number is in run.root within the time that a network file system takes to show it."""
    until = time.monotonic() + SHARED_S
    while time.monotonic() < until:
        with suppress(OSError, ValueError):
            if marker(run).read_text() == number:
                return True
            atomic_files.refresh_directory(run.parent)
        time.sleep(_CONNECT_EVERY_S)
    return False


def head_endpoint(here: NodeIdentity, interface: str | None) -> network.Endpoint | None:
    """Return where node 0 listens, or None for a single machine."""
    if here.nodes == 1:
        return None
    return network.require_private(network.endpoint_of(str(here.address), interface), interface)
