"""How the commands of several machines meet: the others connect to node 0's command, and stay connected until the attempt ends.

A machine first says who it is and what it was told to run. Node 0 answers with a random number, which it has also written to
run.root: a machine that does not find it there has a different run.root. Then node 0 tells what the start is waiting for, which
attempt begins, and how it ends. It names no file and no command: the plan is read from the run directory, which is checked like
any run that other users could have changed.

While the attempt runs, each command tells the others how its own agent has ended. A machine whose connection closes or falls
silent is lost. The messages are JSON objects, one a line.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.clusters import network
from launcher.errors import EXIT_REFUSED, ConfigError, LauncherError, Problem, SubmitError, printable
from launcher.runs import atomic_files, json_records
from launcher.tracking.metrics import format_duration

if TYPE_CHECKING:
    from launcher.config.sections.static import NodeIdentity

# Seconds that node 0 waits for the others to start, and they for node 0; while node 0 is connected, they wait for its plan.
WAIT_S = 1800.0
# Seconds without a sign of life after which a machine counts as lost; tests shorten it.
LOST_S = float(os.environ.get("LAUNCHER_LOST_NODE_SECONDS", "60"))
# Both sides send this many signs of life in that time.
_LOOKS = 6
# A network file system may show a file this late.
SHARED_S = 20.0
# Seconds without a connection after which a machine looks whether the run is already over.
OVER_AFTER_S = 3.0
# Seconds between attempts to connect, and those that node 0 gives the others to read how the start or the attempt ended.
_CONNECT_EVERY_S, _LINGER_S = 0.25, 5.0
_CONNECT_S = 5.0
_MAX_MESSAGE_BYTES = 1 << 20
_MAX_DIFFERENCES = 5
# The kinds of messages.
JOIN, SEES, WAIT, READY, AGENT_END, END = "join", "sees", "wait", "ready", "agent end", "end"
ALIVE, LOST = "alive", "lost"


@dataclass(frozen=True)
class MeetingMessage:
    """`kind` determines what the fields mean, and which are set.

    JOIN: machine `node` of `nodes` on the host `text` was told to run `command` (by keys) in the run directory `run`. SEES: it
    has found node 0's number (`nonce`) in run.root, or has not (`text` is set). WAIT: node 0 does `text`. READY: `attempt` begins
    with machines called `names`. AGENT_END: the agent of machine `node` has ended;
    `text` is why the attempt cannot go on, if so, and `is_lost` whether the agent left no record. END: the attempt or its start
    has ended because of `text`; the exit code is `code`. LOST: a connection has ended because of `text`; it is never sent.
    """

    kind: str
    text: str = ""
    node: int = 0
    nodes: int = 0
    run: str = ""
    command: dict[str, str] = field(default_factory=dict)
    nonce: str = ""
    attempt: int = 0
    names: tuple[str, ...] = ()
    is_lost: bool = False
    code: int = 0


class Connection:
    """A connection between two commands, which shows the other side that this one is alive. `messages` yields what arrives."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._lock, self._closed = connected, threading.Lock(), threading.Event()
        self.messages = self._read()
        connected.settimeout(LOST_S / _LOOKS)

        def send_signs() -> None:
            while not self._closed.wait(LOST_S / _LOOKS):
                self.send(MeetingMessage(ALIVE))

        threading.Thread(target=send_signs, name="signs of life", daemon=True).start()

    def send(self, message: MeetingMessage) -> None:
        """Send a message. If it cannot be sent, neither can signs of life, and both sides find the connection lost."""
        line = json.dumps({key: value for key, value in asdict(message).items() if value}).encode() + b"\n"
        with self._lock, suppress(OSError):
            self._socket.sendall(line)

    def close(self) -> None:
        self._closed.set()
        # Also ends a read in another thread.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> Iterator[MeetingMessage]:
        """Yield all messages but signs of life; the last one is LOST."""
        buffer, num_silent, reason = b"", 0, ""
        while not reason:
            try:
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                # Counted instead of measured: while this machine is suspended, the other one is not silent.
                num_silent += 1
                reason = f"no sign of life for {format_duration(LOST_S)}" if num_silent == _LOOKS else ""
                continue
            except OSError as error:
                reason = f"its connection has failed: {error.strerror or error}"
                break
            num_silent = 0
            *lines, buffer = (buffer + data).split(b"\n")
            try:
                messages = [json_records.loads(MeetingMessage, line, "a message") for line in lines]
            except LauncherError:
                reason = "it sent something else than messages of this launcher"
                break
            yield from (message for message in messages if message.kind != ALIVE)
            if not data or len(buffer) > _MAX_MESSAGE_BYTES:
                reason = "its command has ended"
        self.close()
        yield MeetingMessage(LOST, reason)


