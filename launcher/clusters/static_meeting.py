"""How the machines of a start find each other: node 0 listens, and the others ask it until it has a plan.

Each question tells node 0 who asks and for what; each answer contains this start's random number. Node 0 also writes the number
to run.root: a machine that does not find it there has a different run.root, and one that finds it never uses an earlier start's
plan. An answer says which attempt begins, what the machines are called, and what the start is waiting for. It names no file and
no command: the plan is read from the run directory, which is checked like any run that other users could have changed.
"""

from __future__ import annotations

import json
import secrets
import socket
import socketserver
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launcher import atomic_files, json_records
from launcher.clusters import network
from launcher.config.sections.static import NodeIdentity
from launcher.errors import ConfigError, LauncherError, Problem, SubmitError, printable

# Seconds that node 0 waits for the others to start, and they for node 0; while node 0 answers, they wait for its plan.
WAIT_S = 3600.0
# Seconds between a machine's questions, and seconds without a question after which the machine no longer counts as present.
_ASK_EVERY_S, _GONE_S = 0.5, 15.0
# A network file system may show a file this late.
SHARED_S = 20.0
# Seconds without an answer after which a machine looks whether the run is already over.
OVER_AFTER_S = 3.0
# Seconds that node 0 keeps answering after it refused the start or found nothing to do, and those that it gives the others to
# learn of the attempt that has begun.
_LINGER_S, _READY_S = 5.0, 30.0
_SOCKET_S = 5.0
_MAX_MESSAGE_BYTES = 1 << 20
_MAX_DIFFERENCES = 5
# The states of a start in answers.
WAITING, READY, OVER, REFUSED = "waiting", "ready", "over", "refused"


@dataclass(frozen=True)
class Question:
    """`process` distinguishes two processes that claim to be the same machine; `command` is the command's request, by keys.

    `sees` is the number found in run.root, or empty.
    """

    node: int
    nodes: int
    host: str
    process: str
    run: str
    command: dict[str, str]
    sees: str = ""


@dataclass(frozen=True)
class Answer:
    """`nonce` is this start's number. `attempt`, `own_plan` and `names` are set when the start is ready.

    `own_plan` is whether the attempt has its own plan. `message` says what the start is waiting for, or why it has ended.
    """

    nonce: str
    host: str
    state: str = WAITING
    message: str = ""
    attempt: int = 0
    own_plan: bool = False
    names: tuple[str, ...] = ()


def marker(run: Path) -> Path:
    """Return the path of the file in run.root with the current start's number."""
    return run.parent / f".{run.name}.start"


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens in a thread; answers questions and ignores anything else."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: str, port: int, reply: Callable[[Question], Answer]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET

        class Handler(socketserver.StreamRequestHandler):
            timeout = _SOCKET_S

            def handle(self) -> None:
                with suppress(OSError, LauncherError):
                    line = self.rfile.readline(_MAX_MESSAGE_BYTES)
                    answer = reply(json_records.loads(Question, line, "a question"))
                    self.wfile.write(json.dumps(asdict(answer)).encode() + b"\n")

        super().__init__((address, port), Handler)
        threading.Thread(target=self.serve_forever, args=(0.1,), name="meeting", daemon=True).start()


