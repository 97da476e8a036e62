"""Which batch needs the most memory, and the error message if a GPU runs out of memory before the first step.

tests/e2e/test_resume_exact.py checks that a run that tries the largest batch first trains the same as one that does not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from forked_ranks import RankServer
from plan_fixtures import PlanOf

from launcher.data.split import Split
from launcher.errors import WOULD_REPEAT, OutOfMemory
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.train.monitoring.largest_batch import (
    LargestBatchRecord,
    choose_largest,
    explained_out_of_memory,
)

H100 = ("model=llama3_1_8b", "cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=8", "train.global_batch_size=64")
REASON = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.03 GiB is free."


def created(plan: LaunchPlan, folder: Path) -> RunDir:
    """Create a run with this plan and return its directory."""
    return run_store.create(plan.model_copy(update={"run_dir": str(folder / "run")}))


def split_of(rows: list[tuple[list[int], bool]]) -> Split:
    """Return a split. Each row is given as its document lengths and whether all their tokens are trained."""
    lengths = [length for documents, _ in rows for length in documents]
    sizes = [sum(documents) for documents, _ in rows]
    labels = [length - 1 if trained else 0 for documents, trained in rows for length in documents]
    trained = np.repeat([trained for _, trained in rows], sizes).astype(np.uint8)
    row_docs = np.cumsum([0, *(len(documents) for documents, _ in rows)])
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(sum(sizes), dtype=np.int32) % 7
    return Split(
        tokens=tokens,
        trained=trained,
        docs=offsets,
        rows=offsets[row_docs],
        columns={"source": np.zeros(len(lengths), np.uint16), "num_trained": np.array(labels)},
    )


def test_the_largest_batch_has_the_most_tokens_and_labels_and_then_the_longest_document() -> None:
    rows = [([4, 4], True), ([8], False), ([7, 1], True), ([5], True), ([3, 5], False)]
    split = split_of(rows)
    assert set(choose_largest(split, 1, packing=True).row_ids) == {2}
    assert set(choose_largest(split, 2, packing=True).row_ids) == {0, 2}
    assert choose_largest(split, 2, packing=True).input_ids.shape == (2, 8)


def test_without_packing_the_largest_batch_has_the_longest_rows_which_the_others_are_padded_to() -> None:
    split = split_of([([6], True), ([8], False), ([6], True), ([7], False), ([8], True)])
    assert set(choose_largest(split, 1, packing=False).row_ids) == {4}
    assert set(choose_largest(split, 2, packing=False).row_ids) == {1, 4}
    assert choose_largest(split, 3, packing=False).input_ids.shape == (3, 8)


@pytest.mark.parametrize("offloads", [False, True])
def test_a_parameter_without_a_gradient_in_the_first_step_stays(rank_server: RankServer, tmp_path: Path, offloads: bool) -> None:
    arguments = [[offloads]] * 2
    results = rank_server.values("train_ranks:step_after_dropped_gradients", arguments, tmp_path / "ranks")
    for changed, (norm, undisturbed) in results:
        assert changed == [False, True]
        assert norm == undisturbed > 0


def test_out_of_memory_before_the_first_step_is_final_and_says_what_would_help(plan_of: PlanOf, tmp_path: Path) -> None:
    plan = plan_of(*H100, "train.micro_batch_size=2", "data.max_length=4096", "model.activation_checkpointing=every 2")
    with pytest.raises(OutOfMemory) as raised, explained_out_of_memory(plan, created(plan, tmp_path), lambda: False):
        raise torch.OutOfMemoryError(REASON)
    assert isinstance(raised.value, WOULD_REPEAT)
    (problem,) = raised.value.problems
    assert "before the first step was completed: CUDA out of memory" in problem.message
    assert "Planned were " in problem.message
    assert "micro-batch 2" in problem.where
    settings = (
        "train.micro_batch_size=1",
        "model.activation_checkpointing=all",
        "model.liger=true",
        "deepspeed.offload_optimizer=cpu",
    )
    assert problem.remedy == f"set one of {', '.join(settings)}"


@pytest.mark.parametrize("done", ["a step of this process", "a step of another node", "the largest batch"])
def test_out_of_memory_after_a_step_or_the_largest_batch_is_none_of_the_plans(plan_of: PlanOf, tmp_path: Path, done: str) -> None:
    plan = plan_of(*H100)
    run_dir = created(plan, tmp_path)
    if done == "a step of another node":
        run_dir.metrics.write_text('{"attempt": 1, "time": 1.0, "trainer/step": 200, "train/loss": 2.5}\n')
    elif done == "the largest batch":
        json_records.write(run_dir.largest_batch, LargestBatchRecord(plan.digest(), "NVIDIA H100"))
    is_own = done == "a step of this process"
    with pytest.raises(torch.OutOfMemoryError), explained_out_of_memory(plan, run_dir, lambda: is_own):
        raise torch.OutOfMemoryError(REASON)


@pytest.mark.parametrize(("reserved_gib", "error"), [(74.5, OutOfMemory), (70.0, torch.OutOfMemoryError)])
def test_other_processes_are_the_reason_where_they_hold_more_than_cuda_and_nccl_may_take(
    plan_of: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reserved_gib: float, error: type[Exception]
) -> None:
    """Of 79 GiB, 1 is free. Neither free nor reserved by torch: 3.5 or 8 GiB. The plan assumes 2 GiB for CUDA and NCCL."""
    plan = plan_of(*H100)
    assert plan.peak is not None
    assert plan.peak.runtime_gib == 2.0
    readings = {
        "is_available": lambda: True,
        "mem_get_info": lambda: (1 * 2**30, 79 * 2**30),
        "memory_reserved": lambda: reserved_gib * 2**30,
        "max_memory_allocated": lambda: reserved_gib * 2**30,
    }
    for name, reading in readings.items():
        monkeypatch.setattr(torch.cuda, name, reading)
    with pytest.raises(error), explained_out_of_memory(plan, created(plan, tmp_path), lambda: False):
        raise torch.OutOfMemoryError(REASON)