def marker(run: Path) -> Path:
    """Return the path of the file in run.root with the current start's number."""
    return run.parent / f".{run.name}.start"


@dataclass
class _Member:
    """A machine that has joined; `sees` is whether it has found the number in run.root."""

    connection: Connection
    host: str
    sees: bool = False


class Meeting:
    """Node 0's side. `endpoint` is where it listens, None for a single machine."""

    def __init__(self, here: NodeIdentity, run: Path, command: Mapping[str, str], endpoint: network.Endpoint | None) -> None:
        self._here, self._run, self._command = here, run, dict(command)
        self.endpoint = endpoint
        self._nonce, self._host = secrets.token_hex(16), network.node_name()
        self._lock = threading.Lock()
        self._members: dict[int, _Member] = {}
        self._problem: Problem | None = None
        self._latest = MeetingMessage(WAIT, "node 0 is planning")
        # Set while an attempt runs: the machines' names, and what to do when an agent ends.
        self._names: tuple[str, ...] = ()
        self._on_end: Callable[[MeetingMessage], None] = lambda end: None
        # The machines whose agents have ended, or that know that there is no attempt.
        self._ended: set[int] = set()
        self._listener: socket.socket | None = None

    def open(self) -> Meeting:
        """Write the number of this start and listen.

        Raises:
            SubmitError: if run.root cannot be written, or the port is taken.
        """
        if self.endpoint is None:
            return self
        address, port = self.endpoint.address, self._here.port
        action, where, value = "write", "run.root", str(self._run.parent)
        try:
            self._run.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.write_text(marker(self._run), self._nonce)
            action, where, value = "listen", "cluster.master_port", f"{address}:{port}"
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self._listener = listener = socket.create_server((address, port), family=family, backlog=4096)
        except OSError as error:
            self._remove_marker()
            raise SubmitError(f"node 0 cannot {action} here: {error.strerror or error}", where=where, value=value) from None

        def accept() -> None:
            with suppress(OSError):
                while True:
                    connected, _ = listener.accept()
                    threading.Thread(target=self._serve, args=(Connection(connected),), daemon=True).start()

        threading.Thread(target=accept, name="meeting", daemon=True).start()
        print(f"{self._here.label}: the others find it at {address}:{port} ({self.endpoint.interface})", flush=True)
        return self

    def await_everyone(self) -> tuple[str, ...]:
        """Wait until every machine has joined and sees the number; returns their names, unique even if host names repeat.

        Raises:
            SubmitError: for machines that are missing or see a different run.root.
            ConfigError: for machines that were started with a different command or with the same index.
        """
        until, printed = time.monotonic() + WAIT_S, ""
        where = "" if self.endpoint is None else f"{self.endpoint.address}:{self._here.port}"
        while True:
            with self._lock:
                hosts = {0: self._host} | {node: member.host for node, member in self._members.items() if member.sees}
            if self._problem is not None:
                raise (SubmitError if self._problem.where == "run.root" else ConfigError)(self._problem)
            missing = ", ".join(f"node {node}" for node in range(self._here.nodes) if node not in hosts)
            if not missing:
                names = [*hosts.values()]
                return tuple(hosts[node] if names.count(hosts[node]) == 1 else f"{hosts[node]}-{node}" for node in sorted(hosts))
            if missing != printed:
                printed = missing
                self._tell(MeetingMessage(WAIT, f"node 0 is waiting for {missing}"))
                print(f"{self._here.label}: waiting for {missing} at {where}", flush=True)
            if time.monotonic() > until:
                remedy = "start the same command on every machine; check that they reach node 0 at this address"
                raise SubmitError(f"{missing} of {self._here.nodes} did not join", where=where, remedy=remedy)
            time.sleep(0.05)

    def begin(self, attempt: int, names: tuple[str, ...], on_end: Callable[[MeetingMessage], None]) -> None:
        """Tell the machines that the attempt has begun; no other can join it. `on_end` receives how their agents end."""
        self._on_end, self._names = on_end, names
        self._tell(MeetingMessage(READY, attempt=attempt, names=names))
        self._remove_marker()
        for node in {*range(1, len(names))} - self._members.keys():
            # It has left since it was last seen.
            self.report(MeetingMessage(AGENT_END, f"{names[node]} was lost: its command has ended", node, is_lost=True))

    def report(self, end: MeetingMessage) -> None:
        """Tell all other machines how the agent of one of them has ended; only its first report counts."""
        with self._lock:
            is_known = end.node in self._ended
            self._ended.add(end.node)
        if not is_known:
            if end.node != self._here.node:
                self._on_end(end)
            self._tell(end)

    def close(self, code: int, text: str) -> None:
        """Tell the machines how the attempt or its start has ended, and wait a moment until they have read it.

        Machines that start late learn of a refusal, too.
        """
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._remove_marker()
        self._tell(MeetingMessage(END, text, code=code))
        until = time.monotonic() + _LINGER_S
        while time.monotonic() < until and (self._members or (not self._names and len(self._ended) < self._here.nodes - 1)):
            time.sleep(0.02)
        # Closing alone would not end the thread that accepts connections.
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()

    def _tell(self, message: MeetingMessage) -> None:
        with self._lock:
            self._latest = message
            members = [*self._members.values()]
        for member in members:
            member.connection.send(message)

    def _serve(self, connection: Connection) -> None:
        """Read what a machine says until its connection ends."""
        join = next(connection.messages)
        if join.kind != JOIN:
            return connection.close()
        node = join.node
        with self._lock:
            refusal: MeetingMessage | None = None
            if self._names:
                # It tries again until this attempt has ended.
                refusal = MeetingMessage(WAIT, "the attempt that runs has begun without this command")
            elif (problem := self._find_problem(join)) is not None:
                self._problem = self._problem or problem
                self._ended.add(node)
                refusal = MeetingMessage(END, str(problem), code=EXIT_REFUSED)
            else:
                self._members[node] = member = _Member(connection, join.text)
        if refusal is not None:
            connection.send(refusal)
            return connection.close()
        connection.send(replace(self._latest, nonce=self._nonce))
        for message in connection.messages:
            if message.kind == SEES and message.text:
                self._problem = self._problem or Problem(
                    f"run.root is not shared: {join.text} does not see what {self._host} writes there",
                    "run.root",
                    str(self._run.parent),
                    "set run.root to a folder on storage that every machine mounts under the same path",
                )
            elif message.kind == SEES:
                member.sees = True
            elif message.kind == AGENT_END:
                self.report(replace(message, node=node))
            elif message.kind == LOST:
                with self._lock:
                    del self._members[node]
                    if self._latest.kind == END:
                        self._ended.add(node)
                if self._names:
                    self.report(MeetingMessage(AGENT_END, f"{self._names[node]} was lost: {message.text}", node, is_lost=True))
        return None

    def _find_problem(self, join: MeetingMessage) -> Problem | None:
        """Return why the machine does not belong to this start."""
        who = f"node {join.node} ({join.text})"
        if join.nodes != self._here.nodes:
            counts = f"{join.nodes} there, {self._here.nodes} on node 0"
            return Problem(f"{who} counts the machines differently from node 0", "cluster.nodes", counts)
        if not 0 < join.node < self._here.nodes:
            return Problem("two machines claim to be node 0", "cluster.node_rank", join.text, "number them from 0")
        if join.node in self._members:
            hosts = f"{join.text} and {self._members[join.node].host}"
            remedy = "start the command once on each machine, each with its own index"
            return Problem(f"two commands claim to be node {join.node}", "cluster.node_rank", hosts, remedy)
        if join.run != str(self._run):
            paths = f"{join.run} there, {self._run} on node 0"
            return Problem(f"{who} was started for another run directory", "run.root", paths, "mount the storage under one path")
        if join.command != self._command:
            keys = sorted({*join.command, *self._command})
            pairs = [(key, join.command.get(key, "-"), self._command.get(key, "-")) for key in keys]
            shown = [f"{key}: {there} there, {here} on node 0" for key, there, here in pairs if there != here]
            remedy = "start the same command on every machine, with the same version of the launcher"
            differences = "; ".join(shown[:_MAX_DIFFERENCES])
            return Problem(f"{who} was started with a different command from node 0", "command line", differences, remedy)
        return None

    def _remove_marker(self) -> None:
        with suppress(OSError, ValueError):
            if marker(self._run).read_text() == self._nonce:
                marker(self._run).unlink()


