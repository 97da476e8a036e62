"""Which fsspec addresses are storage, and which servers their clients trust.

Some file systems act on the content behind an address. `reference://` reads a file of further addresses and formats them with
objects of this process, through which the file's author can reach the environment. `dask://` unpickles what a server sends. With
sftp, fsspec accepts any host key: an impostor would get the password and the mirror's uploads, and a resume would run the code
that they send.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from launcher.errors import Problem
from launcher.security.hub_answers import guard_hub_client

# Applies to file systems in fsspec itself; those from other packages exist only because a user installed them.
_STORAGE = frozenset(
    {
        *("file", "local", "memory", "data", "http", "https", "ftp", "sftp", "ssh", "smb", "webhdfs", "hdfs", "arrow_hdfs"),
        *("dbfs", "github", "gist", "git", "dir", "zip", "tar", "libarchive", "simplecache", "filecache", "blockcache", "cached"),
    }
)
_REMEDY = "write the address of the storage itself, such as s3://, gs:// or https://, or download the files"
# Limit for web server answers that fsspec reads as a whole; files are written as they arrive.
MAX_ANSWER_BYTES = 64 << 20
# The machine's host keys, in addition to ~/.ssh/known_hosts.
_SYSTEM_HOST_KEYS = "/etc/ssh/ssh_known_hosts"


def address_problem(where: str, address: str) -> Problem | None:
    """Return the problem with an address that is not storage, in any part of a chain such as zip://a::https://b, or None.

    `where` is where the user wrote it. Protocols that fsspec does not know pass, because fsspec rejects them.
    """
    from fsspec.registry import known_implementations

    for protocol in protocols(address):
        class_name = str(known_implementations.get(protocol, {}).get("class", ""))
        if class_name.startswith("fsspec.") and protocol not in _STORAGE:
            message = f"{protocol}:// is not storage: what it reads decides what this process reads or runs next"
            return Problem(message, where, address, _REMEDY)
    return None


def protocols(address: str) -> Iterator[str]:
    """Yield the protocols in an address, split as in fsspec; a part without :// may be only a protocol, or a path."""
    for part in address.split("::"):
        protocol, _, rest = part.partition("://")
        yield protocol
        # A new chain can begin where a library removes one of its own prefixes.
        if "://" in rest:
            yield from protocols(rest)


def guard_clients(address: str) -> None:
    """Make the clients behind an address reject what servers must not choose. Call it before the address is opened."""
    used = set(protocols(address))
    if "hf" in used:
        guard_hub_client()
    if used & {"sftp", "ssh"}:
        _require_known_hosts()
    if used & {"http", "https"}:
        _bound_answers()


@functools.cache
def _bound_answers() -> None:
    """Bound the size of web server answers that fsspec reads as a whole, such as a page that lists a folder."""
    import aiohttp
    from fsspec.config import conf

    class BoundedResponse(aiohttp.ClientResponse):
        async def read(self) -> bytes:
            if self._body is None:
                body = bytearray()
                async for piece in self.content.iter_any():
                    body += piece
                    if len(body) > MAX_ANSWER_BYTES:
                        raise ValueError(f"the answer has more than {MAX_ANSWER_BYTES >> 20} MiB")
                self._body = bytes(body)
            return self._body

    options = conf.setdefault("http", {})
    options["client_kwargs"] = {"response_class": BoundedResponse, **options.get("client_kwargs", {})}


@functools.cache
def _require_known_hosts() -> None:
    """Make sftp connect only to hosts whose keys ssh knows."""
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
