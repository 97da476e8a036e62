"""A job is submitted again while the head node of a Ray cluster does not accept jobs yet."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from launcher.clusters.ray import jobs
from launcher.config.sections.ray import RaySection
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir

SECTION = RaySection(kind="ray", address="http://head:8265")
NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later."


class Client:
    """Fails with each of `messages` in turn, then accepts the job."""

    def __init__(self, *messages: str) -> None:
        self.messages = list(messages)

    def submit_job(self, **job: Any) -> str:
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
