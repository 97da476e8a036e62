"""sftp connects only to hosts whose keys ssh knows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from launcher.checkpoint.remote_folder import RemoteFolder
from launcher.config.sections.data import Source
from launcher.data.sources import locate
from launcher.errors import DataError, SubmitError

KEY = "0123456789abcdef" * 2 + "01234567"


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
    yield module
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
        locate.find_files(Source(path=f"{address}/a.jsonl"))
