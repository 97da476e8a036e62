"""The machines of a static start meet over real sockets and files, with each machine as a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.clusters import network
from launcher.clusters import static_meeting as module
from launcher.clusters.static_meeting import (
    AGENT_END,
    END,
    JOIN,
    LOST,
    READY,
    Connection,
    Meeting,
    MeetingMessage,
    head_endpoint,
    join,
    marker,
)
from launcher.config.sections.static import NodeIdentity
from launcher.errors import ConfigError, LauncherError, SubmitError

COMMAND = {"train.max_steps": "4", "model.name": "tiny"}


@pytest.fixture
def port() -> int:
    return network.free_port("127.0.0.1")


@pytest.fixture
def head(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Meeting]]:
    monkeypatch.setattr(module, "LOST_S", 3.0)
    monkeypatch.setattr(module, "_LINGER_S", 1.0)
    opened: list[Meeting] = []

    def open_meeting(nodes: int = 2) -> Meeting:
        opened.append(Meeting(NodeIdentity(0, nodes, "127.0.0.1", port), tmp_path / "run", COMMAND, network.LOOPBACK).open())
        return opened[-1]

    yield open_meeting
    for meeting in opened:
        meeting.close(0, "the test has ended")


class Machine:
    """A machine that joins in a thread. `outcome` is the message READY or END, or the error."""

    def __init__(
        self,
        port: int,
        run: Path,
        node: int = 1,
        nodes: int = 2,
        command: dict[str, str] = COMMAND,
        describe_end: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.connection: Connection | None = None
        self._outcome: MeetingMessage | LauncherError | None = None

        def wait() -> None:
            try:
                self._outcome, self.connection = join(NodeIdentity(node, nodes, "127.0.0.1", port), run, command, describe_end)
            except LauncherError as error:
                self._outcome = error

        self._thread = threading.Thread(target=wait, daemon=True)
        self._thread.start()

    @property
    def outcome(self) -> MeetingMessage | LauncherError | None:
        self._thread.join(60)
        return self._outcome

    def read(self) -> MeetingMessage:
        assert self.connection is not None
        return next(self.connection.messages)


def begin(meeting: Meeting, ends: list[MeetingMessage]) -> tuple[str, ...]:
    names = meeting.await_everyone()
    meeting.begin(7, names, ends.append)
    return names


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_a_machine_that_comes_first_waits_and_gets_this_start_s_attempt(
    tmp_path: Path, port: int, head: Callable[..., Meeting], capsys: pytest.CaptureFixture[str]
) -> None:
    # The marker of an earlier start that was killed.
    marker(tmp_path / "run").write_text("of an earlier start")
    machine = Machine(port, tmp_path / "run")
    time.sleep(0.4)
    meeting = head()
    names = begin(meeting, [])
    assert len(set(names)) == 2
    assert machine.outcome == MeetingMessage(READY, attempt=7, names=names)
    assert not marker(tmp_path / "run").exists()
    # A repeated command does not join an attempt that runs, and learns how it ends when nothing listens any more.
    late = Machine(port, tmp_path / "run", describe_end=lambda: "the run is completed")
    time.sleep(0.4)
    threading.Thread(target=meeting.close, args=(130, "cancelled")).start()
    assert machine.read() == MeetingMessage(END, "cancelled", code=130)
    assert machine.connection is not None
    machine.connection.close()
    assert late.outcome == MeetingMessage(END, "the run is completed")
    output = capsys.readouterr().out
    assert f"node 1 of 2: waiting for node 0 at 127.0.0.1:{port}" in output
    assert "begun without this command" in output


@pytest.mark.parametrize("code", [0, 2])
def test_nothing_left_to_do_and_a_refusal_reach_a_machine_that_is_a_moment_late(
    tmp_path: Path, port: int, head: Callable[..., Meeting], code: int
) -> None:
    meeting = head()
    threading.Thread(target=meeting.close, args=(code, "because of this")).start()
    outcome = Machine(port, tmp_path / "run").outcome
    if code == 0:
        assert isinstance(outcome, MeetingMessage)
        assert (outcome.kind, outcome.text) == (END, "because of this")
    else:
        assert isinstance(outcome, SubmitError)
        assert "because of this" in str(outcome)


def test_machines_that_do_not_come_are_named_on_both_sides(
    tmp_path: Path, head: Callable[..., Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.5)
    with pytest.raises(SubmitError) as caught:
        head(nodes=3).await_everyone()
    assert caught.value.problems[0].message == "node 1, node 2 of 3 did not join"
    assert isinstance(Machine(network.free_port("127.0.0.1"), tmp_path / "run").outcome, SubmitError)


@pytest.mark.parametrize(
    "changes, where",
    [
        ({"nodes": 3}, "cluster.nodes"),
        ({"node": 0}, "cluster.node_rank"),
        ({"elsewhere": True}, "run.root"),
        ({"command": {**COMMAND, "train.max_steps": "5"}}, "command line"),
    ],
)
def test_machines_that_do_not_belong_together_are_refused(
    tmp_path: Path, port: int, head: Callable[..., Meeting], changes: dict, where: str
) -> None:
    meeting = head()
    run = tmp_path / "other" / "run" if changes.pop("elsewhere", False) else tmp_path / "run"
    machine = Machine(port, run, **changes)
    with pytest.raises(LauncherError) as caught:
        meeting.await_everyone()
    (problem,) = caught.value.problems
    assert problem.where == where
    assert problem.message in str(machine.outcome)
    if where == "command line":
        assert problem.value == "train.max_steps: 5 there, 4 on node 0"


def test_two_commands_with_one_index_are_refused_and_a_restarted_one_is_not(
    tmp_path: Path, port: int, head: Callable[..., Meeting]
) -> None:
    meeting = head()
    killed = Connection(socket.create_connection(("127.0.0.1", port)))
    killed.send(MeetingMessage(JOIN, "a", node=1, nodes=2, run=str(tmp_path / "run"), command=COMMAND))
    next(killed.messages)
    killed.close()
    wait_until(lambda: not meeting._members)
    Machine(port, tmp_path / "run")
    assert len(meeting.await_everyone()) == 2
    second = Machine(port, tmp_path / "run")
    assert "two commands claim to be node 1" in str(second.outcome)
    with pytest.raises(ConfigError, match="two commands claim to be node 1"):
        meeting.await_everyone()


def test_a_run_root_that_is_not_shared_is_named(
    tmp_path: Path, port: int, head: Callable[..., Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing the number's file without telling node 0 acts as if node 0 wrote it to a different folder."""
    monkeypatch.setattr(module, "SHARED_S", 1.0)
    meeting = head()
    marker(tmp_path / "run").unlink()
    Machine(port, tmp_path / "run")
    with pytest.raises(SubmitError) as caught:
        meeting.await_everyone()
    (problem,) = caught.value.problems
    assert (problem.where, problem.value) == ("run.root", str(tmp_path))


