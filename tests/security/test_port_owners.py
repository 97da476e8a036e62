"""Local addresses where another user's process listens, perhaps in place of an ssh tunnel."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from fsspec.config import set_conf_env
from plan_fixtures import config_of

from launcher.cli.accounts import account_results
from launcher.config.schema import RunConfig
from launcher.config.sections.data import Source
from launcher.data.sources import locate
from launcher.errors import DataError, PushError
from launcher.export import hub
from launcher.security import port_owners, storage_addresses
from launcher.security.hub_answers import guard_hub_client
from launcher.security.storage_addresses import listener_problem

__all__ = ["config_of"]

MALLORY, PORT = 54321, 8265
# Other forms of loopback: the system treats a connection to the unspecified address as one to loopback.
OTHER_FORMS = ("http://0.0.0.0:8265", "http://[::]:8265", "http://[::ffff:127.0.0.1]:8265", "http://127.1:8265")
# Storage servers: the variables that name each one, and the address to read.
STORAGE = (
    ({}, f"http://localhost:{PORT}/rows.jsonl"),
    ({}, f"simplecache::ftp://127.0.0.1:{PORT}/rows.jsonl"),
    ({}, f"zip://rows.jsonl::https://0.0.0.0:{PORT}/rows.zip"),
    ({}, f"webhdfs://localhost:{PORT}/rows.jsonl"),
    ({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORT}"}, "s3://bucket/runs"),
    ({"AWS_ENDPOINT_URL_S3": f"http://localhost:{PORT}"}, "simplecache::s3://bucket/runs"),
    ({"STORAGE_EMULATOR_HOST": f"localhost:{PORT}"}, "gs://bucket/runs"),
    (
        {"AZURE_STORAGE_CONNECTION_STRING": f"AccountName=a;BlobEndpoint=http://localhost:{PORT}/a;AccountKey=b=="},
        "az://box/runs",
    ),
    ({"FSSPEC_ABFS_ACCOUNT_HOST": f"localhost:{PORT}"}, "az://box/runs"),
    ({"FSSPEC_OSS_ENDPOINT": f"http://localhost:{PORT}"}, "oss://bucket/runs"),
)
Listen = Callable[..., None]


@pytest.fixture
def listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    """Write fake versions of the system's IPv4 and IPv6 socket tables."""
    tables = (tmp_path / "tcp", tmp_path / "tcp6")
    monkeypatch.setattr(port_owners, "_TABLES", tables)
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "")
    guard_hub_client.cache_clear()

    def write(*listeners: tuple[str, int], state: str = "0A") -> None:
        for table, length in zip(tables, (4, 16), strict=True):
            rows = ["  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"]
            for text, uid in listeners:
                packed = ip_address(text).packed
                words = [int.from_bytes(packed[at : at + 4], sys.byteorder) for at in range(0, len(packed), 4)]
                local = "".join(f"{word:08X}" for word in words)
                row = f"0: {local}:{PORT:04X} 0:0000 {state} 00000000:00000000 00:00000000 00000000 {uid} 0 1"
                rows += [row] if len(packed) == length else []
            table.write_text("\n".join(rows) + "\n")

    yield write
    guard_hub_client.cache_clear()


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "127.0.0.1:8265", "http://localhost:8265/a", "[::1]:8265", *OTHER_FORMS]
)
@pytest.mark.parametrize("at", ["own", "all", "both"])
def test_a_server_of_another_user_on_this_machine_is_refused(listen: Listen, address: str, at: str) -> None:
    addresses = {"own": ["127.0.0.1", "::1"], "all": ["0.0.0.0", "::"], "both": ["::"]}[at]
    listen(*((one, MALLORY) for one in addresses))
    problem = port_owners.server_problem("cluster.address", address)
    assert problem is not None
    assert problem.message == f"a process of {MALLORY} listens at this address, and would get your token or key"
    assert (problem.where, problem.value) == ("cluster.address", address)
    assert f"--trust-owner {MALLORY}" in problem.remedy


def test_the_system_connects_to_what_listens_at_the_address_itself(listen: Listen) -> None:
    listen(("127.0.0.1", os.geteuid()), ("::", MALLORY))
    assert port_owners.server_problem("", "127.0.0.1:8265") is None
    listen(("127.0.0.1", MALLORY), ("::", os.geteuid()))
    assert port_owners.server_problem("", "127.0.0.1:8265") is not None


def test_a_listener_at_the_mapped_form_of_all_addresses_is_found() -> None:
    """An IPv6 socket can be bound to all IPv4 addresses only, which does not include `::`."""
    with socket.socket(socket.AF_INET6) as listener:
        listener.bind(("::ffff:0.0.0.0", 0))
        listener.listen()
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        assert port_owners._users_reached("127.0.0.1", port) == {os.geteuid()}