class Meeting:
    """Node 0's side of a start. `endpoint` is where it listens, None for a single machine."""

    def __init__(self, here: NodeIdentity, run: Path, command: Mapping[str, str], endpoint: network.Endpoint | None) -> None:
        self._here, self._run, self._command = here, run, dict(command)
        self.endpoint = endpoint
        self._lock = threading.Lock()
        # For each node: its last question and when it came, and when its first one came.
        self._seen: dict[int, tuple[Question, float, float]] = {}
        # The commands with each index, oldest first: a killed command stops asking.
        self._processes: dict[int, list[str]] = {}
        self._problem: Problem | None = None
        self._answer = Answer(secrets.token_hex(16), network.node_name(), message="node 0 is planning")
        self._heard: set[int] = set()
        self._server: _Server | None = None

    def open(self) -> Meeting:
        """Write the number of this start and listen.

        Raises:
            SubmitError: if run.root cannot be written, or the port is taken.
        """
        if self.endpoint is None:
            return self
        action, where, value = "write", "run.root", str(self._run.parent)
        try:
            self._run.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.write_text(marker(self._run), self._answer.nonce)
            action, where, value = "listen", "cluster.master_port", f"{self.endpoint.address}:{self._here.port}"
            self._server = _Server(self.endpoint.address, self._here.port, self.reply)
        except OSError as error:
            self._remove_marker()
            raise SubmitError(f"node 0 cannot {action} here: {error.strerror or error}", where=where, value=value) from None
        return self

    def close(self) -> None:
        """Stop listening once the machines that were present have heard the outcome, or have had time to."""
        until = time.monotonic() + {READY: _READY_S, WAITING: 0.0}.get(self._answer.state, _LINGER_S)
        while time.monotonic() < until and len(self._heard) < self._here.nodes - 1:
            time.sleep(0.05)
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            self._remove_marker()

    def tell(self, message: str, state: str = WAITING) -> None:
        """Tell the other machines what node 0 is doing, or with the state OVER or REFUSED, why the start has ended."""
        with self._lock:
            self._answer = replace(self._answer, message=message, state=state)

    def announce(self, attempt: int, own_plan: bool, names: tuple[str, ...]) -> None:
        """Tell the machines that are present that the attempt has begun; a later command cannot join it."""
        with self._lock:
            self._answer = replace(self._answer, state=READY, attempt=attempt, own_plan=own_plan, names=names)

    def await_everyone(self) -> tuple[str, ...]:
        """Wait until every machine is present and sees the number; returns their unique names.

        Raises:
            SubmitError: for machines that are missing or see a different run.root.
            ConfigError: for machines that were started with a different command or with the same index.
        """
        until, printed = time.monotonic() + WAIT_S, ""
        where = "" if self.endpoint is None else f"{self.endpoint.address}:{self._here.port}"
        while True:
            with self._lock:
                now = time.monotonic()
                present = {
                    node for node, (one, at, _) in self._seen.items() if now - at < _GONE_S and one.sees == self._answer.nonce
                }
            if self._problem is not None:
                raise (SubmitError if self._problem.where == "run.root" else ConfigError)(self._problem)
            missing = ", ".join(f"node {node}" for node in range(1, self._here.nodes) if node not in present)
            if not missing:
                return self.names()
            if missing != printed:
                printed = missing
                self.tell(f"node 0 is waiting for {missing}")
                print(f"{self._here.label}: waiting for {missing} at {where}", flush=True)
            if now > until:
                remedy = "start the same command on every machine; check that they reach node 0 at this address"
                raise SubmitError(f"{missing} of {self._here.nodes} did not join", where=where, remedy=remedy)
            time.sleep(0.1)

    def reply(self, question: Question) -> Answer:
        """Record who asks, and answer."""
        with self._lock:
            node, now = question.node, time.monotonic()
            processes = self._processes.setdefault(node, [])
            if question.process not in processes[-1:] and self._answer.state == READY:
                message = f"attempt {self._answer.attempt} has begun without this command"
                return Answer(self._answer.nonce, self._answer.host, WAITING, message)
            if question.process not in processes:
                processes.append(question.process)
                self._seen.pop(node, None)
            begun = self._seen[node][2] if node in self._seen else now
            self._problem = self._problem or self._find_problem(question, now - begun, processes)
            self._seen[node] = question, now, begun
            if self._problem is not None and self._answer.state == WAITING:
                return replace(self._answer, state=REFUSED, message=str(self._problem))
            if self._answer.state != WAITING:
                self._heard.add(node)
            return self._answer

    def _find_problem(self, question: Question, waited_s: float, processes: list[str]) -> Problem | None:
        """Return why the machine that asks, and has done so for `waited_s` seconds, does not belong to this start."""
        who = f"node {question.node} ({question.host})"
        if question.nodes != self._here.nodes:
            counts = f"{question.nodes} there, {self._here.nodes} on node 0"
            return Problem(f"{who} counts the machines differently from node 0", "cluster.nodes", counts)
        if not 0 < question.node < self._here.nodes:
            return Problem("two machines claim to be node 0", "cluster.node_rank", question.host, "number them from 0")
        if question.process != processes[-1]:
            return Problem(
                f"two commands claim to be node {question.node}",
                "cluster.node_rank",
                f"{question.host} and {self._seen[question.node][0].host}",
                "start the command once on each machine, each with its own index",
            )
        if question.run != str(self._run):
            paths = f"{question.run} there, {self._run} on node 0"
            return Problem(f"{who} was started for another run directory", "run.root", paths, "mount the storage under one path")
        if question.command != self._command:
            keys = sorted({*question.command, *self._command})
            pairs = [(key, question.command.get(key, "-"), self._command.get(key, "-")) for key in keys]
            shown = [f"{key}: {there} there, {here} on node 0" for key, there, here in pairs if there != here]
            return Problem(
                f"{who} was started with a different command from node 0",
                "command line",
                "; ".join(shown[:_MAX_DIFFERENCES]),
                "start the same command on every machine, with the same version of the launcher",
            )
        if question.sees != self._answer.nonce and waited_s > SHARED_S:
            return Problem(
                f"run.root is not shared: {question.host} does not see what {self._answer.host} writes there",
                "run.root",
                str(self._run.parent),
                "set run.root to a folder on storage that every machine mounts under the same path",
            )
        return None

    def names(self) -> tuple[str, ...]:
        """Return unique names for all machines, even if host names repeat."""
        with self._lock:
            hosts = [self._answer.host, *(self._seen[node][0].host for node in range(1, self._here.nodes))]
        return tuple(host if hosts.count(host) == 1 else f"{host}-{node}" for node, host in enumerate(hosts))

    def _remove_marker(self) -> None:
        with suppress(OSError, ValueError):
            if marker(self._run).read_text() == self._answer.nonce:
                marker(self._run).unlink()


