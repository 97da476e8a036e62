"""The nodes' network: the address at which other nodes reach this one, free ports, and whether a node is reachable."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from launcher.clusters.slurm.commands import SlurmError, slurm
from launcher.errors import RunError, SubmitError

# The variable with a node's name in its attempt: host names may not be unique.
NODE_NAME_VARIABLE = "LAUNCHER_NODE_NAME"
_CONNECT_S = 2.0
_PAUSE_S = 0.05
# A datagram socket connects without a packet: the kernel only chooses the route.
_ANY_PORT = 9
# A documentation address (RFC 5737), which is reached through the default route.
_ANYWHERE = "192.0.2.1"
_REMEDY = "set cluster.interface to the network between the nodes, or ask the administrators to repair routes and host names"


@dataclass(frozen=True)
class Endpoint:
    """An address of this node and its interface, such as 10.0.0.7 on ib0."""

    address: str
    interface: str

    def choose_meeting(self) -> dict[str, Any]:
        """Return the fields of an attempt that tell where its agents meet: here, at a free port."""
        return {"address": self.address, "interface": self.interface, "port": free_port(self.address)}


# Where the processes of a single node meet: unreachable from outside.
LOOPBACK = Endpoint("127.0.0.1", "lo")


def node_name() -> str:
    """Return this node's name: the one given to its agent, else Slurm's (as --exclude expects it), else the host name."""
    return os.environ.get(NODE_NAME_VARIABLE) or os.environ.get("SLURMD_NODENAME") or os.uname().nodename


def own_endpoint(peers: Sequence[str], interface: str | None) -> Endpoint:
    """Return where this node listens: on `interface`, or else on the interface with the route to the first other node.

    `peers` are the nodes' addresses or names and may include this node; if there is no other node, loopback is used.

    Raises:
        RunError: if the interface does not exist or has no address, or if only loopback or link-local addresses are found.
    """
    if interface is not None:
        return Endpoint(_address_of(interface), interface)
    own = {address for addresses in _list_interfaces().values() for address in addresses}
    names = {node_name(), os.uname().nodename, "localhost"}
    for peer in peers:
        if peer in names or peer in own or (_is_address(peer) and ipaddress.ip_address(peer).is_loopback):
            continue
        address = _resolve(peer)
        if address is None or ipaddress.ip_address(address).is_loopback:
            raise RunError(
                f"the node {peer} {'has an unknown name' if address is None else 'resolves to a loopback address'}",
                where=node_name(),
                value=f"{peer} resolves to {address or 'nothing'}",
                remedy=_REMEDY,
            )
        if address not in own:
            return _find_route_to(address)
    return LOOPBACK


def endpoint_of(host: str, interface: str | None) -> Endpoint:
    """Return where this node, known to others as `host`, listens: on `interface`, or else on the interface with that address.

    A loopback address, such as 127.0.0.1, connects only processes on this machine. If the name resolves to loopback, or to the
    address of a service in front of this node, the default route decides instead.

    Raises:
        RunError: if the interface does not exist or has no address, or this node has no network.
    """
    if interface is not None:
        return Endpoint(_address_of(interface), interface)
    address = _resolve(host)
    if address is not None and (_is_address(host) or not _is_local(address)):
        for name, addresses in _list_interfaces().items():
            if address in addresses:
                return Endpoint(address, name)
        if ipaddress.ip_address(address).is_loopback:
            # All of 127.0.0.0/8 belongs to the loopback interface.
            return Endpoint(address, LOOPBACK.interface)
    return _find_route_to(_ANYWHERE)


def node_addresses(node_list: str, retry_s: float = 0.0) -> dict[str, str]:
    """Return the addresses of an allocation's nodes, keyed by name, in the order of Slurm's `node_list`, such as n[1-3].

    An address comes from NodeAddr, which Slurm itself uses to reach the node, or else from the node's name. A name that resolves
    to loopback is useless unless it is this node's own; then the address with a route to the others is used. If Slurm provides no
    NodeAddr, because it hides its nodes or does not answer for `retry_s`, only names are used.

    Raises:
        RunError: if a node has no address that the others could reach.
        SlurmError: for an invalid list.
    """
    hosts = slurm("scontrol", "show", "hostnames", node_list).split()
    try:
        nodes = slurm("scontrol", "--oneliner", "show", "node", node_list, retry_s=retry_s)
    except SlurmError:
        nodes = ""
    known = dict(re.findall(r"^NodeName=(\S+) .*?\bNodeAddr=(\S+)", nodes, re.MULTILINE))
    addresses: dict[str, str | None] = dict.fromkeys(hosts)
    for host in hosts:
        for name in (known.get(host, host), host):
            address = _resolve(name)
            if address is not None and (_is_address(name) or not ipaddress.ip_address(address).is_loopback):
                addresses[host] = address
                break
    for host, address in addresses.items():
        if address is None and host == node_name():
            addresses[host] = own_endpoint([other for other in addresses.values() if other], None).address
        elif address is None:
            raise RunError(
                f"the node {host} has no address that other nodes can reach",
                where=node_name(),
                value=f"NodeAddr={known.get(host, '')} and the name {host} resolve to loopback or to nothing",
                remedy=f"ask the administrators to give {host} a NodeAddr, or a name that does not resolve to loopback",
            )
    return {host: str(address) for host, address in addresses.items()}


def require_private(endpoint: Endpoint, interface: str | None) -> Endpoint:
    """Return the endpoint where nodes meet; refuse an address on the internet unless the settings name its `interface`."""
    if interface is None and ipaddress.ip_address(endpoint.address).is_global:
        raise SubmitError(
            "the nodes would connect to each other over a public address",
            where="cluster.interface",
            value=f"{endpoint.address} on {endpoint.interface}",
            remedy="set cluster.interface to a private network, or to this one if a firewall protects it",
        )
    return endpoint


def free_port(address: str) -> int:
    """Return a TCP port that is currently free on this node's `address`; it is not reserved."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def await_reachable(address: str, port: int, deadline_s: float) -> bool:
    """Return whether a TCP connection to `address` succeeds within the deadline."""
    until = time.monotonic() + deadline_s
    while (left := until - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), timeout=min(left, _CONNECT_S)).close()
            return True
        except OSError:
            time.sleep(min(left, _PAUSE_S))
    return False