@pytest.mark.parametrize("address", ["http://[::1/a", "http://[bad]:8265", "http://.example:8265", f"http://{'a' * 70}:8265"])
def test_an_address_that_names_no_server_is_left_to_its_client(
    listen: Listen, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listen(("0.0.0.0", MALLORY))
    assert port_owners.server_problem("", address) is None
    monkeypatch.setenv("http_proxy", address)
    assert port_owners.server_problem("", "http://10.0.0.1:8000") is None


def test_in_a_rootless_container_the_message_names_no_single_user(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the host's root, too, seems to belong to nobody there."""
    listen(("127.0.0.1", MALLORY))
    monkeypatch.setattr(port_owners, "uid_of_unmapped_users", lambda: MALLORY)
    problem = port_owners.server_problem("HF_ENDPOINT", f"http://127.0.0.1:{PORT}")
    assert problem is not None
    assert problem.message.startswith("a process of a user outside this container listens at this address")
    assert problem.remedy.endswith(f"all users outside this container with your account, add --trust-owner {MALLORY}")


def test_a_password_in_an_address_is_not_shown(listen: Listen) -> None:
    listen(("127.0.0.1", MALLORY))
    problem = port_owners.server_problem("HF_ENDPOINT", f"http://user:canary-password@127.0.0.1:{PORT}")
    assert problem is not None
    assert problem.value == f"http://<redacted>@127.0.0.1:{PORT}"


def test_other_servers_are_accepted(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    listen(("127.0.0.1", MALLORY), state="01")
    assert port_owners.server_problem("", "127.0.0.1:8265") is None, "it listens no more"
    listen(("0.0.0.0", MALLORY))
    for address in ("127.0.0.1:8266", "192.0.2.1:8265", "http://127.0.0.1:99999", "auto", ""):
        assert port_owners.server_problem("", address) is None, address
    listen(("0.0.0.0", 0))
    assert port_owners.server_problem("", "127.0.0.1:8265") is None
    listen(("0.0.0.0", MALLORY))
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", str(MALLORY))
    assert port_owners.server_problem("", "127.0.0.1:8265") is None


def test_the_hub_gets_no_key_there(
    listen: Listen, config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listen(("127.0.0.1", MALLORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{PORT}")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "canaryCANARY0123")
    with pytest.raises(DataError, match="would get your token or key"):
        guard_hub_client()
    with pytest.raises(PushError, match="would get your token or key"):
        hub.push(tmp_path, "owner/name", again="")
    results = {result.name: result for result in account_results.check_accounts(config_of())}
    assert "would get your token or key" in results["Hub"].seen


def test_what_a_proxy_of_another_user_could_read_is_refused(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    listen(("127.0.0.1", MALLORY))
    monkeypatch.setenv("http_proxy", f"http://user:canary-password@127.0.0.1:{PORT}")
    monkeypatch.setenv("no_proxy", "10.0.0.2")
    problem = port_owners.server_problem("cluster.address", "http://10.0.0.1:8000")
    assert problem is not None
    assert problem.message.startswith(f"a process of {MALLORY} listens at the address of the proxy for cluster.address")
    assert (problem.where, problem.value) == ("http_proxy", f"127.0.0.1:{PORT}")
    assert "canary" not in str(problem)
    # For https, the proxy sees only encrypted data; the other addresses do not use the proxy.
    for address in ("https://10.0.0.1:8000", "http://10.0.0.2:8000", "10.0.0.1:8000"):
        assert port_owners.server_problem("", address) is None, address


@pytest.fixture
def without_cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Remove cloud settings, and cached clients created with other settings."""
    import s3fs

    for variable in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "aws"))
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
    # It has set options that the test restores.
    storage_addresses._bound_answers.cache_clear()


@pytest.mark.usefixtures("without_cloud")
@pytest.mark.parametrize(("environ", "address"), STORAGE)
def test_storage_of_another_user_on_this_machine_is_refused(
    listen: Listen, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], address: str
) -> None:
    """The other user would receive the weights, and could choose the code that a resume runs."""
    for variable, value in environ.items():
        monkeypatch.setenv(variable, value)
    settings: dict[str, dict[str, str]] = {}
    set_conf_env(settings)
    monkeypatch.setattr("fsspec.config.conf", settings)
    listen(("127.0.0.1", os.geteuid()))
    assert listener_problem("checkpoint.mirror", address) is None
    listen(("127.0.0.1", MALLORY))
    with pytest.raises(DataError, match="would get what is written there, and choose what is read") as error:
        locate.fetch_files(Source(path=address))
    assert "AccountKey" not in str(error.value)


def test_the_tables_of_the_system_are_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listening = port_owners.users_listening(server.getsockname()[1])
    assert listening == {ip_address("127.0.0.1"): {os.geteuid()}}
