"""Worker processes that fail without printing a message."""

from __future__ import annotations

import hand_made
import pytest

from launcher.cli.worker_process import run_worker_module
from launcher.config.schema import RunConfig
from launcher.errors import RunError


def test_the_message_names_the_process_that_failed() -> None:
    config = RunConfig.model_validate(hand_made.SETTINGS)
    with pytest.raises(RunError, match=r"python -m launcher\.worker\.absent ended with exit code 1; its messages are above"):
        run_worker_module("launcher.worker.absent", config)
