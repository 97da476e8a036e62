"""The proof of the first step: it stops a run whose arithmetic is wrong before anything is saved, and names what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import hand_made
import pytest
from e2e_tools import TINY, json_lines
from forked import Launch
from forked_ranks import RankServer
from planned_ranks import PlannedRanks, build_plan

from launcher.plan.launch_plan import LaunchPlan

SETTINGS = (
    *TINY,
    "data=jsonl",
    "data.eval_fraction=0",
    "data.max_length=256",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
    "train.proof=true",
    "train.grad_clip=0.05",
    "export.enabled=false",
    # Attention matters to the loss of a random model only if its weights are large.
    "model.config.initializer_range=0.2",
    "optim.warmup_steps=4",
    "optim.lr=1e-4",
    "optim.weight_decay=0.1",
)
# The fault, the number of ranks, and what the error says.
FAULTS = (
    ("reduction_doubled", 2, r"after the reduction, gradients of .* are 2\.00 times too large$"),
    (
        "matrices_divided_by_nodes",
        4,
        r"after the reduction, gradients of .*matrices are 2\.\d\d times too large, those of norms and biases are right$",
    ),
    ("not_reduced", 2, "after the reduction, each rank has its own gradients, not their sum over the ranks"),
    ("reduced_twice", 2, r"after the reduction, gradients of .* are 2\.00 times too small$"),
    ("tensor_left_out", 2, r"after the reduction, gradients of model\.\S+ are wrong by 1 of their norm"),
    ("mean_of_ranks", 2, r"the loss of the first micro-batch is [01]\.\d\d times that of its documents"),
    ("documents_leak", 2, r"gradients of model\.\S+ are wrong by [\d.]+ of their norm"),
    ("labels_shifted", 2, r"the loss of a document of \d+ trained tokens is [\d.]+, and alone [\d.]+"),
    ("mask_inverted", 2, r"\d+ of \d+ labels of row \d+ are not those of the data cache"),
    ("last_chunk_dropped", 2, r"the loss of the first micro-batch is 0\.\d\d times that of its documents"),
    ("clipped_to_double", 2, r"clipping to 0\.05 leaves gradients that are 2\.00 times the right ones"),
    ("decayed_twice", 2, r"weight decay is 2\.0\d? times that of the plan"),
    ("bias_not_corrected", 2, "the moments have no bias correction"),
    ("rate_of_another_step", 2, r"the learning rate is 5e-05, and that of step 1 2\.5e-05"),
    ("rate_changed_in_the_step", 2, r"the learning rate is 0\.50 times that of step 1"),
    ("same_rows", 2, r"rows are on the wrong ranks: row \d+ on 0 and 1"),
    ("weights_stale", 2, r"the passes used other weights than the optimizer's: model\.\S+norm"),
    ("positions_wrong", 2, r"\d+ of \d+ positions of row \d+ are not those of the data cache"),
)

pytestmark = [pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def planned(launch_here: Launch, tmp_path_factory: pytest.TempPathFactory) -> LaunchPlan:
    """A plan for two ranks; its data are built: packed rows, with different numbers of trained tokens."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"prompt": f"count {row % 7} from {row}: ", "completion": " ".join(map(str, range(row, row + 2 + row % 6)))}
        for row in range(400)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return build_plan(launch_here, *SETTINGS, f"data.path={data}")


@pytest.fixture
def ranks(rank_server: RankServer, tmp_path: Path) -> PlannedRanks:
    return PlannedRanks(rank_server, tmp_path)


@pytest.mark.parametrize("dtype", ["bf16"])
@pytest.mark.parametrize(("fault", "num_ranks", "says"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_a_fault_is_named_before_anything_is_saved(
    ranks: PlannedRanks, planned: LaunchPlan, fault: str, num_ranks: int, says: str, dtype: str
) -> None:
    plan = ranks.prepare(hand_made.changed(planned, f"model.dtype={dtype}"), "run", 2)
    ends = ranks.call("proof_ranks:train", num_ranks, plan, fault)
    print(ends[0])
    assert {end["kind"] for end in ends} == {"ProofError"}
    messages = [message for message, _ in ends[0]["problems"]]
    assert any(re.search(f"^the first step is wrong: .*{says}", message) for message in messages), messages
    assert not (ranks.folder / "run/checkpoints").exists()
    assert not [line for line in json_lines(ranks.folder / "run/events.jsonl") if line["kind"] == "proof"]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_pass_is_one_line(ranks: PlannedRanks, planned: LaunchPlan, num_ranks: int) -> None:
    plan = ranks.prepare(planned, "run", 2)
    assert {end["kind"] for end in ranks.call("proof_ranks:train", num_ranks, plan, None)} == {""}
    [line] = [line for line in json_lines(ranks.folder / "run/events.jsonl") if line["kind"] == "proof"]
    print(line["text"])
    assert line["fields"]["omitted"] == []
    assert {"documents", "loss", "gradients", "reduction", "moments", "update"} <= line["fields"].keys()
