"""Why an attempt ended, judged from the files that its nodes and its job left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hand_made
import pytest

from launcher.clusters.check_results import NO_ROOM
from launcher.errors import Problem
from launcher.plan.retry import Cause
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, journal
from launcher.runs.journal import AttemptState, FailureRecord, NodeEnded, TrainingEnded
from launcher.runs.run_records import Attempt
from launcher.worker import postmortem
from launcher.worker.postmortem import RULES, Ending, Evidence, Rule
from launcher.worker.slurm import job

LEAD_S = 120.0
STEP = 40
NODES = ("n1", "n2", "n3")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run at step 40 of its first attempt, which has left no records yet."""
    return hand_made.run(tmp_path / "demo", Attempt(None), state="running", step=STEP)


Judge = Callable[..., Ending]


@pytest.fixture
def judge(run: RunDir) -> Judge:
    def read(
        *, left_s: float | None = 3600, state: str = "RUNNING", code: int | None = 0, nodes: tuple[str, ...] = NODES
    ) -> Ending:
        ends_at = None if left_s is None else time.time() + left_s
        attempt = Attempt(None, job="41", nodes=nodes, ends_at=ends_at)
        return postmortem.judge(run, 1, attempt, LEAD_S, job.read_evidence(run, 1, attempt, state, code))

    return read


def outcome(run: RunDir, reason: str, ago_s: float = 0) -> None:
    """Write what rank 0 leaves when training ends normally."""
    at = time.time() - ago_s
    journal.append(run, 1, TrainingEnded(at=at, state="any", reason=reason, step=77, message="as they say", checkpoint="/c"))


def node(run: RunDir, number: int, failure: FailureRecord | None = None, **values: Any) -> None:
    """Record how a node ended."""
    journal.append(run, 1, NodeEnded(node=number, first_failure=failure, **values))


def failure(kind: str, rank: int | None = 3, at: float = 100.0, message: str = "what it said") -> FailureRecord:
    return FailureRecord(rank, kind, message, at=at, exit_code=1, log="/log")


def on(host: str, failed: FailureRecord) -> FailureRecord:
    return replace(failed, host=host)


def problem(where: str, what: str = "has no GPU", value: str = "0 found") -> Problem:
    return Problem(what, where, value, "repair it")


def output(run: RunDir, *lines: str) -> None:
    folder = run.jobs / "41"
    folder.mkdir(parents=True)
    (folder / "41_0_log.out").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("reason", "cause"), [("completed", Cause.COMPLETED), ("cancelled", Cause.CANCELLED), ("limit", Cause.LIMIT)]
)
@pytest.mark.parametrize("left_s", [3600, 10])
def test_the_outcome_of_the_ranks_decides_the_cause(run: RunDir, judge: Judge, reason: str, cause: Cause, left_s: float) -> None:
    outcome(run, reason)
    assert judge(left_s=left_s) == Ending(cause, 77, "as they say")


@pytest.mark.parametrize(
    ("left_s", "cause"),
    [
        (None, Cause.PREEMPTED),
        (3600, Cause.PREEMPTED),
        # Slurm may send its signal up to 90 s before the lead time starts, and clocks may differ by 300 s.
        (LEAD_S + 400, Cause.PREEMPTED),
        (LEAD_S + 380, Cause.TIME_LIMIT),
        (10, Cause.TIME_LIMIT),
        (-10, Cause.TIME_LIMIT),
    ],
)
def test_an_interruption_near_the_end_of_the_jobs_time_is_its_time_limit(
    run: RunDir, judge: Judge, left_s: float | None, cause: Cause
) -> None:
    outcome(run, "preempted")
    assert judge(left_s=left_s) == Ending(cause, 77, "as they say")
    (run.attempt(1) / "journal/rank-00000.jsonl").unlink()
    node(run, 1, stopped=True)
    assert judge(left_s=left_s) == Ending(cause, STEP, "stopped before training had begun")


