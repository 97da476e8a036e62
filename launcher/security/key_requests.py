"""Requests that carry a key of this user: the key goes only to the server that the user named."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

_MAX_BYTES = 16 << 20
_PIECE_BYTES = 1 << 16


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """By default, urllib sends a request's headers, including the key, to whatever server a redirect names."""

    def redirect_request(self, *_: Any) -> None:
        return None


def read_json(request: urllib.request.Request, timeout_s: float) -> Any:
    """Return an answer's JSON, which may take at most `timeout_s` and 16 MiB.

    Raises:
        OSError: if there is no answer in time; HTTPError for a status other than 200, including redirects.
        ValueError: if it is not JSON, or longer.
    """
    until, content = time.monotonic() + timeout_s, bytearray()
    with urllib.request.build_opener(_NoRedirects).open(request, timeout=timeout_s) as answer:
        while piece := answer.read1(_PIECE_BYTES):
            content += piece
            if len(content) > _MAX_BYTES:
                raise ValueError(f"the answer has more than {_MAX_BYTES >> 20} MiB")
            if time.monotonic() > until:
                raise TimeoutError(f"the answer takes more than {timeout_s:g} s")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("the answer is nested too deeply") from None
