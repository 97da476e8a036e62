"""A job submission is retried while the head node of a Ray cluster does not accept jobs yet."""

from __future__ import annotations

import math
import os
import pwd
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.clusters.ray import jobs
from launcher.config.sections.ray import RaySection
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir
from launcher.security.owners import Trust

SECTION = RaySection(kind="ray", address="http://head:8265")
NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later."


class Client:
    """Fails with each of `messages` in turn, then accepts the job."""

    def __init__(self, *messages: str) -> None:
        self.messages = list(messages)
        self.variables: dict[str, str] = {}
        self.entrypoint = ""

    def submit_job(self, runtime_env: dict[str, dict[str, str]], entrypoint: str, **job: Any) -> str:
        self.entrypoint = entrypoint
        self.variables = runtime_env["env_vars"]
        if self.messages:
            raise RuntimeError(self.messages.pop(0))
        return "raysubmit_1"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def submit(monkeypatch: pytest.MonkeyPatch, client: Client, folder: Path) -> str:
    monkeypatch.setattr(jobs, "_client", lambda address: client)
    return jobs.submit(SECTION, RunDir(folder), "launcher.worker.ray.driver", ["plan.json"])


def test_a_missing_agent_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    assert submit(monkeypatch, Client(NO_AGENT, NO_AGENT), tmp_path) == "raysubmit_1"
    assert slept == [1, 1]


def test_the_driver_accepts_the_owners_that_the_command_and_its_own_node_accept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver may run as another user, where this machine's user names are unknown and the volume shows other owners."""
    from ray._private.utils import update_envs

    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "daemon,group:54322")
    client = Client()
    submit(monkeypatch, client, tmp_path)
    for own, expected_gids in (("group:54323", {54322, 54323}), (None, {54322})):
        monkeypatch.delenv("LAUNCHER_TRUST_OWNERS")
        if own is not None:
            monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", own)
        update_envs({"LAUNCHER_TRUST_OWNERS": client.variables["LAUNCHER_TRUST_OWNERS"]})
        accepted = Trust.from_environ(os.environ)
        assert {os.geteuid(), 0, pwd.getpwnam("daemon").pw_uid} <= accepted.uids
        assert accepted.gids == expected_gids


def test_other_errors_end_the_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    with pytest.raises(SubmitError):
        submit(monkeypatch, Client("the entrypoint is invalid"), tmp_path)
    assert slept == []


def test_a_cluster_without_agents_is_reported_after_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    monkeypatch.setattr(jobs, "_AGENT_DEADLINE_S", 0.0)
    with pytest.raises(SubmitError):
        submit(monkeypatch, Client(NO_AGENT), tmp_path)
    assert slept == []


class BusyClient(Client):
    """A job that ends after `num_failures` requests that the head node leaves unanswered."""

    def __init__(self, num_failures: int) -> None:
        super().__init__()
        self.num_failures = num_failures
        self.has_stopped = False

    def get_job_info(self, job: str) -> Any:
        if self.num_failures and not self.has_stopped:
            self.num_failures -= 1
            raise ConnectionError("timed out")
        return SimpleNamespace(status=SimpleNamespace(value="SUCCEEDED"), message="done")

    def get_job_logs(self, job: str) -> str:
        return "answered\n"

    def stop_job(self, job: str) -> None:
        self.has_stopped = True

    def delete_job(self, job: str) -> None:
        pass


def test_a_command_outlasts_requests_that_fail(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(time, "monotonic", monotonic)
    client = BusyClient(num_failures=20)
    monkeypatch.setattr(jobs, "_client", lambda address: client)
    shown: list[str] = []
    run = partial(jobs.run_driver, SECTION, "evaluate", "a_module", [], {}, math.inf, shown.append)
    assert run() == ["answered", "done"]
    assert shown == ["answered\n"]
    client = BusyClient(num_failures=100_000)
    with pytest.raises(SubmitError, match="does not answer"):
        run()
    assert client.has_stopped