def test_the_end_of_an_agent_and_the_loss_of_a_machine_reach_all_others(
    tmp_path: Path, port: int, head: Callable[..., Meeting]
) -> None:
    meeting, ends = head(nodes=4), list[MeetingMessage]()
    machines = [Machine(port, tmp_path / "run", node, 4) for node in (1, 2, 3)]
    names = begin(meeting, ends)
    first, second, third = machines
    assert all(isinstance(machine.outcome, MeetingMessage) and machine.connection for machine in machines)
    first.connection.send(MeetingMessage(AGENT_END, "rank 1: out of memory", 1))
    failed = MeetingMessage(AGENT_END, "rank 1: out of memory", 1)
    assert [second.read(), third.read()] == [failed, failed]
    # Its connection closes, as that of a command that was killed.
    second.connection.close()
    closed = MeetingMessage(AGENT_END, f"{names[2]} was lost: its command has ended", 2, is_lost=True)
    assert third.read() == closed
    # It falls silent, as a machine that has lost power: its connection stays open.
    third.connection._closed.set()
    wait_until(lambda: len(ends) == 3)
    assert ends == [failed, closed, MeetingMessage(AGENT_END, f"{names[3]} was lost: no sign of life for 3s", 3, is_lost=True)]
    # The first machine still shows that it is alive.
    assert set(meeting._members) == {1}


def test_a_machine_whose_node_0_ends_is_told(tmp_path: Path, port: int, head: Callable[..., Meeting]) -> None:
    machine = Machine(port, tmp_path / "run")
    meeting = head()
    meeting.await_everyone()
    meeting._members[1].connection.close()
    assert "node 0 ended before its plan was ready" in str(machine.outcome)
    machine = Machine(port, tmp_path / "run")
    begin(meeting, [])
    assert isinstance(machine.outcome, MeetingMessage)
    meeting._members[1].connection.close()
    assert machine.read() == MeetingMessage(LOST, "its command has ended")


def test_another_program_at_the_port_is_no_machine(port: int, head: Callable[..., Meeting]) -> None:
    meeting = head()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as other:
        other.sendall(b"GET / HTTP/1.1\n\n")
        assert other.recv(1 << 16) == b""
    assert not meeting._members


def test_a_taken_port_and_a_root_that_cannot_be_written_are_refused(tmp_path: Path, port: int) -> None:
    here = NodeIdentity(0, 2, "127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)), pytest.raises(SubmitError) as caught:
        Meeting(here, tmp_path / "run", COMMAND, network.LOOPBACK).open()
    assert caught.value.problems[0].where == "cluster.master_port"
    assert not marker(tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SubmitError) as caught:
        Meeting(here, tmp_path / "file" / "run", COMMAND, network.LOOPBACK).open()
    assert caught.value.problems[0].where == "run.root"


def test_a_public_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_list_interfaces", lambda: {"eth0": ["8.8.4.4"]})
    with pytest.raises(SubmitError, match="public address"):
        head_endpoint(NodeIdentity(0, 2, "8.8.4.4", 29500), None)
    assert head_endpoint(NodeIdentity(0, 2, "8.8.4.4", 29500), "eth0") == network.Endpoint("8.8.4.4", "eth0")
    assert head_endpoint(NodeIdentity(0, 1, None, 29500), None) is None


def test_the_address_of_a_service_or_of_localhost_leaves_the_choice_to_the_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_list_interfaces", lambda: {"lo": ["127.0.0.1"], "eth0": ["10.1.0.7"], "ib0": ["10.9.0.7"]})
    monkeypatch.setattr(network, "_find_route_to", lambda peer: network.Endpoint("10.1.0.7", "eth0"))
    for host in ("localhost", "10.96.0.1"):
        assert network.endpoint_of(host, None) == network.Endpoint("10.1.0.7", "eth0")
    assert network.endpoint_of("10.9.0.7", None) == network.Endpoint("10.9.0.7", "ib0")
    assert network.endpoint_of("10.9.0.7", "eth0") == network.Endpoint("10.1.0.7", "eth0")
    # Processes on the same machine.
    assert network.endpoint_of("127.0.0.2", None) == network.Endpoint("127.0.0.2", "lo")