def _address_of(interface: str) -> str:
    usable = {name: [a for a in addresses if not _is_local(a)] for name, addresses in _list_interfaces().items()}
    if usable.get(interface):
        return min(usable[interface], key=_family)
    listed = "; ".join(f"{name}: {', '.join(addresses)}" for name, addresses in usable.items() if addresses)
    raise RunError(
        f"the network interface {interface} does not exist on {node_name()}, or has no address that other nodes can reach",
        where="cluster.interface",
        value=interface,
        remedy=f"choose one of those with an address ({listed or 'there is none'}), or leave cluster.interface unset",
    )


def _find_route_to(peer: str) -> Endpoint:
    """Return the endpoint from which this node connects to `peer`."""
    with socket.socket(_family(peer), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, _ANY_PORT))
        except OSError as error:
            raise RunError(
                f"{node_name()} has no route to the other nodes: {error.strerror}", where=node_name(), value=peer, remedy=_REMEDY
            ) from None
        address = probe.getsockname()[0]
    if _is_local(address):
        raise RunError(
            f"{node_name()} connects to the other nodes from {address}, where they cannot reach it",
            where=node_name(),
            value=f"the route to {peer}",
            remedy=_REMEDY,
        )
    return Endpoint(address, next((name for name, addresses in _list_interfaces().items() if address in addresses), ""))


def _resolve(name: str) -> str | None:
    """Return the address of a name, IPv4 before IPv6, or None if it does not resolve."""
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    # AF_INET is the smallest of the families.
    return str(min(entries, key=lambda entry: entry[0])[4][0])


def _list_interfaces() -> dict[str, list[str]]:
    """Return the IP addresses of every interface, without zones of link-local addresses."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
    }


def _is_local(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_link_local or parsed.is_unspecified


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
