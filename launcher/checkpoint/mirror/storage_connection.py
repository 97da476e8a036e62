"""Connects to the storage behind a mirror's address: its file system, the check of who listens at its server, and its errors."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.registry import known_implementations

from launcher.errors import SubmitError
from launcher.security.storage_addresses import access_remedy, address_problem, guard_clients, listener_problem


def connect(url: str, origin: str) -> tuple[Any, str]:
    """Return the file system of `url`, and the path in it. `origin` is where the user wrote the address, for errors.

    Raises:
        SubmitError: if the package for this kind of address is not installed, the address is invalid or not trusted, or a client
            that connects at once, such as sftp's, cannot.
    """
    if problem := address_problem(origin, url):
        raise SubmitError(problem)
    guard_clients(url)
    require_own_listener(url, origin)
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SubmitError(
            f"addresses that start with {url.partition('://')[0]}:// need a Python package that is not installed",
            where=origin,
            value=url,
            remedy=f"install it where the launcher is installed, with: pip install {_package(url, error)}",
        ) from None
    except ValueError as error:
        raise SubmitError(
            f"the address of the mirror is invalid: {error}",
            where=origin,
            value=url,
            remedy="start it with one of: s3, gs, az, hf, sftp, file",
        ) from None
    except Exception as error:
        raise unreachable_error(url, origin, "reached", error) from error
    return fs, str(path)


def reconnect(fs: Any) -> None:
    """Connect again if the connection of an sftp client has ended; the clients of other storage do so themselves."""
    get_transport = getattr(getattr(fs, "client", None), "get_transport", None)
    if get_transport is None:
        return
    transport = get_transport()
    if transport is None or not transport.is_active():
        fs._connect()


def unreachable_error(url: str, origin: str, operation: str, error: Exception) -> SubmitError:
    """Return the error for storage that failed with `error`; `operation` completes "the mirror cannot be"."""
    remedy = "check that the folder can be created and written" if url.startswith("file:") else access_remedy(url)
    return SubmitError(f"the mirror cannot be {operation}: {describe_error(error)}", where=origin, value=url, remedy=remedy)


def describe_error(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def require_own_listener(url: str, origin: str) -> None:
    """Reject a server on this machine if another user listens at its port, who would get the weights.

    Raises:
        SubmitError: with the user.
    """
    if problem := listener_problem(origin, url):
        raise SubmitError(problem)


def _package(url: str, error: ImportError) -> str:
    """Return the distribution that implements a protocol: it is named like the module of fsspec's class."""
    protocol = url.partition("://")[0]
    module = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
    if module not in ("", "fsspec"):
        return module.replace("_", "-")
    missing = getattr(error.__cause__ or error, "name", None)
    return missing or f"'fsspec[{protocol}]'"
