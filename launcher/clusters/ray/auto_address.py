"""Finds the Ray on this machine that cluster.address=auto refers to.

Ray itself joins whatever its files in /tmp/ray name, or any process called raylet, whoever started it. Whoever runs that Ray gets
the run's code and the token, and controls what the driver unpickles. The launcher therefore joins only a trusted user's Ray.
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
from launcher.security.owners import FLAG, Trust, user_name

_WHERE, _AUTO = "cluster.address", "auto"
_MAX_ADDRESS_BYTES = 4096


@dataclass(frozen=True)
class _Raylet:
    """A raylet on this machine: the users it runs as, its cluster's address and the folder of its sockets."""

    uids: frozenset[int]
    address: str
    session: Path


def address_to_join(address: str) -> str:
    """Return the address for ray.init for a value of cluster.address, so that Ray never searches for a cluster itself.

    Raises:
        SubmitError: as find_address does.
    """
    if address == _AUTO:
        address = os.environ.get("RAY_ADDRESS") or _AUTO
    if address == _AUTO:
        return find_address()
    return address


def find_address() -> str:
    """Return host:port of the cluster that this machine belongs to, according to the processes of trusted users.

    Raises:
        SubmitError: if there is none, or only other users', or several, none of which is the newest according to Ray's own file.
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
    trusted = [raylet for raylet in raylets if all(map(trust.accepts_owner, raylet.uids))]
    if not trusted:
        user = user_name(max(raylets[0].uids))
        raise SubmitError(
            f"the Ray on this machine belongs to {user}, who could run code as you in the driver and read what the run sends",
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
    """Reject a socket folder that another user owns. Ray makes its parent folder world-writable."""
    try:
        uid = session.lstat().st_uid
    except OSError:
        # It belongs to a container whose processes are visible here; that Ray uses its own folder.
        return
    if not trust.accepts_owner(uid):
        raise SubmitError(
            f"the folder of the Ray on this machine belongs to {user_name(uid)}, who may have put it in place of Ray's own",
            where=str(session),
            value=_AUTO,
            remedy="stop this Ray, start it again with --temp-dir in a folder that only you can enter; or unset cluster.address",
        )


def _raylets() -> Iterator[_Raylet]:
    for process in psutil.process_iter(["cmdline", "uids"]):
        arguments, uids = process.info["cmdline"] or [], process.info["uids"]
        if not arguments or uids is None or "raylet" not in Path(arguments[0]).name:
            continue
        flags = dict(argument.split("=", 1) for argument in arguments[1:] if argument.startswith("--") and "=" in argument)
        address, session = flags.get("--gcs-address"), flags.get("--session_dir")
        if address and session:
            # A setuid program's effective user did not choose its arguments.
            yield _Raylet(frozenset(uids), address, Path(session))


def _newest_address() -> str:
    """Return the address that the last `ray start` left; any user may have written it, so it only selects among known ones."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
    with suppress(OSError, UnicodeDecodeError):
        return atomic_files.read_short_text(Path(folder, "ray", "ray_current_cluster"), _MAX_ADDRESS_BYTES).strip()
    return ""
