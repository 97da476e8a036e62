"""How the machines of a start find each other: node 0 listens, and the others ask it until it has a plan.

Each question tells node 0 who asks and for what; each answer contains this start's random number. Node 0 also writes the number
to run.root: a machine that does not find it there has a different run.root, and one that finds it never uses an earlier start's
plan. An answer says which attempt begins, what the machines are called, and what the start is waiting for. It names no file and
no command: the plan is read from the run directory, which is checked like any run that other users could have changed.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher import atomic_files
from launcher.clusters import network
from launcher.clusters.static.messages import OVER, READY, REFUSED, WAITING, Answer, MeetingServer, Question, ask
from launcher.clusters.static.start_files import (
    foreign_marker,
    marker,
    not_shared,
    read_marker,
    read_refusal,
    remove_refusal,
    write_refusal,
)
from launcher.config.sections.static_identity import NodeIdentity
from launcher.errors import ConfigError, Problem, SubmitError, printable

# Seconds between a machine's questions, and seconds without a question after which the machine no longer counts as present.
ASK_EVERY_S, _GONE_S = 0.5, 15.0
# A network file system may show a file this late.
SHARED_S = 20.0
# Seconds that a machine waits for an answer before it reads what node 0 left in run.root: a finished run stays finished, but a
# refusal may belong to the previous start if node 0 begins this one a little later than this machine.
OVER_AFTER_S, REFUSED_AFTER_S = 3.0, 60.0
# Seconds that node 0 keeps answering after it refused the start, so that every machine learns why.
_LINGER_S = 3.0
# Seconds within which the other machines must learn of the attempt that has begun.
_READY_S = 30.0
_MAX_DIFFERENCES = 5


@dataclass
class _Seen:
    question: Question
    at: float


class Meeting:
    """Node 0's side of a start. `endpoint` is where it listens, None for a single machine."""

    def __init__(self, here: NodeIdentity, run: Path, command: Mapping[str, str], endpoint: network.Endpoint | None) -> None:
        self._here, self._run, self._command = here, run, dict(command)
        self.endpoint = endpoint
        self._file = marker(run)
        self._lock = threading.Lock()
        self._seen: dict[int, _Seen] = {}
        # Commands that were followed by another with the same index: a killed command stops asking.
        self._replaced: dict[int, set[str]] = {}
        self._problem: Problem | None = None
        self._answer = Answer(secrets.token_hex(16), network.node_name(), message="node 0 is planning")
        self._heard: set[int] = set()
        self._taking_part: dict[int, str] = {}
        self._server: MeetingServer | None = None

    def open(self) -> Meeting:
        """Write the number of this start and listen.

        Raises:
            SubmitError: if run.root cannot be written, or the port is taken.
        """
        if self.endpoint is None:
            return self
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.write_text(self._file, self._answer.nonce)
            remove_refusal(self._run)
        except OSError as error:
            message = f"run.root cannot be written: {error.strerror or error}"
            remedy = "set run.root to a folder on shared storage that you can write to"
            if problem := foreign_marker(self._run):
                raise SubmitError(problem) from None
            raise SubmitError(message, where="run.root", value=str(self._file.parent), remedy=remedy) from None
        try:
            self._server = MeetingServer(self.endpoint.address, self._here.port, self.reply)
        except OSError as error:
            self._remove_file()
            message = f"node 0 cannot listen on {self.endpoint.address}:{self._here.port}: {error.strerror or error}"
            remedy = "end what uses the port, or choose another one with cluster.master_port on every machine"
            raise SubmitError(message, where="cluster.master_port", value=str(self._here.port), remedy=remedy) from None
        return self

    def close(self) -> None:
        """Stop listening once the machines that were present have heard the outcome, or have had time to."""
        until = time.monotonic() + {READY: _READY_S, WAITING: 0.0}.get(self._answer.state, _LINGER_S)
        while time.monotonic() < until and not self._heard >= self._present():
            time.sleep(0.05)
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.stop()
            self._remove_file()

    def say(self, message: str) -> None:
        """Tell the other machines what node 0 is doing."""
        self._set(message=message)

    def announce(self, attempt: int, own_plan: bool, names: tuple[str, ...]) -> None:
        """Tell the machines that are present that the attempt has begun; a later command cannot join it."""
        with self._lock:
            self._taking_part = {node: seen.question.process for node, seen in self._seen.items()}
        self._set(state=READY, attempt=attempt, own_plan=own_plan, names=names)

    def end(self, message: str) -> None:
        """Tell the other machines that nothing is left to do."""
        self._set(state=OVER, message=message)

    def refuse(self, message: str) -> None:
        """Tell the other machines, including those that ask after node 0 has ended, that it does not start the run."""
        self._set(state=REFUSED, message=message)
        if self.endpoint is not None:
            write_refusal(self._run, self._answer.host, message)

    def await_everyone(self, wait_s: float) -> tuple[str, ...]:
        """Wait until every machine is present and sees the number; returns their unique names.

        Raises:
            SubmitError: for machines that are missing or see a different run.root.
            ConfigError: for machines that were started with a different command or with the same index.
        """
        until, printed = time.monotonic() + wait_s, ""
        while True:
            missing = self._missing()
            if self._problem is not None:
                kind = SubmitError if self._problem.where == "run.root" else ConfigError
                raise kind(self._problem)
            if not missing:
                return self.names()
            activity = f"waiting for {', '.join(f'node {node}' for node in missing)}"
            if activity != printed:
                printed = activity
                self.say(f"node 0 is {activity}")
                where = "" if self.endpoint is None else f" at {self.endpoint.address}:{self._here.port}"
                print(f"{self._here.label}: {activity}{where}, for {wait_s / 60:g} minutes at most", flush=True)
            if time.monotonic() > until:
                raise SubmitError(
                    f"{', '.join(f'node {node}' for node in missing)} of {self._here.nodes} did not join",
                    where="cluster.wait_minutes",
                    value=f"{wait_s / 60:g}",
                    remedy="start the same command on every machine; check that they reach node 0 at "
                    f"{self.endpoint.address if self.endpoint else '-'}:{self._here.port}, or raise cluster.wait_minutes",
                )
            time.sleep(0.1)

    def reply(self, question: Question) -> Answer:
        """Record who asks, and answer."""
        with self._lock:
            self._problem = self._problem or self._check(question)
            earlier, replaced = self._seen.get(question.node), self._replaced.setdefault(question.node, set())
            if earlier is not None and earlier.question.process != question.process:
                replaced.add(earlier.question.process)
            if question.process in replaced:
                self._problem = self._problem or Problem(
                    f"two commands claim to be node {question.node}",
                    "cluster.node_rank",
                    f"{question.host} and {earlier.question.host if earlier else question.host}",
                    "start the command once on each machine, each with its own index",
                )
            self._seen[question.node] = _Seen(question, time.monotonic())
            if self._answer.state == READY and self._taking_part.get(question.node) != question.process:
                late = f"attempt {self._answer.attempt} has begun without this command"
                return Answer(self._answer.nonce, self._answer.host, WAITING, late)
            if self._answer.state != WAITING:
                self._heard.add(question.node)
            return self._answer

    def _check(self, question: Question) -> Problem | None:
        who = f"node {question.node} ({question.host})"
        if question.nodes != self._here.nodes:
            return Problem(
                f"{who} counts the machines differently from node 0",
                "cluster.nodes",
                f"{question.nodes} there, {self._here.nodes} on node 0",
                "set the same number of machines on every machine",
            )
        if not 0 < question.node < self._here.nodes:
            return Problem("two machines claim to be node 0", "cluster.node_rank", question.host, "number them from 0")
        if question.run != str(self._run):
            return Problem(
                f"{who} was started for another run directory",
                "run.root",
                f"{question.run} there, {self._run} on node 0",
                "mount the storage under one path, and give every machine the same run.root and run.name",
            )
        if question.command != self._command:
            keys = [
                key for key in sorted({*question.command, *self._command}) if question.command.get(key) != self._command.get(key)
            ]
            shown = [f"{key}: {question.command.get(key, '-')} there, {self._command.get(key, '-')} on node 0" for key in keys]
            return Problem(
                f"{who} was started with a different command from node 0",
                "command line",
                "; ".join(shown[:_MAX_DIFFERENCES]),
                "start the same command on every machine, with the same version of the launcher",
            )
        if question.missed == self._answer.nonce:
            return not_shared(self._run.parent, question.host, self._answer.host)
        return None

    def _missing(self) -> list[int]:
        with self._lock:
            now = time.monotonic()
            there = {
                node for node, seen in self._seen.items() if now - seen.at < _GONE_S and seen.question.sees == self._answer.nonce
            }
        return [node for node in range(1, self._here.nodes) if node not in there]

    def _present(self) -> set[int]:
        with self._lock:
            return {node for node, seen in self._seen.items() if time.monotonic() - seen.at < _GONE_S}

    def names(self) -> tuple[str, ...]:
        """Return unique names for all machines, even if host names repeat."""
        with self._lock:
            hosts = [self._answer.host, *(self._seen[node].question.host for node in range(1, self._here.nodes))]
        return tuple(host if hosts.count(host) == 1 else f"{host}-{node}" for node, host in enumerate(hosts))

    def _set(self, **changes: Any) -> None:
        with self._lock:
            self._answer = Answer(**{**vars(self._answer), **changes})

    def _remove_file(self) -> None:
        if self.endpoint is not None:
            with suppress(OSError, ValueError):
                if read_marker(self._run) == self._answer.nonce:
                    self._file.unlink()


