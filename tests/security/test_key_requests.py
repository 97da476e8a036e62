"""Servers that receive the user's key cannot redirect it elsewhere, and cannot block a command with their answer."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from http_server import serving

from launcher.config.schema import TrackingSection
from launcher.security.credentials import request_json
from launcher.tracking.wandb import account

KEY = "0123456789abcdef" * 2 + "01234567"


class Elsewhere(BaseHTTPRequestHandler):
    """Another server, which records the requests that it receives."""

    received: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        self.received.append((self.path, self.headers.get("Authorization")))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"data": {"viewer": null}, "name": "mallory"}')

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


class Named(Elsewhere):
    """The server that the user configured."""

    target: str

    def do_GET(self) -> None:
        self.send_response(302)
        self.send_header("Location", f"{self.target}/stolen")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET


@pytest.fixture
def servers() -> Iterator[tuple[str, type[Elsewhere]]]:
    """The configured server's address, and the other server."""
    other = type("Other", (Elsewhere,), {"received": []})
    with serving(other) as elsewhere, serving(type("Own", (Named,), {"target": elsewhere})) as address:
        yield address, other


def request(address: str) -> urllib.request.Request:
    return urllib.request.Request(address, headers={"Authorization": f"Bearer {KEY}"})


def test_a_key_does_not_follow_a_redirect(servers: tuple[str, type[Elsewhere]], monkeypatch: pytest.MonkeyPatch) -> None:
    address, other = servers
    with pytest.raises(urllib.error.HTTPError) as refused:
        request_json(request(f"{address}/api/whoami-v2"), 60)
    assert refused.value.code == 302
    found = account._answer(address, KEY, account.Account("environment"), TrackingSection().project)
    assert "answers with HTTP 302" in found.unknown
    assert other.received == []
