"""A node's GPUs are divided among the processes of an evaluation."""

from __future__ import annotations

import pytest

from launcher.worker.evaluation.node import divide_gpus


@pytest.mark.parametrize(
    ("num_gpus", "gpus_per_process", "visible", "expected"),
    [
        (0, 1, "", [[]]),
        (0, 4, "", [[]]),
        (3, 1, "", [["0"], ["1"], ["2"]]),
        (2, 1, "5,7", [["5"], ["7"]]),
        (4, 2, "", [["0", "1"], ["2", "3"]]),
        (5, 2, "3,4,5,6,7", [["3", "4"], ["5", "6"]]),
        (2, 4, "", []),
    ],
)
def test_each_process_gets_its_own_gpus(num_gpus: int, gpus_per_process: int, visible: str, expected: list[list[str]]) -> None:
    assert divide_gpus(num_gpus, gpus_per_process, visible) == expected