def join(
    here: NodeIdentity, run: Path, command: Mapping[str, str], describe_end: Callable[[], str | None]
) -> tuple[MeetingMessage, Connection | None]:
    """Join node 0 and wait for the attempt that it begins, and show what it is waiting for.

    Returns the message READY and the connection; or END and None if nothing is left to do. `describe_end` returns why the run is
    over, None if it continues: node 0 may have ended before this machine connected.

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
            waited_s = time.monotonic() - begun
            if waited_s > OVER_AFTER_S and (reason := describe_end()) is not None:
                return MeetingMessage(END, reason), None
            if waited_s > WAIT_S:
                remedy = "start the command on node 0; check cluster.master_addr and cluster.master_port"
                raise SubmitError("node 0 did not start", where=address, remedy=remedy) from None
            time.sleep(_CONNECT_EVERY_S)
            continue
        connection.send(
            MeetingMessage(JOIN, network.node_name(), node=here.node, nodes=here.nodes, run=str(run), command=dict(command))
        )
        has_joined = False
        for message in connection.messages:
            if message.kind == READY:
                return message, connection
            if message.kind == END:
                connection.close()
                if message.code:
                    raise SubmitError(f"node 0 has refused the start: {message.text}", where=address)
                return message, None
            if message.kind == WAIT:
                begun = time.monotonic()
                show(f"the plan ({message.text})")
                if message.nonce:
                    has_joined = True
                    connection.send(MeetingMessage(SEES, "" if _finds_marker(run, message.nonce) else "nothing"))
            if message.kind == LOST and has_joined:
                remedy = "look at the output of the command on node 0, then repeat the command on every machine"
                raise SubmitError("node 0 ended before its plan was ready", where=address, remedy=remedy)
        time.sleep(_CONNECT_EVERY_S)


def _finds_marker(run: Path, nonce: str) -> bool:
    """Return whether node 0's number is in run.root within the time that a network file system takes to show it."""
    until = time.monotonic() + SHARED_S
    while time.monotonic() < until:
        with suppress(OSError, ValueError):
            atomic_files.refresh_directory(run.parent)
        with suppress(OSError, ValueError):
            if marker(run).read_text() == nonce:
                return True
        time.sleep(_CONNECT_EVERY_S)
    return False


def head_endpoint(here: NodeIdentity, interface: str | None) -> network.Endpoint | None:
    """Return where node 0 listens, or None for a single machine.

    Raises:
        RunError: if the address or the interface is unusable.
        SubmitError: if the address is public.
    """
    if here.nodes == 1:
        return None
    endpoint = network.endpoint_of(str(here.address), interface)
    if interface is None and network.is_public(endpoint.address):
        raise SubmitError(
            "the machines would connect to each other over a public address",
            where="cluster.master_addr",
            value=f"{endpoint.address} on {endpoint.interface}",
            remedy="use the address of a private network, or set cluster.interface to this one if a firewall protects it",
        )
    return endpoint
