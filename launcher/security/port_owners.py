"""Which users' processes listen on a port of this machine: any user may take a port before its intended service or tunnel."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from launcher.errors import Problem
from launcher.security.trust import FLAG, Trust, user_name

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENS = "0A"
_WORD = 8
_PORTS = {"http": 80, "https": 443}

Address = IPv4Address | IPv6Address


def users_listening(port: int) -> dict[Address, set[int]] | None:
    """Return the users whose processes listen on a port, keyed by address, or None if the system does not report it."""
    users: dict[Address, set[int]] = {}
    try:
        # A system without IPv6 lacks the second file.
        texts = [table.read_text() for table in _TABLES if table.exists()]
    except OSError:
        return None
    if not texts:
        return None
    for text in texts:
        for row in [line.split() for line in text.splitlines()[1:]]:
            # Columns, see proc(5): the local address in words of the machine's byte order, the state, and the user.
            address, _, number = row[1].partition(":")
            if row[3] == _LISTENS and int(number, 16) == port:
                words = (int(address[start : start + _WORD], 16) for start in range(0, len(address), _WORD))
                packed = b"".join(word.to_bytes(_WORD // 2, sys.byteorder) for word in words)
                users.setdefault(ip_address(packed), set()).add(int(row[7]))
    return users


def server_problem(where: str, address: str) -> Problem | None:
    """Return the problem with an address on this machine at which an untrusted user listens, or None.

    That user would receive what is sent there, such as a token. `address` is a URL or host:port; `where` is the setting with it.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        # This is not a valid port number.
        return None
    trust = Trust.from_environ(os.environ)
    if host is None or port is None or trust.anyone:
        return None
    strangers = [uid for uid in _users_reached(host, port) if not trust.accepts_owner(uid)]
    if not strangers:
        return None
    user = user_name(min(strangers))
    remedy = f"choose another port, for an ssh tunnel too; if you trust {user} with your account, add {FLAG} {user}"
    message = f"a process of {user} listens at this address, and would get your token or key"
    return Problem(message, where, address, remedy)


def _users_reached(host: str, port: int) -> set[int]:
    """Return the users who would receive a connection to a port, if it is on this machine."""
    reached: set[int] = set()
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    listening = users_listening(port) or {}
    for address in _resolve(host) if listening else ():
        if address.is_loopback or str(address) in own:
            # The system prefers a listener at the exact address to one at all addresses.
            mapped = [IPv6Address(f"::ffff:{address}"), IPv6Address("::")] if isinstance(address, IPv4Address) else []
            candidates = [address, IPv4Address(0) if mapped else IPv6Address("::"), *mapped]
            reached |= next((listening[one] for one in candidates if one in listening), set())
    return reached


def _resolve(host: str) -> set[Address]:
    with suppress(OSError):
        return {ip_address(str(entry[4][0]).partition("%")[0]) for entry in socket.getaddrinfo(host, None)}
    return set()