def test_the_time_of_the_interruption_decides_whether_it_was_the_time_limit(run: RunDir, judge: Judge) -> None:
    """If the job could not judge its end, the next start does so, long after the time limit."""
    outcome(run, "preempted", ago_s=7200)
    assert judge(left_s=-3600, code=None).cause is Cause.PREEMPTED
    outcome(run, "preempted", ago_s=3600)
    assert judge(left_s=-3600, code=None).cause is Cause.TIME_LIMIT


@pytest.mark.parametrize("how", ["marker", "scancel"])
def test_a_cancelled_attempt_counts_as_cancelled(run: RunDir, judge: Judge, how: str) -> None:
    if how == "marker":
        atomic_files.write_json(run.attempt(1) / "cancel.json", {"save": True})
    state = "CANCELLED" if how == "scancel" else "RUNNING"
    node(run, 0, failure("killed"))
    assert judge(state=state, code=143) == Ending(Cause.CANCELLED, STEP, "cancelled at step 40 without saving")
    outcome(run, "preempted")
    # The ranks saved after Slurm's SIGTERM, before its SIGKILL.
    assert judge(state=state).cause is Cause.CANCELLED
    outcome(run, "completed")
    assert judge(state=state).cause is Cause.COMPLETED


def test_problems_of_a_node_make_it_a_bad_node(run: RunDir, judge: Judge) -> None:
    # All nodes record the same list.
    for number in range(3):
        node(
            run,
            number,
            problems=(
                problem("n2"),
                problem("n2", "is slow", ""),
            ),
        )
    said = judge(code=1)
    assert said == Ending(Cause.BAD_NODE, STEP, "n2: has no GPU 0 found; n2: is slow", bad_nodes=("n2",))


def test_what_many_nodes_share_is_said_once(run: RunDir, judge: Judge) -> None:
    names = tuple(f"n{number}" for number in range(128))
    node(run, 0, problems=tuple(problem(name, value=f"{number % 9} found") for number, name in enumerate(names)))
    message = judge(nodes=names).message
    assert message.startswith(
        "n0, n9, n18, n27 and 11 more: has no GPU 0 found; n1, n10, n19, n28 and 11 more: has no GPU 1 found;"
    )
    assert message.endswith("has no GPU 5 found and 3 more")
    run.journal(1).joinpath("node-00000.jsonl").unlink()
    assert judge(nodes=names).message == "no record from n0, n1, n2, n3 and 124 more (srun ended with 0)"


@pytest.mark.parametrize(
    ("nodes", "bad", "cause"),
    [
        (1, 1, Cause.BAD_NODE),
        (2, 2, Cause.USER_ERROR),
        (8, 4, Cause.BAD_NODE),
        (8, 5, Cause.USER_ERROR),
    ],
)
def test_problems_of_most_nodes_count_as_a_user_error(run: RunDir, judge: Judge, nodes: int, bad: int, cause: Cause) -> None:
    names = tuple(f"n{i + 1}" for i in range(nodes))
    node(run, 0, problems=tuple(problem(name) for name in names[:bad]))
    said = judge(nodes=names)
    assert (said.cause, said.bad_nodes) == (cause, names[:bad] if cause is Cause.BAD_NODE else ())


@pytest.mark.parametrize(
    ("kind", "rank", "cause", "who"),
    [
        ("killed", 3, Cause.INFRASTRUCTURE, "rank 3 on n2"),
        ("DivergedError", 3, Cause.USER_ERROR, "rank 3 on n2"),
        ("ConfigError", 0, Cause.USER_ERROR, "rank 0 on n2"),
        ("DataError", 0, Cause.USER_ERROR, "rank 0 on n2"),
        ("ZeroDivisionError", 3, Cause.FAILURE, "rank 3 on n2"),
        ("Superseded", 0, Cause.USER_ERROR, "rank 0 on n2"),
        ("RendezvousTimeoutError", None, Cause.INFRASTRUCTURE, "the agent of n2"),
    ],
)
def test_each_kind_of_failure_has_its_cause(
    run: RunDir, judge: Judge, kind: str, rank: int | None, cause: Cause, who: str
) -> None:
    node(run, 0)
    node(run, 1, failure(kind, rank))
    node(run, 2)
    assert judge(code=1) == Ending(cause, STEP, f"{who}: what it said", first_failure=on("n2", failure(kind, rank)))


