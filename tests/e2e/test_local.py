"""The main road on this machine: run, fail, stop, resume; compared with a run that was left alone.

tests/e2e/test_resume_exact.py kills ranks.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_tools import TINY, agent_of, last_step, losses, metrics, processes_of, ranks_of, status, wait_for
from wandb_files import records

from launcher import run_store
from launcher.plan.run_dir import RunDir
from launcher.run_store import RUNNING_STATES, Attempt
from launcher.tracking.dashboard import SECTIONS
from launcher.tracking.jsonl import read_events

pytestmark = pytest.mark.rest

Launch = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 30
CANARY = "canary-0ddba11c0ffee5eed"
# What the design promises of a run without GPUs; tests/train/test_gpu_metrics.py has the rest.
METRICS = {
    *(f"trainer/{name}" for name in ("step", "epoch", "tokens", "samples", "progress", "eta_s")),
    *(f"train/{name}" for name in ("loss", "grad_norm", "lr", "skipped_steps")),
    *(f"eval/held_out/{name}" for name in ("loss", "ppl")),
    *(
        f"perf/{name}"
        for name in ("tokens_per_sec", "tokens_per_sec_per_gpu", "tflops_per_gpu", "mfu", "padding_frac", "goodput")
    ),
    *(f"time/{name}" for name in ("step_s", "data_s", "fwd_bwd_s", "optim_s", "eval_s", "ckpt_s")),
    *(f"time/{name}" for name in ("step_max_rank_s", "straggler_ratio", "kept_s")),
    *(f"lost/{name}_s" for name in ("queue", "start", "load", "save", "eval", "restart", "replay")),
    *(f"data/{name}" for name in ("label_frac", "truncated_frac", "source/stdlib_docs/frac")),
    *(f"ckpt/{name}" for name in ("last_step", "save_s", "stall_s", "bytes", "disk_free_gib")),
    *(f"cost/{name}" for name in ("gpu_hours", "usd", "usd_per_million_tokens")),
    *(f"run/{name}" for name in ("attempt", "restarts", "nodes", "lost_steps")),
    *("host/cpu_util_mean", "host/ram_used_max_frac", "memory/host_rss_gib"),
}
SETTINGS = (*TINY, f"train.max_steps={STEPS}", "train.save_every=5", "train.keep_last=3", "train.export=false")


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, module_runs: Path) -> Path:
    tracked = ("tracking=wandb", "tracking.mode=offline", "tracking.tags=[quiet]", "cluster.price_per_gpu_hour=3")
    done = launch(*SETTINGS, *tracked, f"run.root={module_runs}", "run.name=undisturbed", CANARY_TOKEN=CANARY)
    assert done.returncode == 0, done.stdout + done.stderr
    return module_runs / "undisturbed"


def test_an_undisturbed_run_leaves_what_the_design_promises(undisturbed: Path) -> None:
    assert status(undisturbed)["state"] == "completed"
    assert status(undisturbed)["step"] == STEPS
    assert sorted(losses(undisturbed)) == list(range(1, STEPS + 1))
    assert [p.name for p in sorted((undisturbed / "checkpoints").iterdir())] == [f"step-{s:08d}" for s in (20, 25, 30)]
    assert json.loads((undisturbed / "attempts/001/exit.json").read_text())["state"] == "completed"
    assert (undisturbed / "code/launcher/train/loop.py").is_file()
    assert (undisturbed.stat().st_mode & 0o777) == 0o700
    assert not processes_of(undisturbed)


def test_every_metric_is_in_the_file_in_wandb_and_on_the_dashboard(undisturbed: Path) -> None:
    lines = metrics(undisturbed)
    logged = {name for line in lines for name in line} - {"time", "attempt"}
    assert logged >= METRICS
    told = records(undisturbed)
    history = [record["history"]["item"] for record in told if record["type"] == "history"]
    assert [row["_step"] for row in history] == list(range(STEPS + 1))
    assert {name for row in history for name in row if not name.startswith("_")} == logged
    assert [row["train/loss"] for row in history[1:]] == pytest.approx([loss for _, loss in sorted(losses(undisturbed).items())])
    (run,) = (record["run"] for record in told if record["type"] == "run")
    assert (run["tags"], run["config"]["update"]["config"]["train"]["max_steps"]) == (["quiet"], STEPS)
    assert not [file for file in undisturbed.rglob("*") if file.is_file() and CANARY.encode() in file.read_bytes()]
    shown = {name for charts in SECTIONS.values() for chart in charts for name in chart.metrics if not name.startswith("/")}
    only_on_gpus = ("gpu/", "memory/peak_", "memory/alloc_retries")
    assert {name for name in shown - logged if not name.startswith(only_on_gpus)} == set()


def test_loss_falls_and_held_out_is_measured_before_and_after(undisturbed: Path) -> None:
    held_out = [m["eval/held_out/loss"] for m in metrics(undisturbed) if "eval/held_out/loss" in m]
    assert len(held_out) == 2
    assert held_out[1] < held_out[0]


def test_an_attempt_that_another_has_followed_ends_and_is_not_restarted(start: Callable, runs: Path) -> None:
    run = runs / "followed"
    with start(*SETTINGS, "cluster.max_restarts=2", f"run.root={runs}", "run.name=followed") as process:
        wait_for("step 3", lambda: last_step(run) >= 3)
        run_store.next_attempt(RunDir(run), Attempt(resume_step=None))
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 1, output
    assert "attempt 1 was given up while it still ran: attempt 2 has taken over" in output
    assert last_step(run) < STEPS
    assert {path.name for path in (run / "attempts/001/elastic").rglob("attempt_*")} == {"attempt_0"}, "started once"
    assert not processes_of(run)


def test_one_ctrl_c_saves_and_stops_and_resume_goes_on(launch: Launch, start: Callable, runs: Path, undisturbed: Path) -> None:
    run = runs / "stopped"
    with start(*SETTINGS, f"run.root={runs}", "run.name=stopped") as process:
        wait_for("step 7", lambda: last_step(run) >= 7)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    assert "cancelled" in output
    step = status(run)["step"]
    assert status(run)["state"] == "cancelled"
    assert (run / f"checkpoints/step-{step:08d}/manifest.json").is_file()
    assert not processes_of(run)

    done = launch("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(run) == losses(undisturbed)


def test_two_ctrl_c_kill_at_once(start: Callable, runs: Path) -> None:
    run = runs / "impatient"
    settings = [s for s in SETTINGS if not s.startswith("train.max_steps")]
    with start(*settings, "train.max_steps=100000", f"run.root={runs}", "run.name=impatient") as process:
        wait_for("the first step", lambda: last_step(run) >= 1)
        # A stopped rank can never reach the end of its step, so only the kill ends this run.
        ranks_of(run)[1].send_signal(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        wait_for("the first signal to arrive", lambda: "saving" in (process.stdout.readline() if process.stdout else ""))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    assert "killed" in status(run)["message"]
    assert not processes_of(run)


def test_term_and_cancel_save_and_leave_nothing_behind(launch: Launch, start: Callable, runs: Path) -> None:
    settings = [s for s in SETTINGS if not s.startswith("train.max_steps")]
    run = runs / "terminated"
    with start(*settings, "train.max_steps=100000", f"run.root={runs}", "run.name=terminated") as process:
        wait_for("the first step", lambda: last_step(run) >= 1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=90)
    assert process.returncode == 130
    assert list((run / "checkpoints").iterdir())
    assert not processes_of(run)

    done = launch("resume", str(run), "--detach")
    assert done.returncode == 0, done.stderr
    wait_for("a step of the second attempt", lambda: status(run)["step"] > 5 and metrics(run)[-1]["attempt"] == 2)
    shown = launch("status", "terminated", "--root", str(runs), "--json")
    assert json.loads(shown.stdout)["state"] in RUNNING_STATES
    assert launch("cancel", "terminated", "--root", str(runs)).returncode == 0
    wait_for("the run to stop", lambda: status(run)["state"] == "cancelled")
    wait_for("its processes to end", lambda: not processes_of(run), deadline_s=30)
    refused = launch("cancel", "terminated", "--root", str(runs))
    assert refused.returncode == 2
    assert "not running" in refused.stderr


def test_ranks_do_not_outlive_a_killed_agent(launch: Launch, start: Callable, runs: Path) -> None:
    run = runs / "orphaned"
    with start(*SETTINGS, f"run.root={runs}", "run.name=orphaned") as process:
        wait_for("the first step", lambda: last_step(run) >= 1)
        agent_of(run).kill()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "agent" in output
    wait_for("the ranks to end", lambda: not processes_of(run), deadline_s=20)
    assert "failed" in launch("status", str(run)).stdout


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(launch: Launch, runs: Path) -> None:
    run = runs / "diverged"
    settings = [s for s in SETTINGS if not s.startswith(("train.save_every", "train.max_steps"))]
    good = launch(*settings, "train.max_steps=3", "train.save_every=1", f"run.root={runs}", "run.name=diverged")
    assert good.returncode == 0, good.stderr
    bad = launch("resume", str(run), "train.max_steps=9", "optim.lr=1e38")
    assert bad.returncode == 1
    assert "not finite" in bad.stderr or "the loss is nan" in bad.stderr
    assert "optim.lr" in bad.stderr
    assert "Traceback" not in bad.stderr
    assert (run / "checkpoints/step-00000003/manifest.json").is_file()
    assert status(run)["state"] == "failed"
    alerts = [event["text"] for event in read_events(run / "events.jsonl") if event["kind"] == "alert"]
    assert any(re.match("the attempt failed: rank [01]: .*(the loss is nan|not finite)", text) for text in alerts), alerts
    back = launch("resume", str(run), "--step", "3", "optim.lr=3e-5", "train.max_steps=5")
    assert back.returncode == 0, back.stderr
    assert "set aside" in back.stdout
    assert losses(run)[5] < 10.8


def test_what_a_resume_changed_stays_changed(launch: Launch, start: Callable, runs: Path) -> None:
    run = runs / "longer"
    settings = [s for s in SETTINGS if not s.startswith("train.max_steps")]
    assert launch(*settings, "train.max_steps=2", f"run.root={runs}", "run.name=longer").returncode == 0
    with start("resume", str(run), "train.max_steps=100000") as process:
        wait_for("step 4", lambda: last_step(run) >= 4)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)
    stopped_at = status(run)["step"]
    with start("resume", str(run)) as process:
        wait_for("a later step", lambda: last_step(run) > stopped_at)
        assert status(run)["max_steps"] == 100000
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)
    assert process.returncode == 130


def test_the_traceback_of_an_unforeseen_error_is_what_the_user_sees(launch: Launch, runs: Path) -> None:
    done = launch(*SETTINGS, "model.attention=flash_attention_2", f"run.root={runs}", "run.name=unforeseen")
    assert done.returncode == 1
    assert "ImportError: FlashAttention2" in done.stderr
    assert 'modeling_utils.py", line' in done.stderr, "where it was raised"
    assert "rank 0 failed first" in done.stderr or "rank 1 failed first" in done.stderr
    assert "attempts/001/rank-0000" in done.stderr
    assert not processes_of(runs / "unforeseen")


def test_a_refused_run_leaves_no_directory(launch: Launch, runs: Path) -> None:
    for override in ("train.global_batch_size=7", "data.sources=[{path: ./nowhere.jsonl}]", "cluster.nodes=2", "optim.lr=-1"):
        done = launch(*TINY, override, f"run.root={runs}", "run.name=refused")
        assert done.returncode == 2, override
        assert "Traceback" not in done.stderr
    assert not runs.exists()
