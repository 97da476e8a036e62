"""run.confirm_usd: when `train` asks for confirmation, and when it cannot."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import hand_made
import pytest

from launcher.cli.start_run import require_consent
from launcher.errors import ConfigError
from launcher.plan.gpu_types import Price
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.throughput import SpeedEstimate

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]
UNKNOWN = SpeedEstimate("no estimate")


def estimate(usd: float) -> SpeedEstimate:
    return replace(UNKNOWN, usd=(usd / 2, usd))


def plan(price: float | None = 2.0, **run: float) -> LaunchPlan:
    """The plan of a run of two ranks."""
    costs = None if price is None else Price(price)
    cluster = {} if price is None else {"cluster": {"kind": "local", "price_per_gpu_hour": price}}
    return hand_made.plan(Path("/srv/runs/demo"), {**hand_made.SETTINGS, **cluster, "run": run}, price=costs)


@pytest.mark.parametrize(
    ("planned", "message"),
    [
        ([(plan(confirm_usd=50), estimate(50))], None),
        ([(plan(confirm_usd=50), estimate(60))], r"the run may cost up to \$60\.00"),
        ([(plan(confirm_usd=50, max_usd=40), estimate(60))], None),
        ([(plan(confirm_usd=50), UNKNOWN)], "the cost of the run is not known"),
        ([(plan(None, confirm_usd=50), UNKNOWN)], None),
        ([(plan(confirm_usd=50), estimate(30)), (plan(confirm_usd=90), estimate(30))], r"2 runs may cost up to \$60\.00"),
        (
            [(plan(confirm_usd=50), estimate(30)), (plan(confirm_usd=50), UNKNOWN)],
            r"2 runs may cost more than \$30\.00: the cost of 1 is not known",
        ),
    ],
)
def test_without_a_terminal_costly_runs_are_refused(planned: list[tuple[LaunchPlan, SpeedEstimate]], message: str | None) -> None:
    if message is None:
        assert require_consent(planned)
        return
    with pytest.raises(ConfigError, match=f"{message}, and there is no terminal to ask on") as error:
        require_consent(planned)
    assert "add --yes" in error.value.problems[0].remedy


@pytest.mark.parametrize(("typed", "may_start"), [(b"y\n", True), (b"\n", False), (b"no\n", False), (b"\x04", False)])
def test_the_answer_on_a_terminal_decides(typed: bytes, may_start: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    with open(terminal, closefd=False) as stdin, open(terminal, "w") as stdout:
        monkeypatch.setattr("sys.stdin", stdin)
        monkeypatch.setattr("sys.stdout", stdout)
        os.write(controller, typed)
        assert require_consent([(plan(confirm_usd=50), estimate(60))]) == may_start
        shown = b""
        while b"Start? [y/N]" not in shown:
            shown += os.read(controller, 4096)
    assert b"the run may cost up to $60.00 (run.confirm_usd=50). Start? [y/N]" in shown
    os.close(controller)


def test_a_declined_cost_is_refused_on_every_machine(launcher_env: Mapping[str, str], tmp_path: Path) -> None:
    settings = ("model=tiny", "run.confirm_usd=1", "run.name=costly", f"run.root={tmp_path}", "cluster.price_per_gpu_hour=2")
    command = [sys.executable, "-m", "launcher", "train", "+cluster=static", *settings, "train.max_steps=1", "tracking.kind=none"]
    controller, terminal = pty.openpty()
    os.write(controller, b"no\n")
    try:
        done = subprocess.run(
            command, env=launcher_env, stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, text=True, timeout=300
        )
    finally:
        os.close(controller)
        os.close(terminal)
    assert done.returncode == 2, done.stderr
    assert "the cost of the run was not accepted" in done.stderr
    assert not any(tmp_path.iterdir())
