"""Connects to the storage behind a mirror's address: its fsspec file system, and the check of who listens at its server."""

from __future__ import annotations

from typing import Any

import fsspec
from fsspec.registry import known_implementations

from launcher.errors import SubmitError
from launcher.security.storage_addresses import address_problem, guard_clients, listener_problem


def connect(url: str, origin: str) -> tuple[Any, str]:
    """Return the file system of `url`, and the path in it. `origin` is where the user wrote the address, for errors.

    Raises:
        SubmitError: if the package for this kind of address is not installed, or the address is invalid or not trusted.
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
    return fs, str(path)


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