def test_a_killed_rank_precedes_other_ranks_and_ranks_precede_agents(run: RunDir, judge: Judge) -> None:
    agents = failure("RunError", rank=None, at=1.0, message="the agent of n2 is gone")
    early, late = failure("ValueError", 1, at=10.0, message="early"), failure("ValueError", 5, at=11.0, message="late")
    killed = failure("killed", 4, at=12.0, message="killed by SIGKILL")
    node(run, 0, agents)
    assert judge(code=1).first_failure == on("n1", agents)
    node(run, 1, late)
    assert judge(code=1).first_failure == on("n2", late)
    node(run, 0, early)
    assert judge(code=1).first_failure == on("n1", early)
    node(run, 2, killed)
    ended = Ending(Cause.INFRASTRUCTURE, STEP, "rank 4 on n3: killed by SIGKILL", first_failure=on("n3", killed))
    assert judge(code=1) == ended


def test_problems_precede_failures_and_failures_precede_a_stop(run: RunDir, judge: Judge) -> None:
    node(run, 0, failure("ValueError"), stopped=True)
    node(run, 1)
    node(run, 2)
    assert judge(code=1).cause is Cause.FAILURE
    node(run, 1, problems=(problem("n2"),))
    assert judge(code=1).cause is Cause.BAD_NODE


def test_nodes_without_a_record_are_named(run: RunDir, judge: Judge) -> None:
    node(run, 1)
    assert judge(code=9) == Ending(Cause.INFRASTRUCTURE, STEP, "no record from n1, n3 (srun ended with 9)")
    assert judge(code=None) == Ending(Cause.INFRASTRUCTURE, STEP, "no record from n1, n3")
    node(run, 0)
    node(run, 2)
    assert judge(code=0).message == "the ranks ended without an outcome (srun ended with 0)"


REFUSED = "srun: error: n2: task 1: Exited with exit code 78"
BEFORE, NOW = job.marker(0, NODES), job.marker(1, NODES)


def test_a_task_that_exits_before_its_agent_starts_makes_its_node_bad(run: RunDir, judge: Judge) -> None:
    output(run, NOW, "n2 cannot read /srv/project/runs/tried/plan.json", REFUSED, "srun: error: n1: task 0: Terminated")
    said = judge(code=78)
    assert (said.cause, said.bad_nodes, said.step) == (Cause.BAD_NODE, ("n2",), STEP)
    assert said.message.startswith("n2: no agent could start there (Exited with exit code 78)")
    assert "run directory" in said.message
    # The next start did not see srun end, so the node may also have been lost.
    assert judge(code=None).cause is Cause.INFRASTRUCTURE
    # If an agent left its record, its task did not fail to start.
    node(run, 1)
    assert judge(code=78).message == "no record from n1, n3 (srun ended with 78)"


@pytest.mark.parametrize(
    "lines",
    [
        [BEFORE, REFUSED, NOW],
        [NOW, "srun: error: n2: task 1: Terminated"],
        [NOW, "srun: error: Node failure on n9"],
        [],
    ],
)
def test_other_output_of_srun_blames_no_node(run: RunDir, judge: Judge, lines: list[str]) -> None:
    output(run, *lines)
    assert judge(code=9).message == "no record from n1, n2, n3 (srun ended with 9)"


def test_a_run_directory_invisible_to_most_nodes_is_a_user_error(run: RunDir, judge: Judge) -> None:
    output(run, NOW, REFUSED, "srun: error: n3: task 2: Exited with exit code 78")
    said = judge(code=78)
    assert (said.cause, said.bad_nodes) == (Cause.USER_ERROR, ())
    assert "n2, n3: no agent" in said.message
    assert "n3: no agent" in said.message


def test_srun_errors_of_task_ranges_are_parsed(run: RunDir, judge: Judge) -> None:
    output(run, NOW, "srun: error: n2: tasks 1-3,5: Exited with exit code 2")
    assert judge(code=2).bad_nodes == ("n2",)


