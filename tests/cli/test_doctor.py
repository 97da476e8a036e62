"""`launcher doctor` on this machine: output, exit code, login checks, and no files left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import yaml
from fake_wandb import KEY, FakeWandb, fake_wandb
from forked import ForkingSubprocess, Launch, preloaded, require_exit
from http_server import Answer, Request, serving
from pace import wait_for
from plan_fixtures import ConfigOf, config_of

from launcher.cli import accounts
from launcher.cli.accounts import check_accounts, is_gated
from launcher.clusters.check_results import FAILURE, OK, WARNING, CheckResult
from launcher.config.compose import conf_dir
from launcher.config.schema import RunConfig

__all__ = ["config_of"]

TOKEN = "hf_" + "abcdefgh" * 4
CHECKS = {"W&B", "Hub", "machine", "packages", "GPUs", "torch", "all-reduce", "/dev/shm", "run.root", "caches"}


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


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    """A fake W&B server. Account checks are forked from a process that has imported W&B's package once."""
    imported = preloaded("launcher.tracking.wandb.project", "wandb.sdk.lib.wbauth")
    monkeypatch.setattr(accounts, "subprocess", ForkingSubprocess(imported))
    for name in [name for name in os.environ if name.startswith(("WANDB_", "HF_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", os.devnull)
    with fake_wandb(projects=("launcher",)) as running:
        monkeypatch.setenv("WANDB_BASE_URL", running.address)
        yield running


def of(name: str, config: RunConfig) -> CheckResult:
    (result,) = [result for result in check_accounts(config) if result.name == name]
    return result


def test_a_wandb_login_is_missing_refused_or_accepted(
    wandb: FakeWandb, config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = of("W&B", config_of())
    assert missing.verdict == WARNING
    assert "wandb login" in missing.remedy
    assert of("W&B", config_of("tracking.mode=online")).verdict == FAILURE
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert (of("W&B", config_of()).verdict, of("W&B", config_of()).seen) == (OK, "login of environment accepted")
    monkeypatch.setenv("WANDB_API_KEY", KEY[::-1])
    refused = of("W&B", config_of())
    assert refused.verdict == FAILURE
    assert refused.seen.startswith("Weights & Biases does not accept this run: ")
    assert KEY[::-1] not in str(refused)


def test_the_gated_repositories_are_those_that_the_presets_call_gated() -> None:
    for file in (conf_dir() / "model").glob("*.yaml"):
        head, *_ = file.read_text().splitlines()
        path = yaml.safe_load(file.read_text()).get("path", "")
        assert is_gated(path) == ("gated" in head), file.name


def answer_one_token(request: Request) -> Answer:
    """A Hub that accepts a single token."""
    is_known = request.path == "/api/whoami-v2" and request.headers["Authorization"] == f"Bearer {TOKEN}"
    return (200, {"name": "somebody"}) if is_known else (401, {})


def test_a_hub_token_is_missing_refused_accepted_or_not_checked(
    wandb: FakeWandb, config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    config = config_of("tracking.mode=offline")
    assert of("Hub", config).verdict == OK
    assert of("Hub", config_of("tracking.mode=offline", "export.push_to_hub=owner/name")).verdict == FAILURE
    gated = config_of("tracking.mode=offline", "model=llama3_1_8b", "data=jsonl", "data.path=rows.jsonl")
    assert of("Hub", gated).verdict == FAILURE
    assert "meta-llama/Llama-3.1-8B-Instruct is gated and not on this machine, and there is no HF_TOKEN" in of("Hub", gated).seen
    assert "https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct" in of("Hub", gated).remedy
    with serving(answer_one_token) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        accepted = of("Hub", config)
        assert (accepted.verdict, accepted.seen) == (OK, "the token from HF_TOKEN belongs to somebody")
        monkeypatch.setenv("HF_TOKEN", TOKEN[::-1])
        refused = of("Hub", config)
        assert refused.verdict == FAILURE
        assert TOKEN[::-1] not in str(refused)
    silent = of("Hub", config)
    assert silent.verdict == WARNING
    assert "does not answer" in silent.seen
