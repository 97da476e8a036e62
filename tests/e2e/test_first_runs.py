"""A local run from the command to the exported model, and a run that is stopped and resumed without changing its losses.

`make test` runs only the first; tests/e2e/test_finish.py and tests/e2e/test_resume_exact.py check more details.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import (
    FIRST_RUN,
    FIRST_STEPS,
    agent_of,
    held,
    last_step,
    listening_addresses,
    losses,
    modes_of,
    processes_of,
    slow_steps,
    status,
)
from forked import Launch, require_exit
from pace import wait_for
from transformers import AutoModelForCausalLM, AutoTokenizer


def test_a_run_trains_saves_and_exports(first_run: Path) -> None:
    assert (status(first_run)["state"], status(first_run)["step"]) == ("completed", FIRST_STEPS)
    assert modes_of(first_run) == (0o700, 0o600)
    assert sorted(losses(first_run)) == list(range(1, FIRST_STEPS + 1))
    assert (first_run / f"checkpoints/step-{FIRST_STEPS:08d}/manifest.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(first_run / "export").config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(first_run / "export").chat_template
    assert not processes_of(first_run)


@pytest.mark.rest
def test_a_stopped_and_resumed_run_has_the_same_losses_whatever_the_clock_says(
    launch: Launch, start: Callable, runs: Path, first_run: Path, tmp_path: Path
) -> None:
    run, clock = runs / "stopped", tmp_path / "clock"
    clock.write_text("0")
    env = {**slow_steps(0), "CLOCK_AHEAD": str(clock)}
    settings = ("checkpoint.save_every=3", "export.enabled=false", "run.max_hours=1", f"run.root={runs}", "run.name=stopped")
    with start(*FIRST_RUN, *settings, **env) as process:
        wait_for("the attempt", (run / "driver.json").exists)
        clock.write_text("86400")
        with held(run, 4):
            assert listening_addresses([agent_of(run), *agent_of(run).children(recursive=True)]) == {"127.0.0.1"}
            process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    stopped_at = status(run)["step"]
    assert status(run)["state"] == "cancelled"
    assert last_step(run) == stopped_at < FIRST_STEPS
    assert (run / f"checkpoints/step-{stopped_at:08d}/manifest.json").is_file()
    clock.write_text("-86400")
    done = launch("resume", str(run), **env)
    require_exit(done)
    assert losses(run) == losses(first_run)
    goodput = json.loads(launch("status", str(run), "--json", **env).stdout)["goodput"]
    assert 0 < goodput["fraction"] < 1
    assert goodput["wall_s"] < 3600