def all_nodes(run: RunDir, *failures: FailureRecord | None) -> None:
    for number in range(3):
        node(run, number, failures[number] if number < len(failures) else None)


@pytest.mark.parametrize(
    ("kind", "message", "cause"),
    [
        ("RuntimeError", "RuntimeError: [../gloo/tcp/pair.cc:553] Connection closed by peer [10.0.0.2]:3", Cause.INFRASTRUCTURE),
        ("DistBackendError", "DistBackendError: NCCL error: remote process exited or network error", Cause.INFRASTRUCTURE),
        ("DistBackendError", "DistBackendError: NCCL error in x.cpp:9, invalid usage", Cause.FAILURE),
        ("AcceleratorError", "AcceleratorError: CUDA error: uncorrectable ECC error encountered", Cause.INFRASTRUCTURE),
        ("RuntimeError", "CUDA error: unspecified launch failure\nNVRM: Xid (PCI:0000:01:00): 63", Cause.INFRASTRUCTURE),
        ("RuntimeError", "RuntimeError: CUDA error: unspecified launch failure", Cause.FAILURE),
        ("RuntimeError", "RuntimeError: GPU has fallen off the bus", Cause.INFRASTRUCTURE),
        ("OSError", "OSError: [Errno 116] Stale file handle: '/runs/a/status.json'", Cause.INFRASTRUCTURE),
        ("CheckpointError", "shard-00001 cannot be read: Input/output error", Cause.INFRASTRUCTURE),
        ("OSError", "OSError: [Errno 28] No space left on device", Cause.FAILURE),
        ("DataError", "train.jsonl cannot be read: Stale file handle", Cause.USER_ERROR),
    ],
)
def test_messages_of_broken_machines_count_as_infrastructure(
    run: RunDir, judge: Judge, kind: str, message: str, cause: Cause
) -> None:
    all_nodes(run, None, failure(kind, message=message))
    assert judge(code=1).cause is cause


def test_a_lost_connection_comes_after_the_failure_whatever_the_clocks(run: RunDir, judge: Judge) -> None:
    own = failure("ValueError", 4, at=12.0, message="ValueError: own")
    all_nodes(run, failure("RuntimeError", 0, at=10.0, message="Connection closed by peer"), own)
    assert judge(code=1) == Ending(Cause.FAILURE, STEP, "rank 4 on n2: ValueError: own", first_failure=on("n2", own))


def test_failures_beside_a_node_without_a_record_count_as_infrastructure(run: RunDir, judge: Judge) -> None:
    node(run, 0, failure("ValueError"))
    node(run, 1)
    assert judge(code=1) == Ending(
        Cause.INFRASTRUCTURE, STEP, "rank 3 on n1: what it said; no record from n3", first_failure=on("n1", failure("ValueError"))
    )
    node(run, 1, failure("DivergedError", at=1.0))
    assert judge(code=1).cause is Cause.USER_ERROR


@pytest.mark.parametrize(("left_s", "cause"), [(3600, Cause.PREEMPTED), (10, Cause.TIME_LIMIT)])
def test_ranks_killed_after_the_grace_period_count_as_interrupted(run: RunDir, judge: Judge, left_s: float, cause: Cause) -> None:
    killed = failure("killed", message="killed by SIGKILL")
    node(run, 0, killed, stopped=True, killed=True)
    node(run, 1, stopped=True, killed=False)
    said = judge(left_s=left_s, code=1)
    assert (said.cause, said.first_failure) == (cause, on("n1", killed))
    # A rank killed by anything else does not count as interrupted, whether or not a stop was requested.
    node(run, 0, killed, stopped=True, killed=False)
    assert judge(left_s=left_s, code=1).cause is Cause.INFRASTRUCTURE


@pytest.mark.parametrize(("state", "cause"), [("TIMEOUT", Cause.TIME_LIMIT), ("PREEMPTED", Cause.PREEMPTED)])
def test_slurms_job_state_decides_where_the_ranks_left_no_outcome(run: RunDir, judge: Judge, state: str, cause: Cause) -> None:
    assert judge(state=state, code=None) == Ending(cause, STEP, f"the job ended as {state} at step 40 without saving")
    all_nodes(run, failure("killed"))
    assert judge(state=state).cause is cause
    all_nodes(run, failure("DataError"))
    assert judge(state=state).cause is Cause.USER_ERROR
    outcome(run, "completed")
    assert judge(state=state).cause is Cause.COMPLETED


