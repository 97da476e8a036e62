from __future__ import annotations

import ipaddress
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest

from launcher.clusters import network
from launcher.clusters.network import Endpoint
from launcher.errors import RunError, SubmitError

NODES = {
    "n1": "NodeName=n1 Arch=x86_64 CPUAlloc=0 NodeAddr=10.0.0.1 NodeHostName=n1 Port=6818 State=IDLE",
    "n2": "NodeName=n2 Arch=x86_64 CPUAlloc=0 NodeAddr=10.0.0.2 NodeHostName=n2 Port=6818 State=IDLE",
}


@pytest.fixture
def wired() -> tuple[str, str]:
    """An interface of this machine that is not loopback, and its first IPv4 address."""
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and not network._is_local(entry.address):
                return name, entry.address
    pytest.skip("this machine has no network")


@pytest.fixture
def neighbor(wired: tuple[str, str]) -> str:
    """An address on the same network as `wired` that this machine does not have."""
    own = ipaddress.ip_address(wired[1])
    return str(own + 1 if int(own) % 256 < 254 else own - 1)


@pytest.fixture
def resolves(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """Make only the given names resolve."""

    def install(names: Mapping[str, str]) -> None:
        def getaddrinfo(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
            try:
                address = str(ipaddress.ip_address(host))
            except ValueError:
                if host not in names:
                    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None
                address = names[host]
            return [(socket.AF_INET6 if ":" in address else socket.AF_INET, 0, 0, "", (address, 0))]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return install


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A fake scontrol that knows the given nodes, one per line."""

    def install(**nodes: str) -> None:
        command = tmp_path / "scontrol"
        listed, described = "\n".join(nodes), "\n".join(nodes.values())
        command.write_text(
            '#!/bin/sh\ncase "$*" in\n'
            f"'show hostnames n[1-2]') printf '%s\\n' '{listed}' ;;\n"
            f"'--oneliner show node n[1-2]') printf '%s\\n' '{described}' ;;\n"
            '*) echo "not asked for: $*" >&2; exit 1 ;;\nesac\n'
        )
        command.chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return install


@pytest.mark.parametrize("interface", ["nowhere0", "lo"])
def test_an_unusable_interface_is_refused_with_the_usable_ones(wired: tuple[str, str], interface: str) -> None:
    with pytest.raises(RunError) as caught:
        network.own_endpoint([], interface)
    (problem,) = caught.value.problems
    assert (problem.where, problem.value) == ("cluster.interface", interface)
    assert f"{wired[0]}: {wired[1]}" in problem.remedy
    assert "127.0.0.1" not in problem.remedy


def test_without_an_interface_the_route_to_the_first_other_node_decides(wired: tuple[str, str], neighbor: str) -> None:
    name, address = wired
    assert network.own_endpoint([address, os.uname().nodename, neighbor, "203.0.113.9"], None) == Endpoint(address, name)


def test_one_node_alone_uses_loopback(wired: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "as-slurm-says")
    peers = [wired[1], "127.0.0.1", "127.77.3.2", "localhost", os.uname().nodename, "as-slurm-says"]
    assert network.own_endpoint([], None) == network.own_endpoint(peers, None) == Endpoint("127.0.0.1", "lo")


def test_a_node_without_an_address_or_a_route_is_refused(resolves: Callable[..., None]) -> None:
    resolves({"n2": "127.0.1.1"})
    for name in ("n2", "n3", "255.255.255.255"):
        with pytest.raises(RunError):
            network.own_endpoint([name], None)


def test_a_nodeaddr_that_is_a_name_is_resolved_and_loopback_is_skipped(
    scontrol: Callable[..., None], resolves: Callable[..., None]
) -> None:
    resolves({"n1-ib": "10.9.0.1", "n2-alias": "127.0.1.1", "n2": "10.9.0.2"})
    scontrol(n1=NODES["n1"].replace("10.0.0.1", "n1-ib"), n2=NODES["n2"].replace("10.0.0.2", "n2-alias"))
    assert network.node_addresses("n[1-2]") == {"n1": "10.9.0.1", "n2": "10.9.0.2"}


def test_this_node_with_a_loopback_name_uses_its_route_to_the_others(
    scontrol: Callable[..., None],
    resolves: Callable[..., None],
    wired: tuple[str, str],
    neighbor: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolves({"n1": "127.0.1.1"})
    scontrol(n1=NODES["n1"].replace("10.0.0.1", "n1"), n2=NODES["n2"].replace("10.0.0.2", neighbor))
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    assert network.node_addresses("n[1-2]") == {"n1": wired[1], "n2": neighbor}
    monkeypatch.setenv("SLURMD_NODENAME", "n2")
    with pytest.raises(RunError, match="n1 has no address that other nodes can reach"):
        network.node_addresses("n[1-2]")


def test_nodes_meet_on_a_public_address_only_if_the_settings_name_its_interface() -> None:
    private, public = network.Endpoint("10.0.0.1", "eth0"), network.Endpoint("8.8.8.8", "eth0")
    assert network.require_private(private, None) == private
    assert network.require_private(public, "eth0") == public
    with pytest.raises(SubmitError, match="public address"):
        network.require_private(public, None)


def test_a_listener_that_comes_late_is_awaited() -> None:
    port = network.free_port("127.0.0.1")
    with socket.socket() as listener:

        def listen() -> None:
            listener.bind(("127.0.0.1", port))
            listener.listen()

        timer = threading.Timer(0.3, listen)
        timer.start()
        assert network.await_reachable("127.0.0.1", port, 20)
        timer.join()


def test_an_unreachable_address_is_reported_at_the_deadline(neighbor: str) -> None:
    started = time.monotonic()
    assert not network.await_reachable(neighbor, network.free_port("127.0.0.1"), 0.3)
    assert time.monotonic() - started < 5
