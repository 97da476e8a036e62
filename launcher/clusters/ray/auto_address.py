"""The Ray of this machine that cluster.address=auto means.

Ray itself joins what its files in /tmp/ray name, or any process called raylet, whoever started it. Whoever runs a Ray gets the
code of a run and the token, and decides what the driver unpickles: so only one of a trusted user is joined.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from launcher import atomic_files
from launcher.errors import SubmitError
from launcher.security import port_owners
from launcher.security.trust import FLAG, Trust, user_name

_WHERE, _AUTO = "cluster.address", "auto"
_MAX_ADDRESS_BYTES = 4096


@dataclass(frozen=True)
class _Raylet:
    """Ray's process on this machine: the users that it runs as, the address of its cluster and the folder of its sockets."""

    uids: frozenset[int]
    address: str
    session: Path


def address_to_join(address: str) -> str:
    """Return the address for ray.init of a setting cluster.address; Ray never searches for a cluster itself.

    Raises:
        SubmitError: as find_address does, and where another user has the address of this machine that is named.
    """
    if address == _AUTO:
        address = os.environ.get("RAY_ADDRESS") or _AUTO
    if address == _AUTO:
        return find_address()
    require_own_listener(address)
    return address


def require_own_listener(address: str) -> None:
    """Refuse a host:port of this machine that another user has taken: the driver sends it the token, and unpickles its answers.

    Raises:
        SubmitError: with the user.
    """
    if problem := port_owners.server_problem(_WHERE, address):
        raise SubmitError(problem)


def find_address() -> str:
    """Return host:port of the cluster to which this machine belongs, by the processes of trusted users.

    Raises:
        SubmitError: if there is none, or only those of others, or several of which none is the newest by Ray's own file.
    """
    raylets = list(_raylets())
    if not raylets:
        raise SubmitError(
            "no Ray runs on this machine",
            where=_WHERE,
            value=_AUTO,
            remedy="start one with: ray start --head, or unset cluster.address to have one started for this run",
        )
    trust = Trust.from_environ(os.environ)
    trusted = [raylet for raylet in raylets if trust.anyone or all(map(trust.accepts_owner, raylet.uids))]
    if not trusted:
        user = user_name(max(raylets[0].uids))
        raise SubmitError(
            f"the Ray of this machine belongs to {user}, who could run code as you in the driver and read what the run sends",
            where=_WHERE,
            value=f"{_AUTO}: {raylets[0].address}",
            remedy=f"unset cluster.address to have a Ray started for this run; if you trust {user} with your account, add "
            f"{FLAG} {user}",
        )
    addresses = sorted({raylet.address for raylet in trusted})
    if len(addresses) > 1:
        newest = _newest_address()
        if newest not in addresses:
            remedy = f"choose one: cluster.address={addresses[0]}"
            raise SubmitError("several Rays run on this machine", where=_WHERE, value=", ".join(addresses), remedy=remedy)
        addresses = [newest]
    session = next(raylet.session for raylet in trusted if raylet.address == addresses[0])
    _require_owner(session, trust)
    return addresses[0]


def _require_owner(session: Path, trust: Trust) -> None:
    """Refuse a folder of sockets that another user owns. Ray makes the folder above writable for everyone."""
    try:
        uid = session.lstat().st_uid
    except OSError:
        # Of a container whose processes are seen here; Ray looks at its own.
        return
    if not trust.anyone and not trust.accepts_owner(uid):
        raise SubmitError(
            f"the folder of the Ray of this machine belongs to {user_name(uid)}, who may have put it in place of Ray's own",
            where=str(session),
            value=_AUTO,
            remedy="stop this Ray, start it again with --temp-dir in a folder that is closed to others; or unset cluster.address",
        )


def _raylets() -> Iterator[_Raylet]:
    for process in psutil.process_iter(["cmdline", "uids"]):
        arguments, uids = process.info["cmdline"] or [], process.info["uids"]
        if not arguments or uids is None or "raylet" not in Path(arguments[0]).name:
            continue
        flags = dict(argument.split("=", 1) for argument in arguments[1:] if argument.startswith("--") and "=" in argument)
        address, session = flags.get("--gcs-address"), flags.get("--session_dir")
        if address and session:
            # A program with setuid has an effective user who did not write its arguments.
            yield _Raylet(frozenset(uids), address, Path(session))


def _newest_address() -> str:
    """Return the address that the last `ray start` has left; it may be of any user, and counts among known ones only."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    with suppress(OSError, UnicodeDecodeError):
        return atomic_files.read_short_text(Path(folder, "ray", "ray_current_cluster"), _MAX_ADDRESS_BYTES).strip()
    return ""
