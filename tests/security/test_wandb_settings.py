"""W&B reads a settings file in the working directory: another user's file must not choose the server that gets the key."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hand_made
import pytest
from file_owners import MALLORY, TEAM, as_root
from made_verdict import made_verdict
from wandb_server import KEY, FakeWandb, fake_wandb

from launcher import run_store
from launcher.cli.accounts import wandb_check
from launcher.cli.main import main
from launcher.cli.worker_process import worker_environment
from launcher.config.schema import RunConfig
from launcher.errors import ConfigError
from launcher.tracking.wandb import local_settings

__all__ = ["as_root"]

pytestmark = pytest.mark.usefixtures("as_root")

# Like the tracker's thread, while other threads stay in the command's working directory.
_LOAD = """
import json, os, threading
from launcher.tracking.wandb import local_settings

def load():
    local_settings.leave_folder_of_others(only_this_thread=True)
    from wandb.sdk import wandb_setup
    loaded.append(wandb_setup.singleton().settings.base_url)

loaded = []
thread = threading.Thread(target=load)
thread.start()
thread.join()
print(json.dumps([*loaded, os.getcwd()]))
"""


@pytest.fixture
def servers() -> Iterator[tuple[FakeWandb, FakeWandb]]:
    """The user's server and the other user's server."""
    with fake_wandb(projects=("launcher",)) as own, fake_wandb() as other:
        yield own, other


@pytest.fixture
def folder(servers: tuple[FakeWandb, FakeWandb], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, whose W&B settings name the other server; those in the user's home name their own."""
    for variable in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", os.devnull)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    for file, server in zip((".config/wandb/settings", "work/wandb/settings"), servers, strict=True):
        path = tmp_path / ("home" if file.startswith(".") else "") / file
        path.parent.mkdir(parents=True)
        path.write_text(f"[default]\nbase_url = {server.address}\n")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def config() -> RunConfig:
    sections: dict[str, Any] = {"model": {"path": "./m"}, "data": {"sources": [{"path": "t.jsonl"}]}, "train": {"max_steps": 1}}
    return RunConfig.model_validate({**sections, "tracking": {"mode": "online"}})


