"""The W&B check before a run is submitted, against a server on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_wandb import ENTITY, KEY, FakeWandb, fake_wandb
from forked import ForkingSubprocess, Launch, preloaded

from launcher.cli import accounts
from launcher.cli.accounts import check_wandb
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with fake_wandb(projects=("launcher",)) as running:
        yield running


@pytest.fixture(autouse=True)
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork account checks from a process that has imported W&B once; tests that run a whole command import it anew."""
    if "launch_here" not in request.fixturenames:
        monkeypatch.setattr(
            accounts, "subprocess", ForkingSubprocess(preloaded("launcher.tracking.wandb.project", "wandb.sdk.lib.wbauth"))
        )


def config(cluster: dict[str, Any] | None = None, **tracking: Any) -> RunConfig:
    data = {"sources": [{"path": "train.jsonl"}]}
    sections = {"model": {"path": "./model"}, "data": data, "train": {"max_steps": 1}, "tracking": {"mode": "online", **tracking}}
    return RunConfig.model_validate({**sections, **({"cluster": cluster} if cluster else {})})


def environ(server: FakeWandb, netrc: Path | str = os.devnull, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    return {**kept, "WANDB_BASE_URL": server.address, "NETRC": str(netrc), "PYTHONPATH": str(REPO), **variables}


@pytest.mark.parametrize("entity", [None, ENTITY])
def test_the_users_own_login_entity_and_project_pass(server: FakeWandb, entity: str | None) -> None:
    assert check_wandb(config(entity=entity), environ(server, WANDB_API_KEY=KEY)) == []
    assert KEY not in "".join(server.received)


@pytest.mark.parametrize("entity", [None, ENTITY.upper()])
def test_a_project_that_wandb_will_create_is_a_note(server: FakeWandb, entity: str | None) -> None:
    (said,) = check_wandb(config(entity=entity, project="demoo"), environ(server, WANDB_API_KEY=KEY))
    assert f"{entity or ENTITY}/demoo" in said


def test_a_project_that_may_only_be_read_is_refused(server: FakeWandb) -> None:
    server.read_only = {"other/demo": True}
    with pytest.raises(ConfigError, match="me may read the project other/demo but not write to it"):
        check_wandb(config(entity="other", project="demo"), environ(server, WANDB_API_KEY=KEY))


@pytest.mark.parametrize(
    ("tracking", "key", "words"),
    [
        ({}, "f" * 40, "does not accept the key"),
        ({"entity": "taem"}, KEY, "there is no entity taem that me may see; me may write to me, team"),
        ({}, "", "there is no login for http://127.0.0.1"),
    ],
)
def test_a_login_or_entity_that_would_fail_later_is_refused(
    server: FakeWandb, tracking: dict[str, str], key: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        check_wandb(config(**tracking), environ(server, **({"WANDB_API_KEY": key} if key else {})))
    assert "tracking.mode=offline" in str(refused.value)
    assert not key or key not in str(refused.value)


def test_the_local_login_is_not_checked_where_the_nodes_login_counts(server: FakeWandb) -> None:
    cluster = {"kind": "ray", "address": "http://10.0.0.1:8265"}
    (said,) = check_wandb(config(cluster, entity="taem"), environ(server, WANDB_API_KEY="f" * 40))
    assert "API keys are not sent to this cluster" in said


def test_an_entity_of_others_is_not_refused(server: FakeWandb) -> None:
    server.others = ("other",)
    (said,) = check_wandb(config(entity="other"), environ(server, WANDB_API_KEY=KEY))
    assert "me is not a member of other" in said


@pytest.mark.parametrize("fault", ["error", "hang"])
def test_a_server_that_does_not_answer_is_a_note(server: FakeWandb, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "hang":
        monkeypatch.setattr(accounts, "_WANDB_DEADLINE_S", 1.0)
    server.fault = fault
    (said,) = check_wandb(config(), environ(server, WANDB_API_KEY=KEY))
    assert said.startswith("the launcher could not check whether W&B accepts this run: ")


@pytest.mark.parametrize("tracking", [{"mode": "auto"}, {"mode": "offline"}, {"kind": "none"}])
def test_offline_modes_are_not_checked(server: FakeWandb, tracking: dict[str, str]) -> None:
    assert check_wandb(config(**tracking), environ(server)) == []
    assert not server.received


@pytest.mark.parametrize(
    ("cluster", "variable", "words"),
    [
        ({"kind": "ray", "address": "10.0.0.1:6379"}, False, "does not reach Ray's nodes"),
        ({"kind": "ray", "address": "10.0.0.1:6379"}, True, ""),
        ({"kind": "slurm", "container_image": "/images/launcher.sqsh"}, False, "inside the container"),
        ({"kind": "local"}, False, ""),
    ],
)
def test_a_login_that_the_ranks_would_lack_is_a_note(
    server: FakeWandb, tmp_path: Path, cluster: dict[str, str], variable: bool, words: str
) -> None:
    host = server.address.removeprefix("http://")
    (tmp_path / "netrc").write_text(f"machine {host} login user password {KEY}\n")
    said = check_wandb(config(cluster), environ(server, tmp_path / "netrc", **({"WANDB_API_KEY": KEY} if variable else {})))
    assert [words in text for text in said] == ([True] if words else [])


def test_a_wrong_entity_ends_the_command_before_anything_is_created(
    launch_here: Launch, server: FakeWandb, tmp_path: Path
) -> None:
    settings = ("model=tiny", "tracking.mode=online", "tracking.entity=taem", f"run.root={tmp_path / 'runs'}")
    done = launch_here(*settings, WANDB_API_KEY=KEY, WANDB_BASE_URL=server.address)
    assert done.returncode == 2
    assert "there is no entity taem" in done.stderr
    assert not (tmp_path / "runs").exists()
