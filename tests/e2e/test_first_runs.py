"""A run on this machine, from the command to the exported folder; and one that is stopped and resumed, as if it had not been.

`make test` shows these two; tests/e2e/test_finish.py and tests/e2e/test_resume_exact.py look closer.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, agent_of, held, last_step, listening_addresses, losses, modes_of, processes_of, status
from transformers import AutoModelForCausalLM, AutoTokenizer

Launch = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 12
SETTINGS = (*TINY, f"train.max_steps={STEPS}", "checkpoint.save_every=3", "eval.at_start=false")


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, module_runs: Path) -> Path:
    done = launch(*SETTINGS, f"run.root={module_runs}", "run.name=undisturbed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exported to" in done.stdout
    return module_runs / "undisturbed"


def test_a_run_trains_saves_and_exports(undisturbed: Path) -> None:
    assert (status(undisturbed)["state"], status(undisturbed)["step"]) == ("completed", STEPS)
    assert modes_of(undisturbed) == (0o700, 0o600)
    assert sorted(losses(undisturbed)) == list(range(1, STEPS + 1))
    assert (undisturbed / f"checkpoints/step-{STEPS:08d}/manifest.json").is_file()
    assert AutoModelForCausalLM.from_pretrained(undisturbed / "export").config.model_type == "llama"
    assert AutoTokenizer.from_pretrained(undisturbed / "export").chat_template
    assert not processes_of(undisturbed)


def test_a_stopped_and_resumed_run_has_the_same_losses(launch: Launch, start: Callable, runs: Path, undisturbed: Path) -> None:
    run = runs / "stopped"
    with start(*SETTINGS, "export.enabled=false", f"run.root={runs}", "run.name=stopped") as process:
        with held(run, 4):
            assert listening_addresses([agent_of(run), *agent_of(run).children(recursive=True)]) == {"127.0.0.1"}
            process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    stopped_at = status(run)["step"]
    assert status(run)["state"] == "cancelled"
    assert last_step(run) == stopped_at < STEPS
    assert (run / f"checkpoints/step-{stopped_at:08d}/manifest.json").is_file()
    # Ranks that are forked and ranks that are new processes compute the same.
    done = launch("resume", str(run), "cluster.fork_ranks=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(undisturbed)