def test_an_agent_that_cannot_start_its_ranks_names_its_node(run: RunDir, judge: Judge) -> None:
    own = failure("RunError", rank=None, message="eth7 has no address")
    all_nodes(run, None, own, failure("RendezvousTimeoutError", rank=None, at=200.0))
    assert judge(code=1) == Ending(Cause.BAD_NODE, STEP, "n2: eth7 has no address", ("n2",), on("n2", own))
    # Two nodes that fail to meet the first one: the first one may be at fault.
    all_nodes(run, None, own, own)
    said = judge(code=1)
    assert (said.cause, said.bad_nodes) == (Cause.INFRASTRUCTURE, ())


def test_a_node_is_blamed_for_its_own_problem_beside_a_full_disk(run: RunDir, judge: Judge) -> None:
    full = [problem(name, f"{NO_ROOM} for a checkpoint", "1 GiB free") for name in NODES]
    node(
        run,
        0,
        problems=(
            *full,
            problem("n2"),
        ),
    )
    said = judge()
    assert (said.cause, said.bad_nodes) == (Cause.BAD_NODE, ("n2",))


LOST_PEER = failure("RuntimeError", 0, at=9.0, message="RuntimeError: [pair.cc:553] Connection closed by peer\nmore of it")
KILLED, MISSING = "srun: error: n2: task 1: Killed", "srun: error: Aborting, io error and missing step on node 1"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["srun: error: Node failure on n2"], "n2 was lost (Slurm: node failure); no record from n3"),
        ([KILLED, "srun: error: n3: task 2: Killed"], "the agent of n2 was killed (srun: Killed); no record from n3"),
        (["srun: error: n3: task 2: Bus error", KILLED], "the agent of n3 was killed (srun: Bus error); no record from n2"),
        ([MISSING, "srun: error: n3: task 2: Killed"], "srun lost its slurmstepd on n2; no record from n3"),
        ([], "no record from n2, n3"),
    ],
)
def test_a_lost_node_comes_before_the_survivors_that_lost_their_connection_to_it(
    run: RunDir, judge: Judge, lines: list[str], expected: str
) -> None:
    output(run, NOW, *lines)
    node(run, 0, LOST_PEER)
    ended = judge(code=9)
    consequence = "as a consequence, rank 0 on n1: RuntimeError: [pair.cc:553] Connection closed by peer"
    assert (ended.cause, ended.message) == (Cause.INFRASTRUCTURE, f"{expected}; {consequence}")
    # An agent that waits in vain for the lost node is also a consequence.
    node(run, 0, failure("RendezvousTimeoutError", rank=None, message="n2 did not reach the rendezvous"))
    assert judge(code=9).message == f"{expected}; as a consequence, the agent of n1: n2 did not reach the rendezvous"


@pytest.mark.parametrize("message", ["killed by SIGSEGV (a segmentation fault)", "killed by SIGKILL"])
def test_a_killed_rank_comes_before_the_survivors_of_other_nodes(run: RunDir, judge: Judge, message: str) -> None:
    all_nodes(run, LOST_PEER, failure("killed", 4, at=12.0, message=message), LOST_PEER)
    assert judge(code=1).message == f"rank 4 on n2: {message}"


def test_an_exceeded_memory_limit_is_named_first(run: RunDir, judge: Judge) -> None:
    output(run, NOW, "slurmstepd: error: Detected 1 oom_kill event in StepId=41.0")
    all_nodes(run, failure("killed", message="killed by SIGKILL"))
    assert (
        judge(code=1).message
        == "a memory limit was exceeded (raise cluster.additional_parameters.mem): rank 3 on n1: killed by SIGKILL"
    )


