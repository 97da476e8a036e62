"""A Hub's answers determine file names in this user's cache: the server at HF_ENDPOINT must not choose files elsewhere.

huggingface_hub appends the ETag and commit that a server sends to its cache path unchanged. An ETag such as
`../../../.config/x` would write a file with the server's content there.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import DataError, Problem
from launcher.security import ownership
from launcher.security.library_caches import XET, find_usable_folders
from launcher.security.port_owners import server_problem

# Headers and JSON keys whose values become names of files and folders.
_HEADERS = ("ETag", "X-Linked-ETag", "X-Repo-Commit")
# Xet's client takes the address of its storage from this header, and makes folders at local://PATH.
_STORAGE = "X-Xet-Cas-Url"
_KEYS = frozenset({"sha", "oid", "sha256", "blobId", "commitOid"})
# The client reads all answers as a whole but files, which it writes as they arrive; the longest file lists have tens of MB.
_MAX_JSON_BYTES, _MAX_JSON_S = 256 << 20, 300.0
# The client waits for as long as one of these headers says.
_WAITS, _MAX_WAIT_S = ("Retry-After", "RateLimit"), 600
_ENDPOINT = "HF_ENDPOINT"
# Nobody can create a file there.
_NO_FILE = f"{os.devnull}/none"
_REMEDY = "set HF_ENDPOINT to a server that you trust, or unset it for huggingface.co"


@functools.cache
def guard_hub_client() -> None:
    """Make huggingface_hub reject answers with such names in this process. Call it before the client is used.

    Raises:
        DataError: if another user listens at the address of HF_ENDPOINT, on this machine, and would get the token.
    """
    if problem := server_problem(_ENDPOINT, os.environ.get(_ENDPOINT, "")):
        raise DataError(problem)
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _http

    make_client = _http._GLOBAL_CLIENT_FACTORY

    def make_guarded_client() -> Any:
        client: Any = make_client()
        hooks = client.event_hooks
        client.event_hooks = {**hooks, "response": [_check, *hooks["response"]]}
        client.send = _checked(client.send)
        return client

    set_client_factory(make_guarded_client)
    # Commands have the user's environment; that of a worker process already names a usable folder.
    os.environ.update(find_usable_folders(XET, os.environ))
    # The client renews the token of a login and writes all logins, with their names. Others could choose the names, and put links
    # in place of these files. Without the second one, a token is used, but not renewed.
    files = map(Path, (constants.HF_TOKEN_PATH, constants.HF_STORED_TOKENS_PATH))
    if any(ownership.file_problem("the login at the Hub", file, may_be_hidden=True) for file in files):
        constants.HF_STORED_TOKENS_PATH = _NO_FILE
    # For its telemetry, the client writes a list to a file of a known name in HF_HOME, where others may have put a link.
    constants.HF_HUB_DISABLE_TELEMETRY = True


def leads_outside(name: str) -> bool:
    """Return whether a name from a server would lead out of the folder to which it is appended.

    The client appends a commit unchanged, and an ETag without quotes and without its weak-validator prefix.
    """
    return name.startswith("/") or name.lstrip("W/").strip('"').startswith("/") or ".." in re.split(r'[/\\"]', name)


def _check(response: Any) -> None:
    """Reject an answer by its headers; called for each answer, also for those that redirect, before its content is read."""
    for header in _HEADERS:
        if leads_outside(value := response.headers.get(header, "")):
            raise _refusal(response, f"its header {header} names a file outside the cache", value)
    if (address := response.headers.get(_STORAGE)) and not address.startswith(("https://", "http://")):
        raise _refusal(response, f"its header {_STORAGE} names storage that is not a server", address)
    for header in _WAITS:
        if any(int(number[:9]) > _MAX_WAIT_S for number in re.findall(r"\d+", response.headers.get(header, ""))):
            del response.headers[header]
    if response.has_redirect_location:
        _read(response)


def _checked(send: Callable[..., Any]) -> Callable[..., Any]:
    """Return a client's method `send` so that it rejects an answer by its content, unless the client reads it piece by piece.

    The address does not matter: with redirects, and with links to further pages of a list, the server chooses it.
    """

    @functools.wraps(send)
    def send_checked(request: Any, *, stream: bool = False, **options: Any) -> Any:
        response = send(request, stream=True, **options)
        if not stream:
            try:
                _check_content(response)
            except BaseException:
                response.close()
                raise
        return response

    return send_checked


def _check_content(response: Any) -> None:
    try:
        content = json.loads(_read(response))
    except RecursionError:
        # The client, which parses it later and less deep in its own calls, may accept it.
        raise _refusal(response, "it is nested too deeply", "") from None
    except ValueError:
        # Not JSON, for example an error page; the client reports this.
        return
    for key, value in _items(content):
        if key in _KEYS and leads_outside(value):
            raise _refusal(response, f"its {key} names a file outside the cache", value)


def _read(response: Any) -> bytes:
    """Read an answer as its method `read` does, within bounds."""
    response._content = b"".join(_bounded(response))
    return bytes(response._content)


def _bounded(response: Any) -> Iterator[bytes]:
    num_bytes, until = 0, time.monotonic() + _MAX_JSON_S
    for piece in response.iter_bytes():
        num_bytes += len(piece)
        if num_bytes > _MAX_JSON_BYTES or time.monotonic() > until:
            limit = f"{_MAX_JSON_BYTES >> 20} MiB" if num_bytes > _MAX_JSON_BYTES else f"{_MAX_JSON_S:g} s"
            raise _refusal(response, f"its answer takes more than {limit}", "")
        yield piece


def _items(content: Any) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values are strings, at any depth."""
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from ((key, inner) for key, inner in value.items() if isinstance(inner, str))
        if isinstance(value, dict | list):
            waiting += [inner for inner in (value.values() if isinstance(value, dict) else value) if not isinstance(inner, str)]


def _refusal(response: Any, reason: str, value: str) -> DataError:
    url = response.request.url
    return DataError(Problem(f"the answer of the Hub is rejected: {reason}", f"{url.scheme}://{url.host}", value[:200], _REMEDY))
