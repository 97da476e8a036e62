from __future__ import annotations

from pathlib import Path

import hand_made
import pytest

from launcher.tracking.wandb.steps import offsets, repeats


@pytest.mark.parametrize(
    ("last_steps", "returns", "expected"),
    [
        ({}, {}, {}),
        ({1: 9, 2: 12}, {}, {1: 0, 2: 0}),
        ({1: 9, 2: 6, 3: 7}, {2: 4}, {1: 0, 2: 5, 3: 5}),
        ({1: 9, 2: 6, 3: 4}, {2: 4, 3: 2}, {1: 0, 2: 5, 3: 9}),
        # A return to the newest checkpoint, by an attempt that has logged nothing yet.
        ({1: 9}, {2: 9}, {1: 0, 2: 0}),
        ({1: 9}, {2: 3}, {1: 0, 2: 6}),
    ],
)
def test_steps_after_a_return_come_after_all_earlier_steps(
    last_steps: dict[int, int], returns: dict[int, int], expected: dict[int, int]
) -> None:
    assert offsets(last_steps, returns) == expected


@pytest.mark.parametrize(
    ("overrides", "same"),
    [
        ([], True),
        (
            ["cluster.ranks_per_node=1", "tracking.project=x", "model.activation_checkpointing=true"],
            True,
        ),
        (["optim.lr=5e-6"], False),
        (["model.attention=eager"], False),
        (["train.micro_batch_size=1"], False),
        (["deepspeed.quantized_weights=true"], False),
        (["run.seed=7"], False),
    ],
)
def test_only_settings_that_change_results_end_the_repetition(tmp_path: Path, overrides: list[str], same: bool) -> None:
    plan = hand_made.plan(tmp_path, hand_made.SETTINGS)
    assert repeats(plan, hand_made.changed(plan, *overrides)) == same


@pytest.mark.parametrize(("schedule", "same"), [("cosine", False), ("constant", True)])
def test_the_number_of_steps_matters_to_a_schedule_that_decays(tmp_path: Path, schedule: str, same: bool) -> None:
    plan = hand_made.changed(hand_made.plan(tmp_path, hand_made.SETTINGS), f"optim.schedule={schedule}")
    longer = hand_made.changed(plan, "train.max_steps=80")
    assert repeats(plan, longer.model_copy(update={"batch": plan.batch.model_copy(update={"max_steps": 80})})) == same
