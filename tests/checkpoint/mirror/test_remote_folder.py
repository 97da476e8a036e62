"""Operations on a remote folder are retried only after transient failures."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launcher.checkpoint.remote_folder import RemoteFolder


class Storage:
    """Fails with each of `errors` in turn, then returns."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors, self.num_calls = list(errors), 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "content"


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def test_transient_failures_are_retried_over_a_fresh_connection(tmp_path: Path, slept: list[float]) -> None:
    storage = Storage(*(OSError("not now") for _ in range(4)))
    folder = RemoteFolder(f"file://{tmp_path}")
    before = folder._fs
    assert folder._retry(storage) == "content"
    assert slept == [1, 2, 4, 8]
    # An ssh server that restarts during a run ends the connection of sftp's client.
    assert folder._fs is not before


def test_the_last_failure_is_raised(tmp_path: Path, slept: list[float]) -> None:
    storage = Storage(*(OSError(f"failure {number}") for number in range(1, 7)))
    with pytest.raises(OSError, match="failure 5"):
        RemoteFolder(f"file://{tmp_path}")._retry(storage)
    assert storage.num_calls == 5


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), ImportError(), KeyboardInterrupt()])
def test_permanent_failures_are_not_retried(tmp_path: Path, slept: list[float], error: BaseException) -> None:
    storage = Storage(error)
    with pytest.raises(type(error)):
        RemoteFolder(f"file://{tmp_path}")._retry(storage)
    assert (storage.num_calls, slept) == (1, [])
