"""What the refusal of a run that is too large for its GPUs offers: settings that fit, with their peak, speed and cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launcher.errors import ConfigError
from launcher.plan.launch_plan import LaunchPlan

PlanOf = Callable[..., LaunchPlan]
EIGHT_H100 = ("cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=8", "train.global_batch_size=64", "data.max_length=4096")


def remedy(plan_of: PlanOf, *settings: str) -> tuple[str, list[str]]:
    """Return how the refusal begins, and the changes that it offers."""
    with pytest.raises(ConfigError) as raised:
        plan_of(*EIGHT_H100, *settings)
    (problem,) = raised.value.problems
    advice, _, nearest = problem.remedy.partition(". Nearest that fit: ")
    return advice, nearest.split("; ")


def test_states_that_do_not_fit_need_other_machines_or_offload(plan_of: PlanOf) -> None:
    advice, changes = remedy(plan_of, "model=llama3_1_70b", "cluster.price_per_gpu_hour=2")
    assert advice == "use more ranks, deepspeed=zero3_offload, or name larger GPUs with cluster.gpu_type"
    nodes, offload, gpu = changes
    assert nodes.startswith("4 nodes of 8 GPUs (")
    assert offload.startswith("deepspeed.offload_optimizer=cpu (")
    assert offload.endswith(" GiB of main memory per node)")
    assert gpu.startswith("cluster.gpu_type=B200 (")
    for change in changes:
        assert " of 79 GiB" in change or " of 178 GiB" in change
        assert " tokens/s, $" in change, "its speed and its price"


def test_shorter_rows_are_offered_where_only_activations_do_not_fit(plan_of: PlanOf) -> None:
    long = ("data.max_length=262144", "model.config.max_position_embeddings=262144")
    settings = ("model=llama3_1_8b", *long, "train.global_batch_size=8")
    _, changes = remedy(plan_of, *settings)
    assert any(change.startswith("data.max_length=") for change in changes)


@pytest.mark.parametrize(
    ("settings", "offered"),
    [
        (("train.micro_batch_size=8", "data.max_length=32768"), "train.micro_batch_size=null ("),
        (("model.activation_checkpointing=none", "data.max_length=32768"), "model.activation_checkpointing=auto ("),
        # Either of the two would do; recomputing layers would take longer.
        (("train.micro_batch_size=8", "model.activation_checkpointing=none"), "train.micro_batch_size=null ("),
        (
            ("train.micro_batch_size=8", "model.activation_checkpointing=none", "data.max_length=32768"),
            "train.micro_batch_size=null model.activation_checkpointing=auto (",
        ),
    ],
)
def test_settings_that_are_too_large_are_left_to_the_plan(plan_of: PlanOf, settings: tuple[str, ...], offered: str) -> None:
    advice, (first, *_) = remedy(plan_of, "model=llama3_1_8b", *settings)
    assert advice == "leave to the plan what it can choose, or change the machines"
    assert first.startswith(offered)
    words = first.partition(" (")[0].split()
    # What is offered can be typed, and makes the run fit.
    assert plan_of(*EIGHT_H100, "model=llama3_1_8b", *settings, *words).peak is not None
