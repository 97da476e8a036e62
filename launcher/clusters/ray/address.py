"""The address of a Ray cluster: which one cluster.address=auto refers to on this machine, and whether a run may use it.

Ray itself joins whatever its files in /tmp/ray name, or any process called raylet, whoever started it. Whoever runs that Ray gets
the run's code and the token, and controls what the driver unpickles. The launcher therefore joins only a trusted user's Ray.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from launcher.clusters.ray import jobs
from launcher.errors import SubmitError
from launcher.runs import atomic_files
from launcher.security.folders import TRUST_FLAG, Trust, user_name

if TYPE_CHECKING:
    from launcher.config.sections.ray import RaySection

_WHERE, _AUTO = "cluster.address", "auto"
_CONNECT_S = 5.0
_MAX_ADDRESS_BYTES = 4096


def require_usable(section: RaySection) -> None:
    """Reject a cluster that is public, does not answer, or does not accept the token.

    Raises:
        SubmitError: with the remedy.
    """
    address = section.address or ""
    if section.host is not None:
        _require_private(address, section.host)
    if section.is_http:
        jobs.require_answer(address)
    elif address != _AUTO:
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except OSError as error:
            raise SubmitError(
                f"no Ray answers at this address: {error.strerror or error}",
                where=_WHERE,
                value=address,
                remedy="start one there with: ray start --head, or unset cluster.address to have one started for this run",
            ) from None
    elif (given := os.environ.get("RAY_ADDRESS", _AUTO)) == _AUTO:
        find_address()
    else:
        host_name = urlsplit(f"ray://{given}").hostname
        if "/" in given or ":" not in given or host_name is None:
            raise SubmitError(
                "RAY_ADDRESS is not the address of a cluster that a driver can join",
                where="RAY_ADDRESS in the environment",
                value=given,
                remedy="write it as host:port, unset it, or use the Jobs API: cluster.address=http://host:8265",
            )
        _require_private(f"auto, RAY_ADDRESS={given}", host_name)


def _require_private(address: str, host: str) -> None:
    """Reject a host name that resolves to a public address; the settings reject public IP addresses."""
    from launcher.config.sections.ray import is_exposed

    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise SubmitError(
            f"the host name of the cluster cannot be resolved: {error.strerror}",
            where=_WHERE,
            value=address,
            remedy="check the name, or use an IP address",
        ) from None
    if exposed := sorted(filter(is_exposed, addresses)):
        raise SubmitError(
            "the address of the cluster is public: the whole internet can reach it",
            where=_WHERE,
            value=f"{address} resolves to {', '.join(exposed)}",
            remedy="use a private address or an ssh tunnel",
        )


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
    raylets = list(_iter_raylets())
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
            f"{TRUST_FLAG} {user}",
        )
    addresses = sorted({raylet.address for raylet in trusted})
    if len(addresses) > 1:
        newest = ""
        # The last `ray start` left it; any user may have written it, so it only selects among known ones.
        folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
        with suppress(OSError, UnicodeDecodeError):
            newest = atomic_files.read_short_text(Path(folder, "ray", "ray_current_cluster"), _MAX_ADDRESS_BYTES).strip()
        if newest not in addresses:
            remedy = f"choose one: cluster.address={addresses[0]}"
            raise SubmitError("several Rays run on this machine", where=_WHERE, value=", ".join(addresses), remedy=remedy)
        addresses = [newest]
    session = next(raylet.session for raylet in trusted if raylet.address == addresses[0])
    uid: int | None = None
    # If this fails, it belongs to a container whose processes are visible here; that Ray uses its own folder.
    with suppress(OSError):
        uid = session.lstat().st_uid
    # Ray makes the parent folder of its sockets world-writable.
    if uid is not None and not trust.accepts_owner(uid):
        raise SubmitError(
            f"the folder of the Ray on this machine belongs to {user_name(uid)}, who may have put it in place of Ray's own",
            where=str(session),
            value=_AUTO,
            remedy="stop this Ray, start it again with --temp-dir in a folder that only you can enter; or unset cluster.address",
        )
    return addresses[0]


def _iter_raylets() -> Iterator[_Raylet]:
    for process in psutil.process_iter(["cmdline", "uids"]):
        arguments, uids = process.info["cmdline"] or [], process.info["uids"]
        if not arguments or uids is None or "raylet" not in Path(arguments[0]).name:
            continue
        flags = dict(argument.split("=", 1) for argument in arguments[1:] if argument.startswith("--") and "=" in argument)
        address, session = flags.get("--gcs-address"), flags.get("--session_dir")
        if address and session:
            # A setuid program's effective user did not choose its arguments.
            yield _Raylet(frozenset(uids), address, Path(session))
