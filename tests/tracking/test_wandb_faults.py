"""When W&B fails, training continues at full speed, one alert is sent, and the missing data can be uploaded."""

from __future__ import annotations

import os
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from forked import preloaded
from pace import slowness, wait_for
from rank_tools import AT_ONCE, IMPORTED, QUICK_S, Rank, alerts, infos, rank, wait_for_another_second
from wandb_files import history
from wandb_server import KEY, FakeWandb, fake_wandb

from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking.jsonl import read_events, read_metrics
from launcher.tracking.wandb import core_process, session, tracker

pytestmark = pytest.mark.rest

PlanMaker = Callable[..., LaunchPlan]
# For a server that fails after it has accepted the run, and for one that does not answer from the start.
SHORT = {"FINISH_TIMEOUT_S": 2.0, "FINISH_GRACE_S": 1.0, "RETRY_S": 0.3}
LIMITS = {**SHORT, "INIT_TIMEOUT_S": 1.0, "FINISH_TIMEOUT_S": 10.0, "FINISH_GRACE_S": 4.0}
LONGEST_FINISH_S = 25


@pytest.fixture
def server() -> Iterator[FakeWandb]:
    with fake_wandb() as running:
        yield running


def upload(run_dir: Path, server: FakeWandb) -> None:
    """Run the upload command that the run printed, as a user does once the server works again."""
    told = [
        event["fields"]["sync_command"] for event in read_events(run_dir / "events.jsonl") if event["fields"].get("sync_command")
    ]
    program, *arguments = shlex.split(told[-1])
    assert program == "wandb"
    environ = {**os.environ, **AT_ONCE, "WANDB_BASE_URL": server.address, "WANDB_API_KEY": KEY}
    done = preloaded(*IMPORTED).run("wandb", *arguments, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr


def kill_core(it: Rank) -> None:
    """Kill W&B's process and wait for its end: until then it may take data that it never writes."""
    core = psutil.Process(it.core()["answer"])
    core.kill()
    wait_for("W&B's process to end", lambda: not core.is_running() or core.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("fault", ["error", "hang", "refuse"])
def test_a_server_that_fails_in_the_middle(make_plan: PlanMaker, server: FakeWandb, run_dir: Path, fault: str) -> None:
    plan = make_plan()
    with rank(plan, base_url=server.address) as it:
        it.limits(**SHORT)
        it.start_and_wait()
        it.steps(1, 3)
        it.event("checkpoint", "saved", 3, path=str(run_dir), saved_step=3, eval_loss=None)
        server.fault = fault
        it.steps(4, 60)
        it.event("checkpoint", "saved", 60, path=str(run_dir), saved_step=60, eval_loss=None)
        it.steps(61, 62)
        assert it.slowest_s < QUICK_S * slowness()
        assert it.finish("completed")["seconds"] < LONGEST_FINISH_S * slowness()
    assert len(alerts(plan)) == 1
    # If the process had to be killed, it may not have written everything.
    words = "metrics.jsonl has all data; upload what W&B's files contain" if fault == "hang" else "the data is on disk; upload it"
    assert any(f"{words} with the command that `status` shows" in text for text in alerts(plan) + infos(plan))
    assert len(read_metrics(run_dir / "metrics.jsonl")) == 62
    server.fault = None
    server.freed.set()
    upload(run_dir, server)
    assert server.run().steps == list(range(1, 63))


@pytest.mark.parametrize(("entity", "words"), [(None, "not logged in"), ("taem", "entity taem not found")])
def test_a_server_that_refuses_the_run_at_the_start(
    make_plan: PlanMaker, server: FakeWandb, run_dir: Path, entity: str | None, words: str
) -> None:
    plan = make_plan(entity=entity)
    server.fault = None if entity else "refuse"
    with rank(plan, base_url=server.address) as it:
        it.limits(**LIMITS)
        assert it.start()["seconds"] < QUICK_S * slowness()
        it.steps(1, 20)
        assert it.slowest_s < QUICK_S * slowness()
        it.finish("completed")
    (warning,) = alerts(plan)
    assert re.match(f"this attempt is tracked offline: Weights & Biases cannot start: CommError: .*{words}", warning)
    assert infos(plan)[-1].startswith("Weights & Biases was offline; upload the run with ")
    assert server.runs == {}
    server.fault = None
    if entity is None:
        upload(run_dir, server)
        assert server.run().steps == list(range(1, 21))
    assert [item["_step"] for item in history(run_dir)] == list(range(1, 21))


@pytest.mark.parametrize("fault", ["error", "hang"])
def test_a_server_that_never_answers(make_plan: PlanMaker, server: FakeWandb, run_dir: Path, fault: str) -> None:
    plan, server.fault = make_plan(), fault
    with rank(plan, base_url=server.address) as it:
        it.limits(**LIMITS)
        assert it.start()["seconds"] < QUICK_S * slowness()
        it.steps(1, 20)
        it.event("alert", "the loss jumped", 20)
        assert it.slowest_s < QUICK_S * slowness()
        assert it.finish("completed")["seconds"] < LONGEST_FINISH_S * slowness()
    (warning,) = [text for text in alerts(plan) if text != "the loss jumped"]
    assert "Weights & Biases cannot start" in warning
    server.fault = None
    server.freed.set()
    upload(run_dir, server)
    assert server.run().steps == list(range(1, 21))
    assert server.run().exits == [0]
    assert "the loss jumped" in [alert["text"] for alert in server.alerts]


@pytest.mark.parametrize("trained", [0, 3], ids=["at the start", "in the middle"])
def test_a_server_whose_port_is_closed(make_plan: PlanMaker, server: FakeWandb, run_dir: Path, trained: int) -> None:
    """The files are uploaded to another server, `server`."""
    plan = make_plan()
    with ExitStack() as others:
        gone = others.enter_context(fake_wandb())
        it = others.enter_context(rank(plan, base_url=gone.address))
        it.limits(**SHORT if trained else LIMITS)
        if trained:
            it.start_and_wait()
            it.steps(1, trained)
        gone.close()
        if not trained:
            assert it.start()["seconds"] < QUICK_S * slowness()
        it.steps(trained + 1, 60)
        assert it.slowest_s < QUICK_S * slowness()
        assert it.finish("completed")["seconds"] < LONGEST_FINISH_S * slowness()
    assert len(alerts(plan)) == 1
    assert any("Weights & Biases does not have all data" in text for text in alerts(plan) + infos(plan))
    upload(run_dir, server)
    assert server.run().steps == list(range(1, 61))
    assert server.run().exits == [0]


def test_a_server_that_returns_gets_all_data(make_plan: PlanMaker, server: FakeWandb) -> None:
    plan, server.fault = make_plan(), "error"
    with rank(plan, base_url=server.address) as it:
        it.limits(**{**LIMITS, "FINISH_TIMEOUT_S": 30.0})
        it.start()
        it.steps(1, 20)
        it.event("alert", "the loss jumped", 20)
        wait_for("the warning", lambda: it.event("note", "still here") and len(alerts(plan)) == 2)
        server.fault = None
        trained = count(21)
        wait_for("W&B to have come back", lambda: it.steps(step := next(trained), step) or server.alerts)
        server.fault = "error"
        last = next(trained) + 20
        it.steps(last - 20, last)
        server.fault = None
        it.finish("completed")
    assert server.run().steps == list(range(1, last + 1))
    assert server.run().exits == [0]
    assert len(alerts(plan)) == 2


def test_a_row_is_complete_if_wandb_returns_within_its_step(make_plan: PlanMaker, server: FakeWandb) -> None:
    plan, server.fault = make_plan(), "error"
    with rank(plan, base_url=server.address) as it:
        it.limits(**LIMITS)
        it.start()
        it.steps(1, 5)
        wait_for("the warning", lambda: it.event("note", "still here") and alerts(plan))
        server.fault = None
        it.limits(INIT_TIMEOUT_S=30.0, FINISH_TIMEOUT_S=30.0, FINISH_GRACE_S=10.0)
        time.sleep(LIMITS["RETRY_S"])
        it.log(5, {"eval/held_out/loss": 1.0})
        it.steps(6, 6)
        it.finish("completed")
    assert server.run().steps == [1, 2, 3, 4, 5, 6]
    assert server.run().rows()[4].items() >= {"train/loss": 9.95, "eval/held_out/loss": 1.0}.items()


@pytest.mark.parametrize("online", [True, False], ids=["online", "offline"])
def test_a_killed_wandb_process_is_restarted(make_plan: PlanMaker, server: FakeWandb, run_dir: Path, online: bool) -> None:
    plan = make_plan()
    with rank(plan, key=KEY if online else None, base_url=server.address) as it:
        it.limits(FINISH_TIMEOUT_S=30.0, RETRY_S=0.1)
        it.start_and_wait()
        it.steps(1, 9)
        if not online:
            files = run_dir.glob("wandb/offline-run-*/*.wandb")
            first = next(files)
            size = first.stat().st_size
            wait_for("W&B to have written", lambda: first.stat().st_size > size)
        kill_core(it)
        it.steps(10, 14)
        wait_for("the alert", lambda: it.event("note", "still here") and alerts(plan))
        it.steps(15, 19)
        assert it.slowest_s < QUICK_S * slowness()
        if online:
            # No later step shows that the process has ended, only the end of the run does.
            wait_for("the server to have all rows but the last", lambda: server.run().steps[-1:] == [18])
            kill_core(it)
        it.finish("completed")
    (warning,) = alerts(plan)
    assert "W&B's process failed" in warning
    if not online:
        upload(run_dir, server)
    assert server.run().steps == list(range(1, 20))
    assert server.run().exits[-1:] == [0]


def test_the_exit_code_of_wandbs_process_ends_no_thread_without_a_message(
    make_plan: PlanMaker, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Depending on timing, wandb.teardown() raises SystemExit for a killed process, or an error of the connection."""
    raised = iter([SystemExit(-9), ConnectionResetError(), SystemExit(-9), SystemExit(-9)])

    def teardown(*_: object, **__: int) -> None:
        raise next(raised)

    monkeypatch.setattr("wandb.teardown", teardown)
    core_process.leave()
    core_process.leave()
    ended = object.__new__(session.Session)
    ended._lowest, ended._run = session.LowestValues(), SimpleNamespace(summary={}, finish=lambda **_: None)
    with pytest.raises(RuntimeError, match="W&B's process ended with exit code -9"):
        ended.finish("completed")
    monkeypatch.setattr(tracker.WandbTracker, "_serve", teardown)
    notes: list[str] = []
    tracking = tracker.WandbTracker(
        make_plan(mode="offline"), run_dir, send_event=lambda _, text, **__: notes.append(text), on_stop=lambda: None
    )
    tracking.finish("completed")
    assert notes[0] == "W&B tracking failed and is off for this attempt: SystemExit: -9"
    assert next(raised, None) is None


def test_a_child_that_ends_during_the_search_for_wandbs_process_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers, for example, are short-lived children of a rank. An error would end tracking for the rest of the attempt."""

    def name() -> str:
        raise psutil.NoSuchProcess(1)

    child = SimpleNamespace(is_running=lambda: True, status=lambda: psutil.STATUS_RUNNING, name=name)
    monkeypatch.setattr(psutil.Process, "children", lambda _: [child])
    assert core_process.running() == []


def test_a_wandb_process_that_always_ends_is_not_restarted_without_pause(
    make_plan: PlanMaker, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example, the system kills it for lack of memory. Every start takes a second of CPU time from the ranks."""
    num_starts = count()

    class Failing:
        offline, url = True, None

        def __init__(self, *_: object, **__: object) -> None:
            next(num_starts)

        def require_core(self) -> None:
            raise RuntimeError("process 1 has ended")

    monkeypatch.setattr(tracker, "Session", Failing)
    monkeypatch.setattr(tracker, "_kill_core", lambda: None)
    monkeypatch.setattr(core_process, "leave", lambda: None)
    notes: list[str] = []
    tracking = tracker.WandbTracker(
        make_plan(mode="offline"), run_dir, send_event=lambda _, text, **__: notes.append(text), on_stop=lambda: None
    )
    for text in ("first", "second", "third"):
        tracking.event("alert", text, 1)
    tracking.finish("completed")
    # One more at the end, when files are written.
    assert next(num_starts) == tracker._MAX_FAILURES + 1
    assert len(tracking._kept) == 3 + 2, "no call is lost: the alerts, the missing steps and the end"
    assert len([note for note in notes if "the launcher restarts it" in note]) == 1


def test_offline_attempts_are_uploaded_as_one_run(make_plan: PlanMaker, server: FakeWandb, run_dir: Path) -> None:
    plan = make_plan()
    for attempt, first, last in ((1, 1, 6), (2, 5, 9)):
        with rank(plan, attempt, automatic=attempt > 1, key=None, base_url=server.address) as it:
            it.start()
            it.steps(first, last)
            it.finish("failed" if attempt == 1 else "completed")
        wait_for_another_second(run_dir)
    upload(run_dir, server)
    assert server.run().steps == list(range(1, 10))


def test_an_online_attempt_sends_the_steps_of_an_offline_one(make_plan: PlanMaker, server: FakeWandb, run_dir: Path) -> None:
    plan = make_plan()
    for attempt, first, last, key in ((1, 1, 6, None), (2, 5, 9, KEY), (3, 8, 12, None)):
        with rank(plan, attempt, automatic=attempt > 1, key=key, base_url=server.address) as it:
            it.start()
            it.steps(first, last)
            it.finish("completed" if attempt == 3 else "preempted")
        if attempt == 2:
            assert server.run().steps == list(range(1, 10))
        wait_for_another_second(run_dir)
    upload(run_dir, server)
    assert server.run().steps == list(range(1, 13))


def test_a_stopped_wandb_process_is_an_alert_while_training_continues(make_plan: PlanMaker, server: FakeWandb) -> None:
    plan = make_plan()
    with rank(plan, key=None, base_url=server.address) as it:
        it.limits(LATE_CALL_S=0.5)
        it.start_and_wait()
        it.steps(1, 2)
        os.kill(it.core()["answer"], signal.SIGSTOP)
        # The buffer between the processes fills up after a few hundred steps.
        many = {f"m/{i}": float(i) for i in range(500)}
        steps = iter(range(3, 100_000))
        wait_for("the alert", lambda: it.log(next(steps), many) and alerts(plan), 30)
        assert it.slowest_s < QUICK_S * slowness()
    assert alerts(plan)[0].startswith("W&B is behind: its process is ")


def test_the_end_waits_longer_for_an_export(make_plan: PlanMaker, server: FakeWandb, run_dir: Path) -> None:
    plan, server.upload_s = make_plan(log_export=True), 2.5
    (run_dir / "export").mkdir()
    (run_dir / "export" / "model.safetensors").write_bytes(b"weights")
    with rank(plan, base_url=server.address) as it:
        it.limits(FINISH_GRACE_S=0.5, EXPORT_GRACE_S=40.0)
        it.start()
        it.steps(1, 2)
        it.event("export", "written", path=str(run_dir / "export"))
        it.finish("completed")
    assert server.uploads["model.safetensors"] == b"weights"
    assert server.artifacts[0]["committed"]
    assert server.run().exits == [0]
    assert not alerts(plan)
    assert any("the run waits for it at its end for up to 1 minutes" in text for text in infos(plan))
