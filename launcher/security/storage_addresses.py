"""Which fsspec addresses are storage, and which servers their clients trust.

Some file systems act on the content behind an address. `reference://` reads a file of further addresses and formats them with
objects of this process, through which the file's author can reach the environment. `dask://` unpickles what a server sends. With
sftp, fsspec accepts any host key: an impostor would get the password and the mirror's uploads, and a resume would run the code
that they send.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from launcher.errors import Problem
from launcher.security import ownership
from launcher.security.hub_answers import guard_hub_client
from launcher.security.port_owners import IS_STORAGE, server_problem

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
# Protocols whose addresses name a server, and the variables that name one for a cloud's storage.
_WITH_SERVER = frozenset({"http", "https", "ftp", "sftp", "ssh", "smb", "webhdfs", "hdfs", "arrow_hdfs"})
_S3 = frozenset({"s3", "s3a"})
_GOOGLE, _AZURE = frozenset({"gs", "gcs"}), frozenset({"az", "abfs", "abfss", "adl"})
_VARIABLES = {
    **dict.fromkeys(_GOOGLE, ("STORAGE_EMULATOR_HOST",)),
    **dict.fromkeys(_AZURE, ("AZURE_STORAGE_CONNECTION_STRING",)),
}
# Variables that name a folder of fsspec's settings for all storage, and files of a cloud's client. AWS runs the
# credential_process in its files; Google sends any file of this user that its file names to a server that it names.
_SETTINGS = ("FSSPEC_CONFIG_DIR",)
_FILES = {
    **dict.fromkeys(_S3, ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE")),
    **dict.fromkeys(_GOOGLE, ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG")),
}
# fsspec's settings (FSSPEC_OSS_ENDPOINT=...) that name a server; those of one protocol hold for its other names.
_OPTIONS = ("endpoint_url", "endpoint", "account_host", "connection_string")
# The server in a connection string of Azure; a development storage is at this port of the machine.
_AZURE_SERVER = re.compile(r"(?:^|;)\s*(?:BlobEndpoint|DevelopmentStorageProxyUri)=([^;]+)", re.IGNORECASE)
_AZURE_DEVELOPMENT, _AZURE_DEVELOPMENT_SERVER = "usedevelopmentstorage=true", "http://127.0.0.1:10000"
# In place of fsspec's pattern of links in a folder's page, which takes hours for a few thousand spaces.
_LINK = re.compile(r"""<(a|A)(?=\s)[^<>]*?\s(href|HREF)=["'](?P<url>[^"']+)""")
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


def listener_problem(where: str, address: str) -> Problem | None:
    """Return the problem with an address whose server another user could choose, or None.

    They have written settings of its client, or listen at its port of this machine, such as the end of an ssh tunnel. They would
    get a mirror's weights and choose what is read: the rows, or the code that a resume runs. `where` is where the user wrote the
    address.
    """
    variables = [*_SETTINGS, *(variable for protocol in set(protocols(address)) for variable in _FILES.get(protocol, ()))]
    if problem := ownership.named_file_problem(variables):
        return problem
    for part in _parts(address):
        protocol = part.partition("://")[0]
        servers = [(where, part)] if protocol in _WITH_SERVER else []
        servers += [(f"{where}, the endpoint of S3", server) for server in _s3_servers(part)] if protocol in _S3 else []
        servers += [(name, server) for name, value in _named_values(protocol) for server in _servers_in(value)]
        for name, server in servers:
            if problem := server_problem(name, server, IS_STORAGE):
                return problem
    return None


def _s3_servers(address: str) -> Iterator[str]:
    """Yield the server that the client has chosen: by variables, profiles and settings of AWS, and by those of fsspec."""
    # The client itself reports what is wrong with its settings, or which package is missing.
    with suppress(Exception):
        import fsspec

        client = fsspec.core.url_to_fs(address)[0]
        client.connect()
        yield str(client._s3.meta.endpoint_url)


def _named_values(protocol: str) -> Iterator[tuple[str, str]]:
    """Yield the names and values of variables and of fsspec's settings that name the server of a protocol."""
    from fsspec.config import conf

    yield from ((name, os.environ.get(name, "")) for name in _VARIABLES.get(protocol, ()))
    names = next((names for names in (_GOOGLE, _AZURE) if protocol in names), (protocol,))
    for name in names:
        options = conf.get(name, {})
        yield from ((f"fsspec's setting {name}.{option}", str(options[option])) for option in _OPTIONS if options.get(option))


def _servers_in(value: str) -> list[str]:
    """Return the servers in a value: an address, or a connection string."""
    if "=" not in value.partition("?")[0]:
        return [value]
    return _AZURE_SERVER.findall(value) + [_AZURE_DEVELOPMENT_SERVER] * (_AZURE_DEVELOPMENT in value.lower())


def access_remedy(address: str) -> str:
    """Return what to check if a client cannot reach or open the storage at an address."""
    used = set(protocols(address))
    if used & {"sftp", "ssh"}:
        return "check the address and the login; connect to the host with ssh once, so that ~/.ssh/known_hosts has its key"
    remedy = "check the address, and the storage's credentials in the environment"
    if used & _S3:
        remedy += " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for another endpoint, AWS_ENDPOINT_URL)"
    return remedy


def protocols(address: str) -> Iterator[str]:
    """Yield the protocols in an address; a part without :// may be only a protocol, or a path."""
    return (part.partition("://")[0] for part in _parts(address))


def _parts(address: str) -> Iterator[str]:
    """Yield the parts of a chain such as zip://a::https://b, split as in fsspec."""
    for part in address.split("::"):
        yield part
        # A new chain can begin where a library removes one of its own prefixes.
        if "://" in (rest := part.partition("://")[2]):
            yield from _parts(rest)


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
    """Bound the size of web server answers that fsspec reads as a whole, and the time to find the links in them."""
    import aiohttp
    import fsspec.implementations.http
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

    fsspec.implementations.http.ex = _LINK
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
