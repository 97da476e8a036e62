"""The address of a Ray cluster: which one cluster.address=auto refers to on this machine, and whether a run may use it.

Ray itself joins whatever its files in /tmp/ray name, or any process called raylet, whoever started it. Whoever runs that Ray gets
the run's code and the token, and controls what the driver unpickles. The launcher therefore joins only a trusted user's Ray.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import psutil

from launcher.clusters.ray import jobs
from launcher.errors import SubmitError
from launcher.security.folders import TRUST_FLAG, Trust, user_name

if TYPE_CHECKING:
    from launcher.config.sections.ray import RaySection

_WHERE, _AUTO = "cluster.address", "auto"
_CONNECT_S = 5.0


def require_usable(section: RaySection) -> None:
    """Reject a cluster that is public, does not answer, or does not accept the token."""
    address = address_to_join(section.address or "")
    host = urlsplit(address if section.is_http else f"ray://{address}").hostname or ""
    try:
        addresses = {str(entry[4][0]) for entry in socket.getaddrinfo(host, None)}
    except OSError as error:
        raise SubmitError(
            f"the host name of the cluster cannot be resolved: {error.strerror}",
            where=_WHERE,
            value=address,
            remedy="write host:port or http://host:port; with cluster.address=auto, check the variable RAY_ADDRESS",
        ) from None
    known = {ipaddress.ip_address(address.partition("%")[0]) for address in addresses}
    if exposed := sorted(str(one) for one in known if one.is_global or one.is_unspecified):
        raise SubmitError(
            "the address of the cluster is public: the whole internet can reach it",
            where=_WHERE,
            value=f"{address} resolves to {', '.join(exposed)}",
            remedy="use a private address or an ssh tunnel",
        )
    if section.is_http:
        with jobs.connect(address):
            return
    try:
        socket.create_connection((host, int(address.rpartition(":")[2])), timeout=_CONNECT_S).close()
    except (OSError, ValueError) as error:
        raise SubmitError(
            f"no Ray answers at this address: {error}",
            where=_WHERE,
            value=address,
            remedy="start one there with: ray start --head, or unset cluster.address to have one started for this run",
        ) from None


def address_to_join(address: str) -> str:
    """Return the address for ray.init for a value of cluster.address, so that Ray never searches for a cluster itself."""
    if address == _AUTO:
        address = os.environ.get("RAY_ADDRESS") or _AUTO
    return find_address() if address == _AUTO else address


def find_address() -> str:
    """Return host:port of the cluster that this machine belongs to, according to the processes of trusted users."""
    trust, owners = Trust.from_environ(os.environ), dict[str, set[int]]()
    for process in psutil.process_iter(["cmdline", "uids"]):
        arguments, uids = process.info["cmdline"] or [], process.info["uids"]
        flags = dict(argument.split("=", 1) for argument in arguments[1:] if argument.startswith("--") and "=" in argument)
        if uids is None or not flags.keys() >= {"--gcs-address", "--session_dir"} or "raylet" not in Path(arguments[0]).name:
            continue
        # A setuid program's effective user did not choose its arguments.
        of_raylet = set(uids)
        # Ray makes the parent folder of its sockets world-writable, so another user may have replaced them. If the folder is not
        # here, the raylet is in a container whose processes are visible, with a folder of its own.
        with suppress(OSError):
            of_raylet.add(Path(flags["--session_dir"]).lstat().st_uid)
        owners[flags["--gcs-address"]] = owners.get(flags["--gcs-address"], set()) | of_raylet
    if not owners:
        raise SubmitError(
            "no Ray runs on this machine",
            where=_WHERE,
            value=_AUTO,
            remedy="start one with: ray start --head, or unset cluster.address to have one started for this run",
        )
    trusted = [address for address, uids in owners.items() if all(map(trust.accepts_owner, uids))]
    if not trusted:
        address, uids = owners.popitem()
        user = user_name(next(uid for uid in uids if not trust.accepts_owner(uid)))
        raise SubmitError(
            f"the Ray on this machine belongs to {user}, who could run code as you in the driver and read what the run sends",
            where=_WHERE,
            value=f"{_AUTO}: {address}",
            remedy=f"unset cluster.address to have a Ray started for this run; if you trust {user} with your account, add "
            f"{TRUST_FLAG} {user}",
        )
    if len(trusted) > 1:
        remedy = f"choose one: cluster.address={trusted[0]}"
        raise SubmitError("several Rays run on this machine", where=_WHERE, value=", ".join(sorted(trusted)), remedy=remedy)
    return trusted[0]
