"""How often one thing is told."""

from __future__ import annotations

from launcher.tracking.alerts import REPEAT_S, RateLimit


def test_what_lasts_is_told_again_after_a_while() -> None:
    now = [0.0]
    limit = RateLimit(lambda: now[0])
    assert limit.due("the loss jumped: it is 4")
    assert limit.due("training has become slow: 7 tokens/s"), "another kind"
    now[0] = REPEAT_S - 1
    assert not limit.due("the loss jumped: it is 5")
    now[0] = REPEAT_S
    assert limit.due("the loss jumped: it is 6")
    assert not limit.due("the loss jumped: it is 7")
