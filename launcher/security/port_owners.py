"""Which users' processes listen on a port of this machine: any user may take a port before its intended service or tunnel."""

from __future__ import annotations

import os
import socket
import sys
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import psutil

from launcher.errors import Problem
from launcher.security.redaction import redact
from launcher.security.trust import FLAG, Trust, uid_of_unmapped_users, user_name

_TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
_LISTENS = "0A"
_WORD = 8
# The default port of an address without one.
_PORTS = {
    "http": 80,
    "https": 443,
    "ftp": 21,
    "sftp": 22,
    "ssh": 22,
    "smb": 445,
    "webhdfs": 50070,
    "socks5": 1080,
    "socks5h": 1080,
}
# What a user gains who listens at an address: for a server that gets a credential, and for storage.
GETS_KEY = "would get your token or key"
IS_STORAGE = "would get what is written there, and choose what is read"

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


def server_problem(where: str, address: str, gain: str = GETS_KEY) -> Problem | None:
    """Return the problem with an address on this machine at which an untrusted user listens, or None.

    That user would receive what is sent there, such as a token. `address` is a URL or host:port, `where` is the setting with it,
    and `gain` says what the user would gain. What is sent to an http:// address through a proxy is readable to the proxy.
    """
    trust = Trust.from_environ(os.environ)
    parts = _split(address)
    if (uid := _stranger(parts, trust)) is not None:
        remedy = f"choose another port, for an ssh tunnel too; {_acceptance(uid)}"
        return Problem(f"a process of {_owner(uid)} listens at this address, and {gain}", where, redact(address), remedy)
    variable, proxy = _proxy(parts)
    if (uid := _stranger(proxy, trust)) is not None:
        message = f"a process of {_owner(uid)} listens at the address of the proxy for {where}, and {gain}"
        remedy = f"add the host to no_proxy, or choose another proxy; {_acceptance(uid)}"
        return Problem(message, variable, f"{proxy.hostname}:{proxy.port}", remedy)
    return None


def _owner(uid: int) -> str:
    """Return a user's name. In a rootless container, all users outside it, root included, have the same uid."""
    return "a user outside this container" if uid == uid_of_unmapped_users() else user_name(uid)


def _acceptance(uid: int) -> str:
    whom = "all users outside this container" if uid == uid_of_unmapped_users() else user_name(uid)
    return f"if you trust {whom} with your account, add {FLAG} {user_name(uid)}"


def _stranger(parts: SplitResult, trust: Trust) -> int | None:
    """Return the uid of the untrusted user who listens at an address on this machine, or None."""
    try:
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        # This is not a valid port number.
        return None
    if host is None or port is None or trust.anyone:
        return None
    strangers = [uid for uid in _users_reached(host, port) if not trust.accepts_owner(uid)]
    return min(strangers, default=None)


def _proxy(parts: SplitResult) -> tuple[str, SplitResult]:
    """Return the proxy for an address, and the variable that names it; empty for an encrypted address or without a proxy."""
    nothing = "", _split("")
    if parts.scheme != "http" or not parts.hostname:
        return nothing
    # Imported here because it loads slowly.
    from urllib.request import getproxies_environment, proxy_bypass

    proxies = getproxies_environment()
    kind = next((kind for kind in ("http", "all") if kind in proxies), None)
    if kind is None or proxy_bypass(parts.hostname, proxies):
        return nothing
    return f"{kind}_proxy", _split(proxies[kind], "http:")


def _split(address: str, scheme: str = "") -> SplitResult:
    """Return the parts of a URL, or of host:port with `scheme`; empty parts for an invalid address, which its client reports."""
    try:
        return urlsplit(address if "://" in address else f"{scheme}//{address}")
    except ValueError:
        return urlsplit("")


def _users_reached(host: str, port: int) -> set[int]:
    """Return the users who would receive a connection to a port, if it is on this machine."""
    reached: set[int] = set()
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    listening = users_listening(port) or {}
    for address in map(_destination, _resolve(host)) if listening else ():
        if address.is_loopback or str(address) in own:
            # The system prefers a listener at the exact address to one at all addresses.
            is_v4 = isinstance(address, IPv4Address)
            others = ("0.0.0.0", f"::ffff:{address}", "::ffff:0.0.0.0", "::") if is_v4 else ("::",)  # noqa: S104
            reached |= next((listening[one] for one in (address, *map(ip_address, others)) if one in listening), set())
    return reached


def _destination(address: Address) -> Address:
    """Return the address that receives a connection: the system connects to loopback in place of 0.0.0.0 and ::."""
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_unspecified:
        return ip_address("127.0.0.1" if address.version == 4 else "::1")
    return address


def _resolve(host: str) -> set[Address]:
    # A name with an empty or overlong part raises UnicodeError.
    with suppress(OSError, UnicodeError):
        return {ip_address(str(entry[4][0]).partition("%")[0]) for entry in socket.getaddrinfo(host, None)}
    return set()