def evidence(*nodes: NodeEnded, **known: Any) -> Evidence:
    """What is known about an attempt on three nodes, of which these have reported their end."""
    parts = {name: known.pop(name) for name in ("training",) if name in known}
    recorded = AttemptState(nodes={one.node: one for one in nodes}, **parts)
    return Evidence(attempt=Attempt(None, job="41", nodes=NODES), journal=recorded, step=STEP, **known)


def three(failed: FailureRecord | None = None, **values: Any) -> list[NodeEnded]:
    """All nodes have ended; the second has failed."""
    return [NodeEnded(node=number, first_failure=failed if number == 1 else None, **values) for number in range(3)]


AGENT = failure("RunError", rank=None, message="eth7 has no address")
TRAINED = TrainingEnded(state="any", reason="limit", step=77, message="as they say")
# For each rule an end that it explains, and that later rules would explain differently.
EXPLAINED: dict[str, tuple[Evidence, Cause]] = {
    "training_ended": (evidence(NodeEnded(node=0, first_failure=LOST_PEER), training=TRAINED, is_cancelled=True), Cause.LIMIT),
    "cancelled": (evidence(NodeEnded(node=0, problems=(problem("n1"),)), is_cancelled=True), Cause.CANCELLED),
    "failed_node_checks": (evidence(*three(failure("DataError"), problems=(problem("n2"),)), state="TIMEOUT"), Cause.BAD_NODE),
    "user_error": (evidence(*three(failure("DataError"), stopped=True, killed=True), state="TIMEOUT"), Cause.USER_ERROR),
    "killed_after_grace_period": (evidence(*three(failure("killed"), stopped=True, killed=True)), Cause.PREEMPTED),
    "taken_by_scheduler": (evidence(*three(failure("killed")), state="TIMEOUT"), Cause.TIME_LIMIT),
    "requeued": (evidence(*three(LOST_PEER), state="REQUEUED"), Cause.PREEMPTED),
    "stopped_before_training": (
        evidence(NodeEnded(node=0, stopped=True, first_failure=replace(failure("killed"), exit_code=-10))),
        Cause.PREEMPTED,
    ),
    "failure_beside_silent_nodes": (evidence(NodeEnded(node=1, first_failure=AGENT)), Cause.INFRASTRUCTURE),
    "agent_without_ranks": (evidence(*three(AGENT)), Cause.BAD_NODE),
    "failure": (evidence(*three(failure("ValueError"), stopped=True), refused={"n1": "exit code 7"}), Cause.FAILURE),
    "no_agent_could_start": (evidence(exit_code=7, refused={"n1": "exit code 7"}), Cause.BAD_NODE),
    "silence": (evidence(refused={"n1": "exit code 7"}), Cause.INFRASTRUCTURE),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_each_rule_explains_an_end(rule: Rule) -> None:
    known, cause = EXPLAINED[rule.name]
    assert postmortem.find_rule(known) is rule
    assert rule.judge(known).cause is cause
    assert len(EXPLAINED) == len(RULES)


@pytest.mark.parametrize(
    ("values", "state", "cause", "message"),
    [
        ({}, "failed", Cause.INFRASTRUCTURE, "the ranks ended without an outcome"),
        ({"stopped": True}, "cancelled", Cause.CANCELLED, "stopped before training had begun; there is no checkpoint"),
        (
            {"stopped": True, "killed": True, "first_failure": failure("killed")},
            "cancelled",
            Cause.CANCELLED,
            "killed at step 40 without saving; there is no checkpoint",
        ),
        (
            {"stopped": True, "first_failure": replace(failure("killed"), exit_code=-10)},
            "cancelled",
            Cause.CANCELLED,
            "stopped before training had begun; there is no checkpoint",
        ),
        ({"stopped": True, "first_failure": failure("OSError")}, "failed", Cause.FAILURE, "rank 3: what it said"),
    ],
)
def test_a_run_on_this_machine_is_judged_by_the_same_rules(
    run: RunDir, values: dict[str, Any], state: str, cause: Cause, message: str
) -> None:
    verdict = postmortem.judge_local(run, 1, NodeEnded(node=0, host="here", **values))
    assert (verdict.state, verdict.cause, verdict.message) == (state, cause, message)
