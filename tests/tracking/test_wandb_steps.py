from __future__ import annotations

import pytest

from launcher.tracking.wandb_steps import offsets


@pytest.mark.parametrize(
    ("last_steps", "returns", "expected"),
    [
        ({}, {}, {}),
        ({1: 9, 2: 12}, {}, {1: 0, 2: 0}),
        ({1: 9, 2: 6, 3: 7}, {2: 4}, {1: 0, 2: 5, 3: 5}),
        ({1: 9, 2: 6, 3: 4}, {2: 4, 3: 2}, {1: 0, 2: 5, 3: 9}),
        # To the newest checkpoint, and an attempt that has measured nothing yet.
        ({1: 9}, {2: 9}, {1: 0, 2: 0}),
        ({1: 9}, {2: 3}, {1: 0, 2: 6}),
    ],
)
def test_what_follows_a_return_comes_after_all_before(
    last_steps: dict[int, int], returns: dict[int, int], expected: dict[int, int]
) -> None:
    assert offsets(last_steps, returns) == expected