class JoiningNode:
    """The side of a machine other than node 0. `describe_end` returns why the run is over, None if it continues."""

    def __init__(
        self, here: NodeIdentity, run: Path, command: Mapping[str, str], describe_end: Callable[[], str | None] = lambda: None
    ) -> None:
        self._here, self._run, self._describe_end = here, run, describe_end
        self._question = Question(here.node, here.nodes, network.node_name(), secrets.token_hex(8), str(run), dict(command))

    def await_plan(self, wait_s: float) -> Answer:
        """Ask node 0 until the start is ready or over, and show what it is waiting for.

        Raises:
            SubmitError: if node 0 is unreachable in time, refuses, ends, or does not share run.root.
        """
        here, address = self._here, f"{self._here.address}:{self._here.port}"
        begun = time.monotonic()
        printed, until, last, missing_since = "", begun + wait_s, None, None
        while True:
            answer = ask(str(here.address), here.port, self._question)
            now = time.monotonic()
            if answer is None:
                awaited = f"node 0 at {address}"
                if last is None and (outcome := self._earlier_outcome(now - begun, wait_s)) is not None:
                    return outcome
                if last is not None and now - last > _GONE_S:
                    remedy = "look at the output of the command on node 0, then repeat the command on every machine"
                    raise SubmitError("node 0 ended before its plan was ready", where=address, remedy=remedy)
            else:
                if last is None:
                    until = now + wait_s
                last, awaited = now, f"the plan ({answer.message})" if answer.message else "the plan"
                if answer.state == REFUSED:
                    raise SubmitError(f"node 0 has refused the start: {answer.message}", where=answer.host)
                if answer.state in (READY, OVER):
                    return answer
                sees = read_marker(self._run)
                missing_since = None if sees == answer.nonce else missing_since or now
                missed = answer.nonce if missing_since is not None and now - missing_since > SHARED_S else ""
                if missed and self._question.missed == missed:
                    # Node 0 has been informed.
                    raise SubmitError(not_shared(self._run.parent, self._question.host, answer.host))
                self._question = Question(**{**vars(self._question), "sees": sees, "missed": missed})
            if awaited != printed:
                printed = awaited
                print(printable(f"{here.label}: waiting for {awaited}, for {wait_s / 60:g} minutes at most"), flush=True)
            if now > until:
                raise SubmitError(
                    f"{awaited} did not appear within {wait_s / 60:g} minutes",
                    where="cluster.wait_minutes",
                    value=f"{wait_s / 60:g}",
                    remedy="start the command on node 0; check cluster.master_addr and cluster.master_port, or raise "
                    "cluster.wait_minutes",
                )
            time.sleep(ASK_EVERY_S)

    def _earlier_outcome(self, waited_s: float, wait_s: float) -> Answer | None:
        """Return an answer that the run is over if node 0 ended before this machine asked, or None if the run may still begin.

        Raises:
            SubmitError: if node 0 refused the start.
        """
        if waited_s < OVER_AFTER_S:
            return None
        if (reason := self._describe_end()) is not None:
            return Answer("", self._question.host, OVER, reason)
        refusal = read_refusal(self._run, wait_s) if waited_s >= REFUSED_AFTER_S else None
        if refusal is not None:
            remedy = "when the cause is gone, repeat the command on every machine"
            message = f"node 0 had refused the start before this machine connected: {refusal.reason}"
            raise SubmitError(message, where=refusal.host, remedy=remedy)
        return None


def head_endpoint(here: NodeIdentity, interface: str | None, allow_public: bool) -> network.Endpoint | None:
    """Return where node 0 listens, or None for a single machine.

    Raises:
        RunError: if the address or the interface is unusable.
        SubmitError: if the address is public.
    """
    if here.nodes == 1:
        return None
    endpoint = network.endpoint_of(str(here.address), interface)
    if network.is_public(endpoint.address) and not allow_public:
        raise SubmitError(
            "the machines would connect to each other over a public address",
            where="cluster.master_addr",
            value=f"{endpoint.address} on {endpoint.interface}",
            remedy="use the address of a private network, or choose it with cluster.interface; "
            "cluster.allow_public_address=true accepts it",
        )
    return endpoint
