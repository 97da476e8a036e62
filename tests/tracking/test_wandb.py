"""Real W&B: offline files, read back with W&B's own reader.

Real wandb-core with a local server: the data of a run that completes, is killed, or is stopped.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from fake_wandb import ENTITY, KEY, FakeWandb, fake_wandb, history, records
from forked import preloaded
from pace import slowness, wait_for
from plan_fixtures import PlanOf
from rank_tools import IMPORTED, QUICK_S, alerts, has_steps, infos, rank, wait_for_another_second

from launcher.plan.run_dir import RunDir
from launcher.runs import run_records, run_store
from launcher.tracking.jsonl import SUPERSEDED, read_events
from launcher.tracking.tracker import start_trackers
from launcher.tracking.wandb.tracker import is_online, redact_data, step_offsets

REPO = Path(__file__).resolve().parents[2]
CANARY = "canary-5f1c0ffee5f1c0ffee"
# A minimal rank: it starts the trackers, logs two steps and ends. With `hang`, W&B's process is suspended before the end. A
# tracker reports that W&B has started with its next call.
TRAIN = """
run_dir = sys.argv[2]
trackers = start_trackers(LaunchPlan.load(sys.argv[1]), run_dir, 1, int)
trackers.log(1, {"train/loss": 2.0})
trackers.log(2, {"train/loss": 1.0})
if "hang" in globals():
    while not times_begun(Path(run_dir)):
        trackers.event("note", "still here")
        time.sleep(0.05)
    (core,) = [child for child in psutil.Process().children() if child.name().startswith("wandb-core")]
    assert core.environ()["GOMAXPROCS"] == "1", "it takes a quarter more of the processors without"
    os.kill(core.pid, signal.SIGSTOP)
