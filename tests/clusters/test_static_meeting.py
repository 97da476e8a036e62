"""The machines of a static start meet over real sockets and files, with each machine as a thread of this process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.clusters import network
from launcher.clusters import static_meeting as module
from launcher.clusters.static_meeting import END, Connection, Join, Meeting, Notice, head_endpoint, join, marker
from launcher.config.sections.static import NodeIdentity
from launcher.errors import LauncherError, SubmitError

COMMAND = {"train.max_steps": "4", "model.name": "tiny"}


@pytest.fixture
def port() -> int:
    return network.free_port("127.0.0.1")


@pytest.fixture
def head(tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Meeting]]:
    monkeypatch.setattr(module, "_LINGER_S", 1.0)
    opened: list[Meeting] = []

    def open_meeting(nodes: int = 2) -> Meeting:
        opened.append(Meeting(NodeIdentity(0, nodes, "127.0.0.1", port), tmp_path / "run", COMMAND, network.LOOPBACK).open())
        return opened[-1]

    yield open_meeting
    for meeting in opened:
        meeting.close(0, "the test has ended")


class Machine:
    """A machine that joins in a thread. `outcome` is the attempt that begins, why nothing is left to do, or the error."""

    def __init__(
        self,
        port: int,
        run: Path,
        node: int = 1,
        command: dict[str, str] = COMMAND,
        describe_end: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._outcome: int | str | LauncherError | None = None

        def wait() -> None:
            try:
                joined = join(NodeIdentity(node, 2, "127.0.0.1", port), run, command, describe_end)
                self._outcome, self.connection = (joined, None) if isinstance(joined, str) else joined
            except LauncherError as error:
                self._outcome = error

        self._thread = threading.Thread(target=wait, daemon=True)
        self._thread.start()

    @property
    def outcome(self) -> int | str | LauncherError | None:
        self._thread.join(60)
        return self._outcome

    def read(self) -> Notice:
        assert self.outcome == 7
        assert self.connection is not None
        return self.connection.receive(Notice)

    def leave(self) -> None:
        assert self.outcome == 7
        assert self.connection is not None
        self.connection.close()


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_machine_that_comes_first_waits_and_gets_this_start_s_attempt(
    tmp_path: Path, port: int, head: Callable[..., Meeting], capsys: pytest.CaptureFixture[str]
) -> None:
    # The marker of an earlier start that was killed.
    marker(tmp_path / "run").write_text("of an earlier start")
    machine = Machine(port, tmp_path / "run")
    time.sleep(0.4)
    meeting = head()
    assert len(set(meeting.await_everyone())) == 2
    meeting.begin(7, lambda node, reason: None)
    assert machine.outcome == 7
    # A repeated command does not join an attempt that runs, and learns how it ends when nothing listens any more.
    late = Machine(port, tmp_path / "run", describe_end=lambda: "the run is completed")
    wait_until(lambda: "begun without this command" in capsys.readouterr().out)
    threading.Thread(target=meeting.close, args=(130, "cancelled")).start()
    assert machine.read() == Notice(END, "cancelled", code=130)
    machine.leave()
    assert late.outcome == "the run is completed"
    wait_until(lambda: not marker(tmp_path / "run").exists())


@pytest.mark.parametrize("code", [0, 2])
def test_nothing_left_to_do_and_a_refusal_reach_a_machine_that_is_a_moment_late(
    tmp_path: Path, port: int, head: Callable[..., Meeting], code: int
) -> None:
    meeting = head()
    threading.Thread(target=meeting.close, args=(code, "because of this")).start()
    outcome = Machine(port, tmp_path / "run").outcome
    assert outcome == "because of this" if code == 0 else isinstance(outcome, SubmitError)
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
        ({"node": 0}, "cluster.node_rank"),
        # Acts as if node 0 wrote the number to a different folder.
        ({"is_unshared": True}, "run.root"),
        ({"command": {**COMMAND, "train.max_steps": "5"}}, "train.max_steps"),
    ],
)
def test_machines_that_do_not_belong_together_are_refused(
    tmp_path: Path, port: int, head: Callable[..., Meeting], changes: dict, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARED_S", 0.5)
    meeting = head()
    run = tmp_path / "run"
    if changes.pop("is_unshared", False):
        marker(run).unlink()
    machine = Machine(port, run, **changes)
    with pytest.raises(SubmitError) as caught:
        meeting.await_everyone()
    (problem,) = caught.value.problems
    assert problem.where == where
    assert problem.message in str(machine.outcome)
    if where == "train.max_steps":
        assert problem.value == "train.max_steps: 5 there, 4 on node 0"


def test_two_commands_with_one_index_are_refused_and_a_restarted_one_is_not(
    tmp_path: Path, port: int, head: Callable[..., Meeting]
) -> None:
    meeting = head()
    killed = Connection(socket.create_connection(("127.0.0.1", port)))
    killed.send(Join(1, "a", sees_root=True, command=COMMAND))
    wait_until(lambda: meeting._members)
    killed.close()
    wait_until(lambda: not meeting._members)
    Machine(port, tmp_path / "run")
    assert len(meeting.await_everyone()) == 2
    second = Machine(port, tmp_path / "run")
    assert "two commands claim to be node 1" in str(second.outcome)
    with pytest.raises(SubmitError, match="two commands claim to be node 1"):
        meeting.await_everyone()


def test_a_machine_whose_connection_closes_is_lost_and_one_that_only_waits_is_not(
    tmp_path: Path, port: int, head: Callable[..., Meeting]
) -> None:
    meeting, lost = head(nodes=4), list[tuple[int, str]]()
    machines = [Machine(port, tmp_path / "run", node) for node in (1, 2, 3)]
    meeting.await_everyone()
    meeting.begin(7, lambda node, reason: lost.append((node, reason)))
    machines[1].leave()
    wait_until(lambda: lost)
    assert lost == [(2, "its command has ended")]
    assert set(meeting._members) == {1, 3}


SILENT = """
import socket, sys, time
from launcher.clusters.static_meeting import Connection, Notice
connection = Connection(socket.create_connection((sys.argv[1], int(sys.argv[2]))))
print("connected", flush=True)
try:
    connection.receive(Notice)
