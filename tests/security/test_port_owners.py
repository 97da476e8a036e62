"""Addresses of this machine at which another user's process listens, perhaps in place of an ssh tunnel."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from plan_fixtures import config_of

from launcher.cli.accounts import account_results
from launcher.config.schema import RunConfig
from launcher.errors import DataError, PushError
from launcher.export import hub
from launcher.security import port_owners
from launcher.security.hub_answers import guard_hub_client
from launcher.tracking.wandb import local_settings

__all__ = ["config_of"]

MALLORY, PORT = 54321, 8265
Listen = Callable[..., None]


@pytest.fixture
def listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    """Writes the system's tables of sockets: of IPv4 and of IPv6."""
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


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "127.0.0.1:8265", "http://localhost:8265/a", "[::1]:8265"])
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


def test_the_hub_and_wandb_get_no_key_there(
    listen: Listen, config_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listen(("127.0.0.1", MALLORY))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://localhost:{PORT}")
    problem = local_settings.find_problem()
    assert problem is not None
    assert problem.where == "WANDB_BASE_URL"
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{PORT}")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "canaryCANARY0123")
    with pytest.raises(DataError, match="would get your token or key"):
        guard_hub_client()
    with pytest.raises(PushError, match="would get your token or key"):
        hub.push(tmp_path, "owner/name", again="")
    results = {result.name: result for result in account_results.check_accounts(config_of())}
    assert "would get your token or key" in results["Hub"].seen
    assert "would get your token or key" in results["W&B"].seen


def test_the_tables_of_the_system_are_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        listening = port_owners.users_listening(server.getsockname()[1])
    assert listening == {ip_address("127.0.0.1"): {os.geteuid()}}
