from __future__ import annotations

import pytest

from launcher.config.introspect import settings
from launcher.errors import did_you_mean


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("optim.learning_rate", None),
        ("train.max_step", "train.max_steps"),
        ("train.maxsteps", "train.max_steps"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("epochs", "train.epochs"),
        ("dta.max_length", "data.max_length"),
        ("data.sources[].pth", "data.sources[].path"),
        ("qqqqq", None),
        # A section is no help to someone who wrote a key inside it.
        ("train.qqqqq", None),
    ],
)
def test_a_setting_that_was_meant(word: str, meant: str | None) -> None:
    assert did_you_mean(word, list(settings())) == (f"did you mean {meant}?" if meant else "")


def test_a_name_that_several_sections_know() -> None:
    assert did_you_mean("kind", list(settings())) == "did you mean cluster.kind or tracking.kind?"


def test_every_setting_has_a_type_and_a_meaning() -> None:
    for setting in settings().values():
        assert setting.type, setting
        assert setting.meaning.endswith("."), setting