def run_python(*arguments: str, text: str = "") -> str:
    command = [sys.executable, *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=worker_environment(), timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_settings_of_another_user_are_refused_by_name(
    folder: Path, servers: tuple[FakeWandb, FakeWandb], capsys: pytest.CaptureFixture[str]
) -> None:
    # Another user could create the folder .wandb, which W&B prefers.
    folder.chmod(0o1777)
    with pytest.raises(ConfigError, match="can be written by everyone"):
        wandb_check.check(config(), worker_environment())
    folder.chmod(0o755)
    os.chown(folder / "wandb/settings", MALLORY, -1)
    with pytest.raises(ConfigError, match=f"wandb/settings belongs to {MALLORY}"):
        wandb_check.check(config(), worker_environment())
    assert main(["dashboard", "demo"]) == 2
    assert f"belongs to {MALLORY}" in capsys.readouterr().err
    assert servers[1].received == []
    assert Path.cwd() == folder


@pytest.mark.rest
@pytest.mark.parametrize("attempt", ["theirs", "sticky"])
def test_settings_that_appear_after_the_check_are_not_read(
    folder: Path, servers: tuple[FakeWandb, FakeWandb], attempt: str
) -> None:
    """The test skips the check instead: the settings exist from the start."""
    own, other = servers
    if attempt == "theirs":
        os.chown(folder, MALLORY, -1)
    else:
        folder.chmod(0o1777)
    account = json.loads(run_python("-m", "launcher.tracking.wandb.account", text='{"kind": "wandb", "mode": "online"}'))
    assert account["login"] == "environment"
    assert own.received
    loaded, working_dir = json.loads(run_python("-c", _LOAD))
    assert (loaded, working_dir) == (own.address, str(folder))
    assert other.received == []


@pytest.mark.parametrize("attempt", ["settings", "folder"])
def test_a_verdict_is_not_sent_by_settings_of_another_user(
    folder: Path, servers: tuple[FakeWandb, FakeWandb], attempt: str, tmp_path: Path
) -> None:
    """`evaluate` uploads the verdict from a process that starts in the command's working directory."""
    plan = hand_made.plan(tmp_path / "run", {**hand_made.SETTINGS, "tracking": {"mode": "online"}})
    run = run_store.create(plan)
    run_store.update_status(run, state="completed")
    (verdict := run.root / "evaluations/step-00000040").mkdir(parents=True)
    made_verdict().write(verdict)
    os.chown(folder / "wandb/settings" if attempt == "settings" else folder, MALLORY, -1)
    line = run_python("-m", "launcher.tracking.wandb.verdict_upload", str(run.root), "40")
    assert line.startswith("W&B: the verdict is not sent: ")
    assert f"belongs to {MALLORY}" in line
    assert servers[1].received == []


def test_settings_of_the_user_are_read(folder: Path, servers: tuple[FakeWandb, FakeWandb]) -> None:
    own, other = servers
    wandb_check.check(config(), worker_environment())
    assert other.received
    assert own.received == []
    local_settings.leave_folder_of_others()
    assert Path.cwd() == folder


def test_a_folder_of_another_user_that_a_variable_names_is_refused(
    folder: Path, servers: tuple[FakeWandb, FakeWandb], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user may have created the folder in /tmp that the variable names."""
    (folder / "wandb/settings").rename(folder / "settings")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(folder))
    assert local_settings.find_problem() is None
    os.chown(folder / "settings", MALLORY, -1)
    with pytest.raises(ConfigError, match=f"settings belongs to {MALLORY}"):
        wandb_check.check(config(), worker_environment())
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        Path(name).chmod(0o1777)
        monkeypatch.setenv("WANDB_CONFIG_DIR", name)
        with pytest.raises(ConfigError, match="can be written by everyone"):
            wandb_check.check(config(), worker_environment())
    assert not any(server.received for server in servers)


def test_settings_in_a_home_directory_that_nobody_else_can_enter_may_have_any_mode(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With umask 002, a group that users share can write to them."""
    for variable in ("WANDB_CONFIG_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ".config/wandb/settings"
    file.parent.mkdir(parents=True)
    file.write_text("[default]\n")
    for path in (tmp_path / ".config", file.parent, file):
        os.chown(path, -1, TEAM)
        path.chmod(0o775)
    tmp_path.chmod(0o700)
    assert local_settings.find_problem() is None
    os.chown(file, MALLORY, -1)
    problem = local_settings.find_problem()
    assert problem is not None
    assert problem.message.endswith(f"belongs to {MALLORY}")


def test_a_user_without_a_home_directory_has_no_settings_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container may run with a user ID that it does not know."""
    monkeypatch.chdir(tmp_path)
    for variable in ("HOME", "WANDB_CONFIG_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: MALLORY)
    assert local_settings.find_problem() is None


@pytest.mark.parametrize("variable", ["NETRC", "WANDB_IDENTITY_TOKEN_FILE"])
def test_a_login_that_another_user_could_write_is_refused(
    folder: Path, servers: tuple[FakeWandb, FakeWandb], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """Their account would get the metrics and samples of the run."""
    (folder / "wandb/settings").unlink()
    (folder / "login").write_text("machine api.wandb.ai login user password " + "0" * 40)
    monkeypatch.setenv(variable, str(folder / "login"))
    assert local_settings.find_problem() is None
    os.chown(folder / "login", MALLORY, -1)
    with pytest.raises(ConfigError, match=f"what {variable} names is not trusted: .*login belongs to {MALLORY}"):
        wandb_check.check(config(), worker_environment())
    assert not any(server.received for server in servers)