except OSError as error:
    print(error.strerror or error)
"""


def test_a_machine_that_falls_silent_is_lost(tmp_path: Path) -> None:
    """A machine in a network of its own loses its link, as if it had lost power: both sides notice."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a network")
    name, here, there = f"lost{os.getpid() % 10000}", "198.18.7.1", "198.18.7.2"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, timeout=20)

    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b", "netns", name)
        ip("addr", "add", f"{here}/30", "dev", f"{name}a")
        ip("link", "set", f"{name}a", "up")
        ip("-n", name, "addr", "add", f"{there}/30", "dev", f"{name}b")
        ip("-n", name, "link", "set", f"{name}b", "up")
        environment = {**os.environ, "LAUNCHER_LOST_NODE_SECONDS": "6"}
        with socket.create_server((here, 0)) as listener:
            words = ["ip", "netns", "exec", name, sys.executable, "-c", SILENT, here, str(listener.getsockname()[1])]
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as machine:
                listener.settimeout(60)
                connected, _ = listener.accept()
                assert machine.stdout is not None
                assert machine.stdout.readline() == "connected\n"
                time.sleep(8)
                assert machine.poll() is None, "a machine that only waits is not lost"
                ip("-n", name, "link", "set", f"{name}b", "down")
                assert machine.stdout.readline() == "Connection timed out\n"
                connected.close()
    finally:
        ip("netns", "delete", name)


def test_a_machine_whose_node_0_ends_is_told(tmp_path: Path, port: int, head: Callable[..., Meeting]) -> None:
    machine = Machine(port, tmp_path / "run")
    meeting = head()
    meeting.await_everyone()
    end_connection(meeting, 1)
    assert "node 0 ended before its plan was ready" in str(machine.outcome)
    machine = Machine(port, tmp_path / "run")
    meeting.await_everyone()
    meeting.begin(7, lambda node, reason: None)
    end_connection(meeting, 1)
    with pytest.raises(OSError, match="its command has ended"):
        machine.read()


def end_connection(meeting: Meeting, node: int) -> None:
    """As the end of node 0's process does."""
    copy = socket.socket(fileno=os.dup(meeting._members[node][0]._framed.fileno()))
    copy.shutdown(socket.SHUT_RDWR)
    copy.close()
    wait_until(lambda: node not in meeting._members)


def test_another_program_at_the_port_is_no_machine(port: int, head: Callable[..., Meeting]) -> None:
    meeting = head()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as other:
        other.sendall(b"GET / HTTP/1.1\n\n")
        with suppress(ConnectionResetError):
            while other.recv(1 << 16):
                pass
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
