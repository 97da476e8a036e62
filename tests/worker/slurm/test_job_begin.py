"""The begin step of a Slurm job: which attempt it starts, and when it starts none."""

from __future__ import annotations

import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hand_made
import pytest
import slurm_said
from fake_slurm import FakeSlurm, Submitted
from hand_made import event_texts

from launcher.clusters import network
from launcher.clusters.slurm import queue
from launcher.plan.retry import Cause
from launcher.runs import atomic_files, journal, run_store
from launcher.runs.journal import AttemptConcluded
from launcher.runs.run_records import Attempt
from launcher.tracking import goodput
from launcher.worker.slurm import job

pytestmark = pytest.mark.rest


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The attempts whose end was reported to W&B."""
    found: list[int] = []
    monkeypatch.setattr(job, "close_wandb_run", lambda plan, plan_path, run, attempt: found.append(attempt))
    return found


def test_the_first_start_claims_the_attempt(submitted: Submitted, fake_slurm: FakeSlurm) -> None:
    of = submitted()
    code, out, err = of.begin()
    assert (code, out) == (0, "1\n")
    assert err == "attempt 1 begins on n1\n"
    claimed = of.attempt()
    assert (claimed.job, claimed.restart, claimed.nodes, claimed.resume_step) == ("41", 0, ("n1",), None)
    assert (claimed.address, claimed.interface, claimed.ends_at) == ("127.0.0.1", "lo", 1795554098.0)
    assert claimed.port
    assert not claimed.automatic
    assert (of.status.state, of.status.attempt, of.status.job) == ("running", 1, {"id": "41", "nodes": ["n1"]})
    assert fake_slurm.told() == []


def test_a_requeue_opens_the_next_attempt_from_the_newest_checkpoint(submitted: Submitted, in_slurm: Callable[..., None]) -> None:
    of = submitted()
    of.saved(20)
    of.saved(40)
    of.ended(1, "preempted", None, 40)
    in_slurm(SLURM_RESTART_COUNT="1")
    assert of.begin()[:2] == (0, "2\n")
    again = of.attempt(2)
    assert (again.resume_step, again.job, again.restart, again.automatic, again.nodes) == (40, "41", 1, True, ("n1",))
    assert stat.S_IMODE(of.run.attempt(2).stat().st_mode) == 0o700
    assert of.status.attempt == 2


def test_an_attempt_that_was_numbered_while_a_checkpoint_was_not_visible_begins_at_it(submitted: Submitted) -> None:
    of = submitted()
    of.ended(1, "preempted")
    run_store.create_attempt(of.run, Attempt(resume_step=None, automatic=True))
    of.saved(40)
    assert of.begin()[:2] == (0, "2\n")
    assert of.attempt(2).resume_step == 40


def test_the_wait_of_a_requeued_job_counts_as_queue_time(submitted: Submitted, in_slurm: Callable[..., None]) -> None:
    of, now, hour = submitted(), time.time(), 3600
    of.ended(1, "preempted", None, 20, submitted_at=now - 7 * hour, begun_at=now - 7 * hour)
    hand_made.end(of.run, **of.exit() | {"ended_at": now - 6 * hour})
    in_slurm(SLURM_RESTART_COUNT="1")
    assert of.begin()[:2] == (0, "2\n")
    found = goodput.read(of.run, time.time())
    assert (found.queue_s, found.restart_s, found.idle_s) == (pytest.approx(6 * hour, abs=60), 0, 0)
    assert found.held_s == pytest.approx(hour, abs=60)


def test_a_start_after_lost_machines_records_the_end_of_the_previous_attempt(
    submitted: Submitted, in_slurm: Callable[..., None]
) -> None:
    of = submitted()
    of.begun()
    of.node(1)
    of.saved(20)
    in_slurm(SLURM_RESTART_COUNT="1")
    assert of.begin()[:2] == (0, "2\n")
    expected = AttemptConcluded(state="failed", message="no record from n1, n3", cause=Cause.INFRASTRUCTURE, saved_step=20)
    assert journal.read_end(of.run, 1) == expected
    assert event_texts(of.run) == ["the attempt ended (infrastructure): no record from n1, n3; runs again"]
    assert of.attempt(2).resume_step == 20


LOST_N3 = "n3 was lost (Slurm: node failure); no record from n1"
REQUEUED = "the job was requeued at step 0 without saving"


@pytest.mark.parametrize("accounted", ["", "REQUEUED", "NODE_FAIL"])
@pytest.mark.parametrize(
    ("third", "is_lost"),
    [
        ({}, False),
        ({"state": "DOWN+NOT_RESPONDING"}, True),
        ({"state": "IDLE*"}, True),
        ({"state": "IDLE+DRAIN"}, False),
        ({"booted": 4_000_000_000}, True),
    ],
)
def test_an_operators_requeue_is_told_apart_from_a_lost_node_without_accounting_too(
    submitted: Submitted,
    in_slurm: Callable[..., None],
    fake_slurm: FakeSlurm,
    accounted: str,
    third: dict[str, Any],
    is_lost: bool,
) -> None:
    of = submitted()
    of.begun(begun_at=time.time())
    of.node(1)
    lines = [slurm_said.node("n1", "10.0.0.1"), slurm_said.node("n2", "10.0.0.2"), slurm_said.node("n3", "10.0.0.3", **third)]
    fake_slurm.answer("scontrol", "--oneliner", "show", "node", "n1,n2,n3", out="".join(lines))
    if accounted:
        fake_slurm.answer("sacct", out=f"2026-11-28T12:00:00|{accounted}\n2026-11-28T12:09:00|RUNNING\n")
    else:
        fake_slurm.refuse("sacct", said="sacct: error: Slurm accounting storage is disabled")
    in_slurm(SLURM_RESTART_COUNT="1")
    assert of.begin()[:2] == (0, "2\n")
    cause, message = ("infrastructure", LOST_N3) if is_lost else ("preempted", REQUEUED)
    if accounted == "NODE_FAIL" and not is_lost:
        # The lost node is back, so nothing shows which one it was.
        cause, message = "infrastructure", "no record from n1, n3"
    assert (of.exit()["cause"], of.exit()["message"]) == (cause, message)
    assert event_texts(of.run) == [f"the attempt ended ({cause}): {message}; runs again"]


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED"])
def test_a_job_does_not_start_a_run_that_another_job_runs(submitted: Submitted, fake_slurm: FakeSlurm, state: str) -> None:
    of = submitted()
    of.begun(job="40")
    before = of.attempt(), of.status
    fake_slurm.answer("squeue", out=slurm_said.squeue("40", state))
    code, out, err = of.begin()
    assert (code, out) == (0, "\n")
    assert err == "job 40 runs tried already; this job does not run it\n"
    assert (of.attempt(), of.status) == before
    assert run_store.newest_attempt(of.run) == 1


def test_a_job_fails_where_slurm_does_not_say_whether_another_job_runs_the_run(
    submitted: Submitted, fake_slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_BEGIN_PATIENCE_S", 3.0)
    of = submitted()
    of.begun(job="40")
    before = of.attempt(), of.status
    fake_slurm.refuse("squeue", said=slurm_said.UNREACHABLE)
    code, out, err = of.begin()
    assert (code, out) == (1, "")
    assert err.startswith("Slurm did not answer whether job 40 still runs tried: squeue got no answer from Slurm\n")
    assert len(fake_slurm.calls) > 2
    assert (of.attempt(), of.status) == before


def test_the_job_waits_for_a_restarting_controller(submitted: Submitted, fake_slurm: FakeSlurm) -> None:
    of = submitted()
    of.begun(job="40")
    fake_slurm.answer("squeue", out=slurm_said.squeue("40", "RUNNING"))
    fake_slurm.refuse("squeue", said=slurm_said.UNREACHABLE, times=2)
    code, out, err = of.begin()
    assert (code, out, err) == (0, "\n", "job 40 runs tried already; this job does not run it\n")
    fake_slurm.answer("squeue", out=slurm_said.squeue("40", "COMPLETED"))
    fake_slurm.refuse("scontrol", "show", "job", "41", said=slurm_said.UNREACHABLE, times=2)
    assert of.begin()[:2] == (0, "2\n")
    assert of.attempt(2).ends_at == 1795554098.0


def test_only_the_number_is_printed(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    of = submitted()
    addresses = network.node_addresses

    def talkative(*argv: Any) -> dict[str, str]:
        print("a library's greeting")
        return addresses(*argv)

    monkeypatch.setattr(network, "node_addresses", talkative)
    code, out, err = of.begin()
    assert (code, out) == (0, "1\n")
    assert "a library's greeting\n" in err


@pytest.mark.parametrize("known", ["PENDING", "COMPLETED", "another's", "accounted", "unknown"])
def test_a_job_starts_a_run_whose_previous_job_has_ended(submitted: Submitted, fake_slurm: FakeSlurm, known: str) -> None:
    of = submitted()
    of.ended(1, "preempted", job="40")
    fake_slurm.answer("sacct", out=slurm_said.sacct("40", "FAILED") if known == "accounted" else "")
    if known in ("accounted", "unknown"):
        fake_slurm.refuse("squeue", said=slurm_said.UNKNOWN_JOB)
    else:
        name = "not tried" if known == "another's" else "tried"
        fake_slurm.answer("squeue", out=slurm_said.squeue("40", "RUNNING" if known == "another's" else known, name))
    assert of.begin()[:2] == (0, "2\n")
    assert of.attempt(2).job == "41"


@pytest.mark.parametrize("cause", ["completed", "cancelled", "limit"])
def test_a_finished_run_is_not_started_again(submitted: Submitted, cause: str, in_slurm: Callable[..., None]) -> None:
    of = submitted()
    of.begun()
    # The result is the same whether the job was killed before its conclusion or not.
    of.outcome(cause)
    in_slurm(SLURM_RESTART_COUNT="1")
    for _ in range(2):
        code, out, err = of.begin()
        assert (code, out, err) == (0, "\n", f"tried is {cause}; there is nothing left to do\n")
        assert of.exit()["cause"] == cause
    assert run_store.newest_attempt(of.run) == 1


def test_a_spent_budget_refuses_the_next_start(submitted: Submitted, in_slurm: Callable[..., None], told: list[int]) -> None:
    of = submitted(max_failures=1)
    of.ended(1, "failure", None, 20)
    of.ended(2, "failure", 20, 20, automatic=True)
    in_slurm(SLURM_RESTART_COUNT="2")
    code, out, err = of.begin()
    reason = "failure it was; cluster.max_failures=1 is used up"
    assert (code, out) == (1, "")
    assert err.startswith(reason)
    assert (of.status.state, of.status.message) == ("failed", reason)
    assert run_store.newest_attempt(of.run) == 2
    assert event_texts(of.run) == [f"the run ends: {reason}"]
    assert told == [2], "W&B hears of it"


@pytest.mark.parametrize("numbered", [False, True])
def test_a_reached_limit_ends_the_run_before_the_model_loads(
    submitted: Submitted, in_slurm: Callable[..., None], told: list[int], numbered: bool
) -> None:
    """The limit also applies if the attempt was numbered before its job waited in the queue."""
    of = submitted()
    plan = run_store.load_plan(of.run)
    settings = plan.config.run.model_copy(update={"max_hours": 2.0})
    limits = plan.limits.model_copy(update={"max_seconds": 7200.0})
    limited = plan.model_copy(update={"limits": limits, "config": plan.config.model_copy(update={"run": settings})})
    atomic_files.write_text(of.run.plan, limited.to_json())
    now = time.time()
    of.ended(1, "preempted", None, 20, submitted_at=now - 7300, begun_at=now - 7250)
    hand_made.end(of.run, **of.exit() | {"ended_at": now - 40})
    if numbered:
        run_store.create_attempt(of.run, Attempt(20, automatic=True))
    in_slurm(SLURM_RESTART_COUNT="1")
    code, out, err = of.begin()
    assert (code, out, err) == (0, "\n", "tried: run.max_hours=2 is reached; the attempt is not started\n")
    assert (of.status.state, of.status.message) == ("preempted", "run.max_hours=2 is reached")
    assert event_texts(of.run) == ["the run ends: run.max_hours=2 is reached"]
    assert told == [1 + numbered]
    assert run_store.newest_attempt(of.run) == 1 + numbered
    hand_made.end(of.run, **of.exit() | {"ended_at": now - 100})
    assert of.begin()[:2] == (0, "2\n")


def test_a_resume_by_a_person_resets_the_budgets(submitted: Submitted, in_slurm: Callable[..., None]) -> None:
    of = submitted(max_failures=1)
    of.ended(1, "failure", None, 20)
    of.ended(2, "failure", 20, 40, automatic=False)
    in_slurm(SLURM_RESTART_COUNT="1")
    assert of.begin()[:2] == (0, "3\n")


def test_a_public_master_address_is_refused(
    submitted: Submitted,
    fake_slurm: FakeSlurm,
    in_slurm: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    told: list[int],
) -> None:
    of = submitted()
    in_slurm(SLURM_JOB_NODELIST="n[1-2]")
    fake_slurm.answer("scontrol", "show", "hostnames", "n[1-2]", out="n1\nn2\n")
    described = slurm_said.node("n1", "10.0.0.1") + slurm_said.node("n2", "10.0.0.2")
    fake_slurm.answer("scontrol", "--oneliner", "show", "node", "n[1-2]", out=described)
    monkeypatch.setattr(network, "own_endpoint", lambda peers, interface: network.Endpoint("8.8.8.8", "eth7"))
    before = of.attempt()
    code, out, err = of.begin()
    assert (code, out) == (1, "")
    assert err.startswith("the nodes would connect to each other over a public address\n")
    assert "value:  8.8.8.8" in err
    assert "cluster.interface" in err
    assert of.attempt() == before
    assert of.status.state == "failed"
    assert "over a public address; set cluster.interface" in of.status.message
    assert event_texts(of.run) == [f"the run ends: {of.status.message}"]
    assert told == [1]


def test_a_single_node_meets_on_loopback_whatever_its_interface(submitted: Submitted) -> None:
    of = submitted(interface="eth7")
    assert of.begin()[0] == 0
    assert (of.attempt().address, of.attempt().interface) == ("127.0.0.1", "lo")


def test_two_starts_at_once_do_not_open_two_attempts(submitted: Submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    of = submitted()
    monkeypatch.setattr(job, "_LOCK_WAIT_S", 0.1)
    with run_store.start_lock(of.run):
        code, out, err = of.begin()
    assert (code, out) == (1, "")
    assert "another command is starting this run" in err
    assert of.attempt().job is None


def test_nothing_is_written_where_the_run_directory_was_moved_from(
    fake_slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    moved = tmp_path / "moved"
    assert job.main(["begin", str(moved / "plan.json")]) == 1
    assert "the run directory has been moved or removed" in capsys.readouterr().err
    assert not moved.exists()


def test_the_accounting_tells_how_an_earlier_start_of_the_job_ended(fake_slurm: FakeSlurm) -> None:
    fake_slurm.answer("sacct", out="2026-11-28T12:00:00|NODE_FAIL\n2026-11-28T12:05:00|REQUEUED\n2026-11-28T12:09:00|RUNNING\n")
    assert [queue.state_of_start("41", number) for number in (0, 1, 2, 3)] == ["NODE_FAIL", "REQUEUED", "RUNNING", ""]
    fake_slurm.refuse("sacct", said="sacct: error: Slurm accounting storage is disabled")
    assert queue.state_of_start("41", 0) == ""
