"""Connections to storage behind an address."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import Any

# A protocol at the begin of an address, or of a part of a chain such as zip://a::sftp://b.
_PROTOCOL = re.compile(r"(?:^|::)([\w+]+)(?=://)")
_SSH, _S3 = {"sftp", "ssh"}, {"s3", "s3a"}
# The machine's host keys, in addition to ~/.ssh/known_hosts.
_SYSTEM_HOST_KEYS = "/etc/ssh/ssh_known_hosts"


def access_remedy(address: str) -> str:
    """Return what to check if a client cannot reach or open the storage at an address."""
    used = set(_PROTOCOL.findall(address))
    if used & _SSH:
        return "check the address and the login; connect to the host with ssh once, so that ~/.ssh/known_hosts has its key"
    remedy = "check the address, and the storage's credentials in the environment"
    if used & _S3:
        remedy += " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for another endpoint, AWS_ENDPOINT_URL)"
    return remedy


def require_known_hosts(address: str) -> None:
    """Make sftp connect only to hosts whose keys ssh knows; fsspec accepts every key, also that of an impostor."""
    if not _SSH & set(_PROTOCOL.findall(address)):
        return
    # fsspec itself reports which package is missing.
    with suppress(ImportError):
        import paramiko
        from fsspec.implementations.sftp import SFTPFileSystem

        def connect(system: Any) -> None:
            client = paramiko.SSHClient()
            client.load_system_host_keys()
            with suppress(OSError):
                client.load_system_host_keys(_SYSTEM_HOST_KEYS)
            client.set_missing_host_key_policy(paramiko.RejectPolicy())
            client.connect(system.host, **system.ssh_kwargs)
            system.client, system.ftp = client, client.open_sftp()

        SFTPFileSystem._connect = connect
