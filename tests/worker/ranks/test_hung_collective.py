"""The flight recorders of all ranks explain a hang; the records have the format of torch's ProcessGroupNCCL."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest

from launcher.worker.ranks.hung_collective import Calls, Members, explain_hang, read_dump

Call = tuple[str, str, Sequence[int]]
GATHER: Call = ("nccl:_all_gather_base", "BFloat16", (1024, 1024))
REDUCE: Call = ("nccl:_reduce_scatter_base", "Float", (512, 1024))
WORLD = {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2, 3]"}
NODE = {"name": "1", "desc": "undefined", "ranks": "[2, 3]"}
HOSTS = ("n1", "n2")


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


def dump(*entries: dict[str, Any]) -> tuple[Calls, Members]:
    record = {"version": "2.10", "pg_config": {"0": WORLD, "1": NODE}, "entries": [*entries]}
    parsed = read_dump(pickle.dumps(record, protocol=2))
    assert parsed is not None
    return parsed


DONE = entry(7, GATHER, "completed")
WAITS = dump(DONE, entry(8, GATHER, "started"), entry(9, REDUCE, "scheduled"))


def explain(dumps: dict[int, tuple[Calls, Members]], hosts: Sequence[str] = HOSTS) -> str:
    members = {group: ranks for _, of_rank in dumps.values() for group, ranks in of_rank.items()}
    return explain_hang({rank: calls for rank, (calls, _) in dumps.items()}, members, 4, hosts)


TITLE = "in collective 8 of process group 0 (default_pg), all_gather_base of 1048576 elements"


@pytest.mark.parametrize(
    ("last", "explanation"),
    [
        (dump(DONE), f"ranks 0-2 on n1, n2 wait {TITLE}; rank 3 on n2 has not called it"),
        (None, f"ranks 0-2 on n1, n2 wait {TITLE}; rank 3 on n2 left no record"),
        (
            dump(DONE, entry(8, REDUCE, "started")),
            f"ranks 0-2 on n1, n2 wait {TITLE}; rank 3 on n2 has called reduce_scatter_base of 524288 elements instead",
        ),
        (
            dump(DONE, entry(8, ("nccl:_all_gather_base", "BFloat16", (1024, 2)), "started")),
            f"ranks 0-2 on n1, n2 wait {TITLE}; rank 3 on n2 has called all_gather_base of 2048 elements instead",
        ),
        (
            WAITS,
            f"ranks 0-3 on n1, n2 wait {TITLE}; all have called it, and none completes it: the network or a GPU hangs",
        ),
    ],
)
def test_the_verdict_names_collective_ranks_and_nodes(last: tuple[Calls, Members] | None, explanation: str) -> None:
    dumps = {0: WAITS, 1: WAITS, 2: WAITS, 3: last}
    assert explain({rank: one for rank, one in dumps.items() if one is not None}) == explanation


def test_a_run_on_one_node_names_no_node() -> None:
    assert (
        explain({0: WAITS, 1: WAITS, 3: WAITS, 2: dump(DONE)}, ("n1",)) == f"ranks 0-1, 3 wait {TITLE}; rank 2 has not called it"
    )


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
