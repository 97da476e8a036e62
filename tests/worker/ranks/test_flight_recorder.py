"""The agent requests a silent rank's flight recorder through a pipe, and reports the collective in which the ranks hang.

The flight recorders of all ranks explain a hang; the records have the format of torch's ProcessGroupNCCL.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hand_made
import pytest
import torch
from forked_ranks import RankServer
from pace import wait_for

from launcher.plan.run_dir import RunDir
from launcher.runs.run_records import Attempt
from launcher.worker.ranks.flight_recorder import Calls, FlightRecorder, explain_hang, read_dump
from launcher.worker.ranks.fork_server import find_differing

STALL_S = 600.0
NODES, RANKS_PER_NODE = 64, 8
Call = tuple[str, str, Sequence[int]]
GATHER: Call = ("nccl:_all_gather_base", "BFloat16", (1024, 1024))
REDUCE: Call = ("nccl:_reduce_scatter_base", "Float", (512, 1024))
WORLD = {"name": "0", "desc": "default_pg"}
NODE = {"name": "1", "desc": "undefined"}
HOSTS = ("n1", "n2")
TITLE = "in collective 8 of process group 0 (default_pg), all_gather_base of 1048576 elements"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return hand_made.run(tmp_path / "demo", Attempt(None, nodes=("n1", "n2", "n3")))


def test_the_collective_is_named_that_ranks_wait_in_and_who_has_not_called_it(
    rank_server: RankServer, run: RunDir, tmp_path: Path
) -> None:
    """Three ranks over gloo leave real records; the last has not called what the others wait in, and later stops answering."""
    environ: dict[str, str] = {}
    recorder = FlightRecorder(run, 1, 3, STALL_S)
    environ.update(recorder.variables)
    assert find_differing(environ, {}) == [], "the fork server may import without them"
    values: list[list[None]] = []
    arguments = [[2, str(tmp_path)]] * 3
    ranks = threading.Thread(
        target=lambda: values.append(
            rank_server.values("waiting_ranks:wait_without", arguments, tmp_path / "ranks", environment=environ)
        )
    )
    ranks.start()
    try:
        wait_for("the ranks", lambda: all((tmp_path / f"ready-{rank}").exists() for rank in range(3)))
        title = "ranks 0, 1 on n1, n2 wait in collective 3 of process group 0 (default_pg), all_gather of 1024 elements"

        def explain(*asked: int) -> str:
            recorder.request(asked)
            return recorder.explain()

        # Rank 0 or rank 1 may not have called it yet.
        wait_for("the others", lambda: explain(0, 1) == f"{title}; rank 2 on n3 left no record")
        wait_for("all ranks", lambda: explain(0, 1, 2) == f"{title}; rank 2 on n3 has not called it")
    finally:
        (tmp_path / "go").touch()
        ranks.join()
        recorder.close(environ)
    assert values == [[None] * 3], "recording changes nothing"
    published = run.attempt(1) / "collectives"
    assert {path.name for path in published.glob("rank-*")} == {"rank-0", "rank-1", "rank-2"}, "for torchfrtrace"
    # Records from before a restart are too old to be used with others.
    (summaries,) = published.glob("summary-*.json")
    (published / "summary-later.json").write_text("{}")
    reader = FlightRecorder(run, 1, 3, STALL_S)
    assert reader.explain().startswith(title)
    os.utime(summaries, (0, 0))
    assert reader.explain() == ""
    reader.close({})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_rank_with_nccl_answers_by_itself(rank_server: RankServer, run: RunDir, tmp_path: Path) -> None:
    environ: dict[str, str] = {}
    recorder = FlightRecorder(run, 1, 1, STALL_S)
    environ.update(recorder.variables)
    function, arguments = "waiting_ranks:record_on_a_gpu", [[str(tmp_path)]]
    rank = threading.Thread(target=lambda: rank_server.values(function, arguments, tmp_path / "ranks", environment=environ))
    rank.start()
    written = run.attempt(1) / "collectives" / "rank-0"
    try:
        wait_for("the rank", (tmp_path / "ready-0").exists)
        recorder.request([0])
        wait_for("its record", written.exists)
        assert recorder.explain() == "", "it waits in no collective"
    finally:
        (tmp_path / "go").touch()
        rank.join()
        recorder.close(environ)
    recorded = read_dump(written.read_bytes())
    assert recorded is not None
    ((group, summed),) = recorded.items()
    assert (group, summed.name, summed.num_elements, summed.is_completed) == ("0 (default_pg)", "all_reduce", 1024, True)


def entry(number: int, call: Call, state: str, group: dict[str, str] = WORLD, at: int = 0) -> dict[str, Any]:
    name, dtype, size = call
    return {
        "record_id": number,
        "pg_id": int(group["name"]),
        "process_group": (group["name"], group["desc"]),
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": name,
        "time_created_ns": at or number,
        "input_sizes": [list(size)],
        "input_dtypes": [dtype],
        "output_sizes": [list(size)],
        "output_dtypes": [dtype],
        "state": state,
        "retired": state == "completed",
        "is_p2p": False,
        "frames": [{"name": "step", "filename": "loop.py", "line": 1}],
    }


def dump(*entries: dict[str, Any]) -> Calls:
    record = {"version": "2.10", "entries": [*entries]}
    parsed = read_dump(pickle.dumps(record, protocol=2))
    assert parsed is not None
    return parsed


UNEVEN = [dump(entry(8, ("nccl:all_to_all", "Float", (size,)), "started")) for size in (5, 7, 9)]
DONE = entry(7, GATHER, "completed")
WAITS = dump(DONE, entry(8, GATHER, "started"), entry(9, REDUCE, "scheduled"))


def explain(dumps: dict[int, Calls], hosts: Sequence[str] = HOSTS) -> str:
    return explain_hang(dumps, 4, hosts)


@pytest.mark.parametrize(
    ("last", "explanation"),
    [
        (dump(DONE), f"ranks 0, 1, 2 on n1, n2 wait {TITLE}; rank 3 on n2 has not called it"),
        (None, f"ranks 0, 1, 2 on n1, n2 wait {TITLE}; rank 3 on n2 left no record"),
        (
            dump(DONE, entry(8, REDUCE, "started")),
            f"ranks 0, 1, 2 on n1, n2 wait {TITLE}; rank 3 on n2 has called reduce_scatter_base of 524288 elements instead",
        ),
        (
            dump(DONE, entry(8, ("nccl:_all_gather_base", "BFloat16", (1024, 2)), "started")),
            f"ranks 0, 1, 2 on n1, n2 wait {TITLE}; rank 3 on n2 has called all_gather_base of 2048 elements instead",
        ),
        (
            WAITS,
            f"ranks 0, 1, 2, 3 on n1, n2 wait {TITLE}; all have called it, and none completes it: the network or a GPU hangs",
        ),
    ],
)
def test_the_verdict_names_collective_ranks_and_nodes(last: Calls | None, explanation: str) -> None:
    dumps = {0: WAITS, 1: WAITS, 2: WAITS, 3: last}
    assert explain({rank: one for rank, one in dumps.items() if one is not None}) == explanation


def test_a_run_on_one_node_names_no_node() -> None:
    assert (
        explain({0: WAITS, 1: WAITS, 3: WAITS, 2: dump(DONE)}, ("n1",)) == f"ranks 0, 1, 3 wait {TITLE}; rank 2 has not called it"
    )


def test_ranks_that_never_used_the_first_group_are_missing_and_sizes_may_differ_where_collectives_allow_it() -> None:
    called = "in collective 8 of process group 0 (default_pg), all_to_all; rank 3 on n2 has not called it"
    assert explain({**dict(enumerate(UNEVEN)), 3: dump()}) == f"ranks 0, 1, 2 on n1, n2 wait {called}"


def test_of_groups_that_wait_for_each_other_the_one_is_named_that_holds_the_culprit() -> None:
    """Rank 2 is missing in the global group because it waits for rank 3 in its node's group."""
    waits_in_node = dump(DONE, entry(3, REDUCE, "started", NODE, at=99))
    assert explain({0: WAITS, 1: WAITS, 2: waits_in_node, 3: dump(DONE, entry(2, REDUCE, "completed", NODE))}) == (
        "rank 2 on n2 waits in collective 3 of process group 1, reduce_scatter_base of 524288 elements; "
        "rank 3 on n2 has not called it"
    )


def test_without_a_collective_that_is_incomplete_nothing_is_said() -> None:
    assert explain({rank: dump(DONE) for rank in range(4)}) == ""
    assert explain({}) == ""


@pytest.mark.parametrize("content", [b"", b".", b"no pickle", pickle.dumps({"entries": [{}]}), pickle.dumps([1])])
def test_damaged_records_are_passed_over(content: bytes) -> None:
    assert read_dump(content) is None
