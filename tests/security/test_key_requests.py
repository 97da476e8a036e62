"""Servers that receive the user's key cannot redirect it elsewhere, and cannot block a command with their answer."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from http_server import Answer, Request, serving

from launcher.config.sections.run import TrackingSection
from launcher.security.redaction import request_json
from launcher.tracking.wandb import account

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def servers() -> Iterator[tuple[str, list[str]]]:
    """The address of the server that the user configured, and the requests to another server, to which it redirects."""
    received: list[str] = []

    def record(request: Request) -> Answer:
        received.append(request.path)
        return 200, {"data": {"viewer": None}, "name": "mallory"}

    with serving(record) as elsewhere, serving(lambda _: (302, b"", {"Location": f"{elsewhere}/stolen"})) as address:
        yield address, received


def request(address: str) -> urllib.request.Request:
    return urllib.request.Request(address, headers={"Authorization": f"Bearer {KEY}"})


def test_a_key_does_not_follow_a_redirect(servers: tuple[str, list[str]]) -> None:
    address, received = servers
    with pytest.raises(urllib.error.HTTPError) as refused:
        request_json(request(f"{address}/api/whoami-v2"), 60)
    assert refused.value.code == 302
    found = account._check_access(address, KEY, account.Account("environment"), TrackingSection().project)
    assert "answers with HTTP 302" in found.unknown
    assert received == []
