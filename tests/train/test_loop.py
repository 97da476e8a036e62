"""What the loop tells those who watch it, with parts that only note what is asked of them."""

from __future__ import annotations

from types import SimpleNamespace

from launcher.train.loop import _Session


def test_who_waits_for_a_save_says_so_before() -> None:
    """Saving has a limit of its own; in the phase of training the watchdog would take the wait for a hang."""
    said: list[str] = []
    session = object.__new__(_Session)
    session.step = 7
    session.monitor = SimpleNamespace(beat=lambda phase, step: said.append(f"{phase} {step}"))  # type: ignore[assignment]
    session.checkpoints = SimpleNamespace(conclude=lambda step: said.append("waits"), saved_step=5)  # type: ignore[assignment]
    error = session._not_finite("the loss is nan")
    assert said == ["saving 7", "waits"]
    assert "the checkpoint of step 5 is kept" in str(error)
