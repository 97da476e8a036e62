"""`launcher doctor` on this machine: output, exit code, login checks, and no files left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import httpx
import huggingface_hub
import psutil
import pytest
from forked import Launch, require_exit
from huggingface_hub.errors import HfHubHTTPError
from pace import wait_for
from plan_fixtures import ConfigOf, config_of

from launcher.cli.accounts import check_accounts, check_wandb
from launcher.clusters.check_results import FAILURE, OK, WARNING, CheckResult
from launcher.config.schema import RunConfig

__all__ = ["config_of"]

TOKEN = "hf_" + "abcdefgh" * 4
CHECKS = {"W&B", "Hub", "machine", "packages", "GPUs", "torch", "all-reduce", "/dev/shm", "run.root"}


def own_shared_memory() -> list[str]:
    """Return the files in /dev/shm, except multiprocessing semaphores, which concurrent tests create."""
    return [name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")]


@pytest.mark.rest
def test_this_machine_is_checked_and_left_as_it_was(launch: Launch, tmp_path: Path) -> None:
    before = set(own_shared_memory())
    done = launch("doctor", "model=tiny", f"run.root={tmp_path}/runs", "--json", timeout=600)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    (machine,) = report["nodes"].values()
    results = [*report["here"], *machine["results"]]
    assert {result["name"] for result in results} >= CHECKS
    verdicts = {result["name"]: result["verdict"] for result in results}
    assert verdicts["all-reduce"] == verdicts["packages"] == verdicts["torch"] == "ok", done.stdout
    assert all(result["remedy"] for result in results if result["verdict"] != "ok")
    assert done.returncode == (report["verdict"] == "failure")
    assert list(tmp_path.iterdir()) == []
    assert set(own_shared_memory()) <= before


@pytest.mark.rest
def test_a_failure_is_shown_with_its_fix_and_ends_with_code_1(launch: Launch, tmp_path: Path) -> None:
    """The settings push to the Hub without a token; slow checks are stopped at the timeout."""
    (tmp_path / "my.yaml").write_text("model: tiny\nexport:\n  push_to_hub: owner/name\n")
    done = launch("doctor", f"{tmp_path}/my.yaml", f"run.root={tmp_path}", "--timeout", "0.01", timeout=600)
    require_exit(done, 1)
    lines = done.stdout.splitlines()
    (failed,) = [i for i, line in enumerate(lines) if line.startswith("failure  Hub ")]
    assert "HF_TOKEN" in lines[failed]
    assert lines[failed + 1].strip().startswith("fix: ")
    assert "the checks of this machine did not end" in done.stdout
    assert lines[-1].startswith("2 failures")


@pytest.mark.rest
def test_ctrl_c_leaves_no_process_and_no_file(launcher_env: Mapping[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher", "doctor", "model=tiny", f"run.root={tmp_path}/runs"]
    doctor = subprocess.Popen(command, env={**launcher_env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started: list[psutil.Process] = []

    def imports_torch() -> bool:
        assert doctor.poll() is None
        started[:] = psutil.Process(doctor.pid).children(recursive=True)
        return any("launcher.worker.checks.gpus" in word for process in started for word in _words(process))

    try:
        wait_for("the check of torch", imports_torch)
        doctor.send_signal(signal.SIGINT)
        _, errors = doctor.communicate(timeout=300)
    finally:
        doctor.kill()
    assert doctor.returncode == 130, errors
    assert errors.splitlines()[-1] == "interrupted"
    wait_for("its processes to end", lambda: not [process for process in started if _lives(process)])
    assert list(tmp_path.iterdir()) == []


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(autouse=True)
def no_logins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def of(name: str, config: RunConfig) -> CheckResult:
    (result,) = [result for result in check_accounts(config) if result.name == name]
    return result


def test_a_wandb_login_is_missing_or_exists(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = of("W&B", config_of())
    assert missing.verdict == WARNING
    assert "wandb login" in missing.remedy
    assert of("W&B", config_of("tracking.mode=online")).verdict == FAILURE
    assert of("W&B", config_of("tracking.mode=offline")).verdict == OK
    monkeypatch.setenv("WANDB_API_KEY", TOKEN)
    assert (of("W&B", config_of()).verdict, of("W&B", config_of()).seen) == (OK, "login from WANDB_API_KEY")


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        (("cluster=ray", "cluster.address=http://10.0.0.1:8265"), "API keys are not sent to this cluster"),
        (("cluster=ray", "cluster.address=10.0.0.1:6379"), "does not reach Ray's nodes"),
        (("cluster=slurm", "cluster.container_image=/images/launcher.sqsh"), "inside the container"),
        ((), ""),
    ],
)
def test_a_login_that_the_ranks_would_lack_is_a_note(
    config_of: ConfigOf, tmp_path: Path, cluster: tuple[str, ...], words: str
) -> None:
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {TOKEN}\n")
    note = check_wandb(config_of(*cluster))
    assert words in note if words else note is None


def test_a_hub_token_is_missing_refused_accepted_or_not_checked(
    config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, answers = config_of("tracking.mode=offline"), {TOKEN: 200, TOKEN[::-1]: 401}

    def whoami(token: str) -> dict[str, str]:
        if not answers:
            raise OSError("no route to host")
        if answers[token] == 200:
            return {"name": "somebody"}
        raise HfHubHTTPError("refused", response=httpx.Response(answers[token], request=httpx.Request("GET", "https://hub")))

    monkeypatch.setattr(huggingface_hub, "whoami", whoami)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: os.environ.get("HF_TOKEN"))
    assert of("Hub", config).verdict == OK
    assert of("Hub", config_of("tracking.mode=offline", "export.push_to_hub=owner/name")).verdict == FAILURE
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (of("Hub", config).verdict, of("Hub", config).seen) == (OK, "the token belongs to somebody")
    monkeypatch.setenv("HF_TOKEN", TOKEN[::-1])
    refused = of("Hub", config)
    assert refused.verdict == FAILURE
    assert TOKEN[::-1] not in str(refused)
    answers.clear()
    assert of("Hub", config).verdict == WARNING
