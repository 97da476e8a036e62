"""The machines of a static start find each other, over real sockets and files, with each machine as a thread of this process."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from file_owners import MALLORY, as_root
from special_files import make_pipe

from launcher.clusters import network
from launcher.clusters.static import meeting as module
from launcher.clusters.static.meeting import JoiningNode, Meeting, head_endpoint
from launcher.clusters.static.messages import OVER, READY, Answer, Question
from launcher.clusters.static.start_files import StartRefusal, marker, read_marker, read_refusal, write_refusal
from launcher.config.sections.static_identity import NodeIdentity
from launcher.errors import ConfigError, LauncherError, SubmitError

__all__ = ["as_root"]

COMMAND = {"train.max_steps": "4", "model.name": "tiny"}
Outcomes = dict[str, Answer | LauncherError]


@pytest.fixture
def port() -> int:
    return network.free_port("127.0.0.1")


@pytest.fixture
def head(tmp_path: Path, port: int) -> Iterator[Callable[..., Meeting]]:
    opened: list[Meeting] = []

    def open_meeting(nodes: int = 2) -> Meeting:
        opened.append(Meeting(NodeIdentity(0, nodes, "127.0.0.1", port), tmp_path / "run", COMMAND, network.LOOPBACK).open())
        return opened[-1]

    yield open_meeting
    for meeting in opened:
        meeting.close()


def ask(
    port: int,
    run: Path,
    node: int = 1,
    nodes: int = 2,
    command: dict[str, str] = COMMAND,
    describe_end: Callable[[], str | None] = lambda: None,
) -> tuple[threading.Thread, Outcomes]:
    """Start a thread for a machine that waits for the plan."""
    outcomes: Outcomes = {}

    def wait() -> None:
        try:
            here = NodeIdentity(node, nodes, "127.0.0.1", port)
            outcomes["is"] = JoiningNode(here, run, command, describe_end).await_plan(30)
        except LauncherError as error:
            outcomes["is"] = error

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, outcomes


def refusal(outcomes: Outcomes) -> str:
    error = outcomes["is"]
    assert isinstance(error, SubmitError)
    return error.problems[0].message


def test_a_machine_that_comes_first_waits_and_gets_this_start_s_attempt(
    tmp_path: Path, port: int, head: Callable[..., Meeting], capsys: pytest.CaptureFixture[str]
) -> None:
    # The marker of an earlier start that was killed.
    marker(tmp_path / "run").write_text("of an earlier start")
    thread, outcomes = ask(port, tmp_path / "run")
    time.sleep(0.7)
    meeting = head()
    names = meeting.await_everyone(60)
    assert len(set(names)) == 2
    meeting.announce(7, True, names)
    thread.join(60)
    answer = outcomes["is"]
    assert isinstance(answer, Answer)
    assert (answer.state, answer.attempt, answer.own_plan, answer.names) == (READY, 7, True, names)
    # A repeated command does not join a running attempt.
    late = meeting.reply(Question(1, 2, "a", "late", str(tmp_path / "run"), COMMAND))
    assert (late.state, late.attempt, late.message) == ("waiting", 0, "attempt 7 has begun without this command")
    printed = capsys.readouterr().out
    assert f"node 1 of 2: waiting for node 0 at 127.0.0.1:{port}, for 0.5 minutes at most" in printed
    assert "node 1 of 2: waiting for the plan (node 0 is " in printed
    meeting.close()
    assert not marker(tmp_path / "run").exists()


def test_nothing_left_to_do_and_a_refusal_reach_the_other_machines(
    tmp_path: Path, port: int, head: Callable[..., Meeting]
) -> None:
    for end, state in (("end", OVER), ("refuse", None)):
        thread, outcomes = ask(port, tmp_path / "run")
        meeting = head()
        meeting.await_everyone(60)
        getattr(meeting, end)("because of this")
        meeting.close()
        thread.join(60)
        if state is not None:
            assert replace(outcomes["is"], nonce="", host="", attempt=0) == Answer("", "", state, "because of this")
        else:
            assert refusal(outcomes) == "node 0 has refused the start: because of this"


def test_a_machine_that_asks_too_late_learns_what_has_become_of_the_start(
    tmp_path: Path, port: int, head: Callable[..., Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OVER_AFTER_S", 0.2)
    monkeypatch.setattr(module, "REFUSED_AFTER_S", 0.6)
    meeting = head()
    meeting.refuse("rows.jsonl:3: not JSON")
    meeting.close()
    thread, outcomes = ask(port, tmp_path / "run")
    thread.join(60)
    assert refusal(outcomes).startswith("node 0 had refused the start before this machine connected: rows.jsonl:3: not JSON")
    # A machine whose run is over reports that, not an earlier refusal.
    thread, outcomes = ask(port, tmp_path / "run", describe_end=lambda: "the run is completed")
    thread.join(60)
    assert replace(outcomes["is"], host="") == Answer("", "", OVER, "the run is completed")
    # The next start removes the refusal, so this machine waits for node 0's plan.
    meeting = head()
    thread, outcomes = ask(port, tmp_path / "run")
    meeting.announce(1, True, meeting.await_everyone(60))
    thread.join(60)
    assert outcomes["is"].state == READY
    meeting.close()
    assert not list(tmp_path.glob(".run.*"))
    # An old refusal does not belong to this start.
    write_refusal(tmp_path / "run", "host", "an old reason")
    assert read_refusal(tmp_path / "run", 60.0) == StartRefusal("host", "an old reason")
    os.utime(tmp_path / ".run.refused", (time.time() - 3600,) * 2)
    assert read_refusal(tmp_path / "run", 60.0) is None


@pytest.mark.usefixtures("as_root")
def test_what_another_user_has_left_in_a_shared_folder_is_not_believed(
    tmp_path: Path, head: Callable[..., Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a sticky folder, another user can create both files first, because their names follow from the run's name."""
    run = tmp_path / "run"
    write_refusal(run, "host", "their reason")
    marker(run).write_text("their number")
    for file in (tmp_path / ".run.refused", marker(run)):
        os.chown(file, MALLORY, -1)
    assert read_refusal(run, 60.0) is None
    assert read_marker(run) == ""

    def sticky(source: object, target: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    # What the system raises for users other than root.
    monkeypatch.setattr(os, "replace", sticky)
    with pytest.raises(SubmitError, match=f"{MALLORY} created the file through which these machines meet"):
        head()


def test_a_machine_that_does_not_come_is_named(head: Callable[..., Meeting], port: int) -> None:
    meeting = head(nodes=3)
    with pytest.raises(SubmitError) as caught:
        meeting.await_everyone(0.5)
    (problem,) = caught.value.problems
    assert problem.message == "node 1, node 2 of 3 did not join"
    assert f"127.0.0.1:{port}" in problem.remedy


def test_another_command_is_refused_with_what_differs(tmp_path: Path, port: int, head: Callable[..., Meeting]) -> None:
    meeting = head()
    ask(port, tmp_path / "run", command={**COMMAND, "train.max_steps": "5"})
    with pytest.raises(ConfigError) as caught:
        meeting.await_everyone(60)
    (problem,) = caught.value.problems
    assert "was started with a different command from node 0" in problem.message
    assert problem.value == "train.max_steps: 5 there, 4 on node 0"


@pytest.mark.parametrize(
    "changes, where", [({"nodes": 3}, "cluster.nodes"), ({"node": 0}, "cluster.node_rank"), ({"elsewhere": True}, "run.root")]
)
def test_machines_that_do_not_belong_together_are_refused(
    tmp_path: Path, port: int, head: Callable[..., Meeting], changes: dict[str, int], where: str
) -> None:
    meeting = head()
    run = tmp_path / "other" / "run" if changes.pop("elsewhere", False) else tmp_path / "run"
    ask(port, run, **changes)
    with pytest.raises(LauncherError) as caught:
        meeting.await_everyone(60)
    (problem,) = caught.value.problems
    assert problem.where == where
    assert problem.remedy


def test_two_commands_with_one_index_are_refused_and_a_restarted_one_is_not(tmp_path: Path, head: Callable[..., Meeting]) -> None:
    meeting = head()
    nonce = marker(tmp_path / "run").read_text()
    question = Question(1, 2, "a", "first", str(tmp_path / "run"), COMMAND, sees=nonce)
    meeting.reply(question)
    meeting.reply(replace(question, process="second", host="b"))
    assert len(meeting.await_everyone(1)) == 2
    meeting.reply(question)
    with pytest.raises(ConfigError, match="two commands claim to be node 1"):
        meeting.await_everyone(1)


def test_a_run_root_that_is_not_shared_is_named_on_both_sides(
    tmp_path: Path, port: int, head: Callable[..., Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing the number's file without telling node 0 acts as if node 0 wrote it to a different folder."""
    monkeypatch.setattr(module, "SHARED_S", 1.0)
    meeting = head()
    marker(tmp_path / "run").unlink()
    thread, outcomes = ask(port, tmp_path / "run")
    with pytest.raises(SubmitError) as caught:
        meeting.await_everyone(60)
    (problem,) = caught.value.problems
    assert problem.message.startswith("run.root is not shared: ")
    assert (problem.where, problem.value) == ("run.root", str(tmp_path))
    assert "every machine mounts under the same path" in problem.remedy
    thread.join(60)
    assert "run.root is not shared" in refusal(outcomes)


def test_a_pipe_in_place_of_the_number_holds_no_machine(
    tmp_path: Path, port: int, head: Callable[..., Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user can create the pipe in a runs folder that several users share."""
    monkeypatch.setattr(module, "SHARED_S", 1.0)
    meeting = head()
    marker(tmp_path / "run").unlink()
    make_pipe(marker(tmp_path / "run"))
    thread, outcomes = ask(port, tmp_path / "run")
    with pytest.raises(SubmitError, match=r"run\.root is not shared"):
        meeting.await_everyone(60)
    thread.join(60)
    assert "run.root is not shared" in refusal(outcomes)
    meeting.close()


def test_what_is_no_question_gets_no_answer(port: int, head: Callable[..., Meeting]) -> None:
    head()
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert connection.recv(100) == b""


def test_a_taken_port_and_a_root_that_cannot_be_written_are_refused(tmp_path: Path, port: int) -> None:
    here = NodeIdentity(0, 2, "127.0.0.1", port)
    taken = pytest.raises(SubmitError, match=f"node 0 cannot listen on 127.0.0.1:{port}")
    with socket.create_server(("127.0.0.1", port)), taken:
        Meeting(here, tmp_path / "run", COMMAND, network.LOOPBACK).open()
    assert not marker(tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SubmitError, match="cannot be written"):
        Meeting(here, tmp_path / "file" / "run", COMMAND, network.LOOPBACK).open()


def test_a_public_address_is_refused_unless_it_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_interfaces", lambda: {"eth0": ["8.8.4.4"]})
    here = NodeIdentity(0, 2, "8.8.4.4", 29500)
    with pytest.raises(SubmitError, match="the machines would connect to each other over a public address"):
        head_endpoint(here, None, allow_public=False)
    assert head_endpoint(here, None, allow_public=True) == network.Endpoint("8.8.4.4", "eth0")
    assert head_endpoint(NodeIdentity(0, 1, None, 29500), None, allow_public=False) is None


def test_the_address_of_a_service_or_of_localhost_leaves_the_choice_to_the_default_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_interfaces", lambda: {"lo": ["127.0.0.1"], "eth0": ["10.1.0.7"], "ib0": ["10.9.0.7"]})
    monkeypatch.setattr(network, "_routed_from", lambda peer: "10.1.0.7")
    for host in ("localhost", "10.96.0.1"):
        assert network.endpoint_of(host, None) == network.Endpoint("10.1.0.7", "eth0")
    assert network.endpoint_of("10.9.0.7", None) == network.Endpoint("10.9.0.7", "ib0")
    assert network.endpoint_of("10.9.0.7", "eth0") == network.Endpoint("10.1.0.7", "eth0")
    # Processes on the same machine.
    assert network.endpoint_of("127.0.0.2", None) == network.Endpoint("127.0.0.2", "lo")