trackers.finish("completed")
"""
IMPORTS = """
import os, signal, sys, time
from pathlib import Path
import psutil
from rank_tools import times_begun
from launcher.runs import run_store
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.tracking.wandb import tracker as module
from launcher.tracking.tracker import start_trackers
"""


def no_stop() -> None:
    """The Stop button is never pressed."""


def run_script(code: str, plan_file: Path, run_dir: Path, forked: bool = True) -> int:
    """Run code in a process with its own W&B process; return the exit code, -9 if it did not end."""
    environ = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environ["PYTHONPATH"] = os.pathsep.join([str(REPO), str(REPO / "tests"), str(REPO / "tests/tracking")])
    arguments = [IMPORTS + code, str(plan_file), str(run_dir)]
    # Use a file: a process left behind would keep a pipe open.
    with open(run_dir.parent / "output", "w") as output:
        if forked:
            streams: dict[str, Any] = {"stdout": output.fileno(), "stderr": output.fileno(), "env": environ}
            process: Any = preloaded(*IMPORTED).popen("-c", *arguments, **streams)
        else:
            process = subprocess.Popen([sys.executable, "-c", *arguments], stdout=output, stderr=output, env=environ)
        try:
            return process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            return process.wait(timeout=10)


def test_an_offline_run_reports_the_upload_command(make_plan: PlanOf, run_dir: Path) -> None:
    trackers = start_trackers(make_plan(), run_dir, attempt=1, on_stop=no_stop)
    trackers.finish("failed")
    (folder,) = run_dir.glob("wandb/offline-run-*-abcd1234")
    events = read_events(run_dir / "events.jsonl")
    last = [event for event in events if event["fields"].get("sync_command")][-1]
    assert last["fields"]["sync_command"] == f"wandb sync --include-online {folder}"
    assert not any("wandb sync" in event["text"] for event in events)
    assert [record["exit"]["exit_code"] for record in records(run_dir) if record["type"] == "exit"] == [1]


def test_the_next_attempt_continues_the_same_run(make_plan: PlanOf, run_dir: Path) -> None:
    for attempt, steps in ((1, (1, 2)), (2, (2, 3, 4))):
        trackers = start_trackers(make_plan(), run_dir, attempt=1, on_stop=no_stop)
        for step in steps:
            trackers.log(step, {"train/loss": float(step)})
        trackers.finish("completed" if attempt == 2 else "preempted")
        wait_for_another_second(run_dir)
    runs = [record["run"] for record in records(run_dir) if record["type"] == "run"]
    assert [(run["run_id"], run.get("resume")) for run in runs] == [("abcd1234", True)] * 2
    assert [item["_step"] for item in history(run_dir)] == [1, 2, 3, 4]
    assert sum(record["type"] == "preempting" for record in records(run_dir)) == 1
    command = [event["fields"].get("sync_command") for event in read_events(run_dir / "events.jsonl")][-2]
    assert command.split() == ["wandb", "sync", "--include-online", *map(str, sorted(run_dir.glob("wandb/offline-run-*")))]
    assert len(command.split()) == 5


def test_no_secret_of_the_environment_is_in_the_run_directory(
    make_plan: PlanOf, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CANARY_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "SLURM_JWT"):
        monkeypatch.setenv(name, CANARY)
    plan = make_plan()
    plan_file = run_dir.parent / "plan.json"
    plan_file.write_text(plan.model_copy(update={"deepspeed": {"url": f"https://me:{CANARY}@host/x", "key": CANARY}}).to_json())
    assert run_script(TRAIN, plan_file, run_dir) == 0
    files = [file for file in run_dir.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert [str(file) for file in files if CANARY.encode() in file.read_bytes()] == []


def test_only_secrets_are_redacted() -> None:
    value = {"a": ["token is sekret-value", "git@host:x"], "num_tokens": 3, "url": "s3://user:pw@bucket/x", "home": "/home/me"}
    environ = {"MY_API_KEY": "sekret-value", "HOME": "/home/me", "SHORT_KEY": "host"}
    assert redact_data(value, environ) == {
        "a": ["token is <redacted>", "git@host:x"],
        "num_tokens": 3,
        "url": "s3://<redacted>@bucket/x",
        "home": "/home/me",
    }


def test_a_login_makes_auto_online(make_plan: PlanOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    # W&B reads the environment only once.
    wandb.teardown()
    assert not is_online("auto")
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9 login user password {'a' * 40}\n")
    assert is_online("auto")
    (tmp_path / "netrc").write_text("machine 127.0.0.1:9 login user password no-key\n")
    assert not is_online("auto")


@pytest.mark.rest
def test_a_hung_wandb_is_reported_and_the_process_exits(make_plan: PlanOf, run_dir: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(make_plan().to_json())
    hang = "module.FINISH_TIMEOUT_S, module.FINISH_GRACE_S = 1.0, 1.0\nhang = True" + TRAIN
    started = time.monotonic()
    # The interpreter's exit is what may hang.
    run_script(hang, plan_file, run_dir, forked=False)
    assert time.monotonic() - started < 30
    alerts = [event for event in read_events(run_dir / "events.jsonl") if event["kind"] == "alert"]
    assert len(alerts) == 1
    # W&B's files lack the data that was in transit to the suspended process.
    assert "metrics.jsonl has all data" in alerts[0]["text"]


def test_a_superseded_attempt_does_not_finish_the_wandb_run(make_plan: PlanOf, run_dir: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    plan_file.write_text(make_plan().to_json())
    begun = 'while not times_begun(Path(run_dir)):\n    trackers.event("note", "still here")\n    time.sleep(0.05)\n'
    started = time.monotonic()
    assert (
        run_script(
            TRAIN.replace("trackers.finish", f"{begun}trackers.finish").replace("completed", SUPERSEDED), plan_file, run_dir
        )
        == 0
    )
    assert time.monotonic() - started < 30
    assert {record["type"] for record in records(run_dir)}.isdisjoint({"exit"})
    assert [event for event in read_events(run_dir / "events.jsonl") if event["kind"] in ("end", "alert")] == []


@pytest.mark.rest
def test_steps_repeated_after_a_resume_are_shown_beside_the_earlier_ones(make_plan: PlanOf, run_dir: Path) -> None:
    """This also holds in the next attempt, after a crash."""
    run, plan = RunDir(run_dir), make_plan()
    run.plan.write_text(plan.to_json())
    for attempt, back, (first, last) in ((1, None, (1, 6)), (2, 3, (4, 8)), (3, 6, (7, 9))):
        run.attempt(attempt).mkdir(exist_ok=True)
        run_store.write_attempt(run, attempt, run_records.Attempt(back, automatic=attempt == 3))
        trackers = start_trackers(plan, run_dir, attempt, on_stop=no_stop)
        for step in range(first, last + 1):
            trackers.log(step, {"train/loss": float(attempt)})
        trackers.finish("completed" if attempt == 3 else "failed")
        wait_for_another_second(run_dir)
    shown = [(item["_step"], item["trainer/step"], item["train/loss"]) for item in history(run_dir)]
    before = [(step, step, 1) for step in range(1, 7)]
    after = [(step + 3, step, 2) for step in range(4, 8)]
    # The next attempt sends the last row of a failed one.
    assert shown == [*before, *after, (11, 8, 3), (12, 9, 3)]


def test_steps_after_each_resume_come_after_all_earlier_steps(run_dir: Path) -> None:
    run = RunDir(run_dir)
    # Attempt 3 is the launcher's own; attempt 5 continues from the newest step.
    resumes = {2: (4, False), 3: (5, True), 4: (2, False), 5: (6, False)}
    for number, (step, automatic) in resumes.items():
        run.attempt(number).mkdir()
        run_store.write_attempt(run, number, run_records.Attempt(step, automatic=automatic))
    assert step_offsets(run, {1: 9, 2: 6, 3: 7, 4: 6}) == {1: 0, 2: 5, 3: 5, 4: 10, 5: 10}


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with fake_wandb() as running:
        yield running
        assert not running.unknown
        assert not [request for request in running.received if KEY in request], "the key stands in no body"


@pytest.mark.rest
def test_all_metrics_alerts_and_the_summary_arrive(make_plan: PlanOf, server: FakeWandb) -> None:
    plan = make_plan(project="demo", entity=ENTITY, group="sweep", tags=["tagged"])
    with rank(plan, base_url=server.address, imports=True, sends_at_once=False) as it:
        it.start()
        it.steps(1, 2)
        it.log(2, {"eval/held_out/loss": 1.5})
        it.event("alert", "the loss jumped", 2)
        it.steps(3, 3)
        it.summary({"last_step": 3})
        it.finish("completed")
        assert it.slowest_s < QUICK_S * slowness()
    run = server.run()
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in run.rows()]
    assert rows == [
        {"trainer/step": 1, "train/loss": 9.99, "trainer/tokens": 100},
        {"trainer/step": 2, "train/loss": 9.98, "trainer/tokens": 200, "eval/held_out/loss": 1.5},
        {"trainer/step": 3, "train/loss": 9.97, "trainer/tokens": 300},
    ]
    assert run.steps == [1, 2, 3]
    assert run.exits == [0]
    assert (run.project, run.about["groupName"], run.about["tags"]) == ("demo", "sweep", ["tagged"])
    wanted = {"best/train_loss": 9.97, "best/train_loss_step": 3, "best/eval_loss": 1.5, "best/eval_loss_step": 2}
    assert wanted.items() <= run.summary.items()
    assert {"last_step": 3, "train/loss": 9.97, "eval/held_out/loss": 1.5, "state": "completed"}.items() <= run.summary.items()
    config = {name: value["value"] for name, value in run.config.items()}
    assert config["config"]["train"]["max_steps"] == 40
    assert config["plan_digest"] == plan.digest()
    assert config["provenance"]["launcher_version"] == plan.provenance.launcher_version
    assert [(alert["title"], alert["text"], alert["severity"]) for alert in server.alerts] == [
        ("demo-run at step 2: the loss jumped", "the loss jumped", "WARN")
    ]
    assert alerts(plan) == ["the loss jumped"]
    assert any(f"see it at {server.address}/team/demo/runs/abcd1234" in text for text in infos(plan))


@pytest.mark.rest
@pytest.mark.parametrize("reached", [False, True], ids=["W&B is behind the checkpoint", "W&B is ahead of it"])
def test_after_a_crash_each_step_is_there_once(make_plan: PlanOf, server: FakeWandb, reached: bool) -> None:
    plan, first = make_plan(), 1
    if not reached:
        with rank(plan, base_url=server.address) as it:
            it.start_and_wait()
            it.steps(1, 3)
            # W&B has every row except the last.
            it.finish("failed")
        first = 3
    with rank(plan, attempt=first, automatic=first > 1, base_url=server.address, sends_at_once=reached) as it:
        it.start_and_wait()
        it.steps(first, 3)
        it.log(3, {"eval/held_out/loss": 1.0})
        it.steps(4, 12)
        if reached:
            # W&B sends collected rows after 15 s.
            wait_for("W&B to have nearly all steps", has_steps(server, 11))
        # Kill wandb-core with its unsent data, as when the machine dies.
        os.kill(it.core()["answer"], signal.SIGKILL)
        it.kill()
    assert max(server.run().steps) >= 11 if reached else max(server.run().steps) < 8
    with rank(plan, attempt=4, automatic=True, base_url=server.address) as it:
        assert it.start()["seconds"] < 1, "nobody waits for W&B at a restart"
        # The newest checkpoint was of step 8.
        it.steps(9, 14)
        it.finish("completed")
    assert server.run().steps == list(range(1, 15))
    assert [row["train/loss"] for row in server.run().rows()] == [10.0 - step / 100 for step in range(1, 15)]
    assert {"best/eval_loss": 1.0, "best/train_loss_step": 14}.items() <= server.run().summary.items()
    assert server.run().exits == ([0] if reached else [1, 0])
    assert not alerts(plan)


def test_simultaneous_alerts_are_all_sent(make_plan: PlanOf, server: FakeWandb) -> None:
    """W&B shortens titles, so alerts with the same title must be sent too."""
    texts = ["attempt 1 ended (failure): what it said", "the checkpoint of step 9 is damaged", *(f"{'w' * 60} {i}" for i in "12")]
    with rank(make_plan(), base_url=server.address) as it:
        it.start_and_wait()
        for text in texts:
            it.event("alert", text)
            # The shortest waitDuration in W&B is one millisecond.
            time.sleep(0.05)
        it.finish("completed")
    assert sorted(alert["text"] for alert in server.alerts) == sorted(texts)
    titles = {alert["title"] for alert in server.alerts}
    assert len(titles) == 3
    assert "demo-run: attempt 1 ended (failure)" in titles
    assert max(map(len, titles)) == 63