def await_plan(here: NodeIdentity, run: Path, command: Mapping[str, str], describe_end: Callable[[], str | None]) -> Answer:
    """Ask node 0 until the start is ready or over, and show what it is waiting for.

    `describe_end` returns why the run is over, None if it continues: node 0 may have ended before this machine asked.

    Raises:
        SubmitError: if node 0 is unreachable in time, refuses, or ends.
    """
    question = Question(here.node, here.nodes, network.node_name(), secrets.token_hex(8), str(run), dict(command))
    address, printed = f"{here.address}:{here.port}", ""
    begun = time.monotonic()
    answered: float | None = None
    while True:
        answer, now = _ask_head(here, question), time.monotonic()
        if answer is not None:
            answered, awaited = now, f"the plan ({answer.message})"
            if answer.state == REFUSED:
                raise SubmitError(f"node 0 has refused the start: {answer.message}", where=answer.host)
            if answer.state in (READY, OVER):
                return answer
            seen = ""
            with suppress(OSError, ValueError):
                atomic_files.refresh_directory(run.parent)
            with suppress(OSError, ValueError):
                seen = marker(run).read_text()
            question = replace(question, sees=seen)
        else:
            awaited = f"node 0 at {address}"
            if answered is None and now - begun > OVER_AFTER_S and (reason := describe_end()) is not None:
                return Answer("", question.host, OVER, reason)
            if answered is not None and now - answered > _GONE_S:
                remedy = "look at the output of the command on node 0, then repeat the command on every machine"
                raise SubmitError("node 0 ended before its plan was ready", where=address, remedy=remedy)
            if answered is None and now - begun > WAIT_S:
                remedy = "start the command on node 0; check cluster.master_addr and cluster.master_port"
                raise SubmitError("node 0 did not start", where=address, remedy=remedy)
        if awaited != printed:
            printed = awaited
            print(printable(f"{here.label}: waiting for {awaited}"), flush=True)
        time.sleep(_ASK_EVERY_S)


def _ask_head(here: NodeIdentity, question: Question) -> Answer | None:
    """Return node 0's answer, or None if it does not listen or answer."""
    address = str(here.address), here.port
    try:
        with socket.create_connection(address, timeout=_SOCKET_S) as connection, connection.makefile("rwb") as stream:
            stream.write(json.dumps(asdict(question)).encode() + b"\n")
            stream.flush()
            return json_records.loads(Answer, stream.readline(_MAX_MESSAGE_BYTES), "node 0's answer")
    except (OSError, LauncherError):
        return None


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
