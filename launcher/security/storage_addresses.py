"""Which addresses of fsspec are storage: some of its file systems do what the content behind an address says.

`reference://` reads a file of further addresses, and formats them with objects of this process: through these, the author of that
file reaches the environment. `dask://` unpickles what a server sends.
"""

from __future__ import annotations

from collections.abc import Iterator

from launcher.errors import Problem

# Of the file systems in fsspec itself; those of other packages are there because somebody has installed them.
_STORAGE = frozenset(
    {
        *("file", "local", "memory", "data", "http", "https", "ftp", "sftp", "ssh", "smb", "webhdfs", "hdfs", "arrow_hdfs"),
        *("dbfs", "github", "gist", "git", "dir", "zip", "tar", "libarchive", "simplecache", "filecache", "blockcache", "cached"),
    }
)
_REMEDY = "write the address of the storage itself, such as s3://, gs:// or https://, or download the files"


def address_problem(where: str, address: str) -> Problem | None:
    """Return the problem of an address that is not storage, in any part of a chain such as zip://a::https://b; None if all are.

    `where` is where the user wrote it. A protocol that fsspec does not know passes: fsspec refuses it.
    """
    from fsspec.registry import known_implementations

    for protocol in protocols(address):
        class_name = str(known_implementations.get(protocol, {}).get("class", ""))
        if class_name.startswith("fsspec.") and protocol not in _STORAGE:
            message = f"{protocol}:// is no storage: what it reads decides what this process reads or runs next"
            return Problem(message, where, address, _REMEDY)
    return None


def protocols(address: str) -> Iterator[str]:
    """Yield the protocols in an address, as fsspec splits it; a part without :// may be a protocol alone, or a path."""
    for part in address.split("::"):
        protocol, _, rest = part.partition("://")
        yield protocol
        # A chain can begin anew where a library removes one of its own prefixes.
        if "://" in rest:
            yield from protocols(rest)
