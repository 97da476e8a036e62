"""The machines of a static start find each other, over real sockets and files, with each machine as a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.clusters import network
from launcher.clusters import static_meeting as module
from launcher.clusters.static_meeting import OVER, READY, REFUSED, Answer, Meeting, Question, await_plan, head_endpoint, marker
from launcher.config.sections.static import NodeIdentity
from launcher.errors import ConfigError, LauncherError, SubmitError

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
            outcomes["is"] = await_plan(NodeIdentity(node, nodes, "127.0.0.1", port), run, command, describe_end)
        except LauncherError as error:
            outcomes["is"] = error

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread, outcomes


def test_a_machine_that_comes_first_waits_and_gets_this_start_s_attempt(
    tmp_path: Path, port: int, head: Callable[..., Meeting], capsys: pytest.CaptureFixture[str]
) -> None:
    # The marker of an earlier start that was killed.
    marker(tmp_path / "run").write_text("of an earlier start")
    thread, outcomes = ask(port, tmp_path / "run")
    time.sleep(0.7)
    meeting = head()
    names = meeting.await_everyone()
    assert len(set(names)) == 2
    meeting.announce(7, True, names)
    thread.join(60)
    answer = outcomes["is"]
    assert isinstance(answer, Answer)
    assert (answer.state, answer.attempt, answer.own_plan, answer.names) == (READY, 7, True, names)
    # A repeated command does not join a running attempt.
    late = meeting.reply(Question(1, 2, "a", "late", str(tmp_path / "run"), COMMAND))
    assert (late.state, late.attempt) == ("waiting", 0)
    assert f"node 1 of 2: waiting for node 0 at 127.0.0.1:{port}" in capsys.readouterr().out
    meeting.close()
    assert not marker(tmp_path / "run").exists()


@pytest.mark.parametrize("state", [OVER, REFUSED])
def test_nothing_left_to_do_and_a_refusal_reach_the_other_machines(
    tmp_path: Path, port: int, head: Callable[..., Meeting], state: str
) -> None:
    thread, outcomes = ask(port, tmp_path / "run")
    meeting = head()
    meeting.await_everyone()
    meeting.tell("because of this", state)
    meeting.close()
    thread.join(60)
    if state == OVER:
        assert replace(outcomes["is"], nonce="", host="") == Answer("", "", OVER, "because of this")
    else:
        assert isinstance(outcomes["is"], SubmitError)
        assert "because of this" in str(outcomes["is"])


def test_a_machine_that_asks_too_late_learns_that_the_run_is_over(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OVER_AFTER_S", 0.2)
    thread, outcomes = ask(port, tmp_path / "run", describe_end=lambda: "the run is completed")
    thread.join(60)
    assert replace(outcomes["is"], host="") == Answer("", "", OVER, "the run is completed")


def test_machines_that_do_not_come_are_named_on_both_sides(
    tmp_path: Path, head: Callable[..., Meeting], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.5)
    with pytest.raises(SubmitError) as caught:
        head(nodes=3).await_everyone()
    (problem,) = caught.value.problems
    assert problem.message == "node 1, node 2 of 3 did not join"
    thread, outcomes = ask(network.free_port("127.0.0.1"), tmp_path / "run")
    thread.join(60)
    assert isinstance(outcomes["is"], SubmitError)


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
    thread, outcomes = ask(port, run, **changes)
    with pytest.raises(LauncherError) as caught:
        meeting.await_everyone()
    (problem,) = caught.value.problems
    assert problem.where == where
    thread.join(60)
    assert problem.message in str(outcomes["is"])
    if where == "command line":
        assert problem.value == "train.max_steps: 5 there, 4 on node 0"


def test_two_commands_with_one_index_are_refused_and_a_restarted_one_is_not(tmp_path: Path, head: Callable[..., Meeting]) -> None:
    meeting = head()
    nonce = marker(tmp_path / "run").read_text()
    question = Question(1, 2, "a", "first", str(tmp_path / "run"), COMMAND, sees=nonce)
    meeting.reply(question)
    meeting.reply(replace(question, process="second", host="b"))
    assert len(meeting.await_everyone()) == 2
    meeting.reply(question)
    with pytest.raises(ConfigError, match="two commands claim to be node 1"):
        meeting.await_everyone()


def test_a_run_root_that_is_not_shared_is_named_on_both_sides(
    tmp_path: Path, port: int, head: Callable[..., Meeting], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Removing the number's file without telling node 0 acts as if node 0 wrote it to a different folder."""
    monkeypatch.setattr(module, "SHARED_S", 1.0)
    meeting = head()
    marker(tmp_path / "run").unlink()
    thread, outcomes = ask(port, tmp_path / "run")
    with pytest.raises(SubmitError) as caught:
        meeting.await_everyone()
    (problem,) = caught.value.problems
    assert (problem.where, problem.value) == ("run.root", str(tmp_path))
    thread.join(60)
    assert "run.root is not shared" in str(outcomes["is"])


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
