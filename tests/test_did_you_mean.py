from __future__ import annotations

import pytest

from launcher.config.known_settings import _NAMES_ELSEWHERE, settings, suggest_setting
from launcher.errors import did_you_mean


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("optim.lrr", "optim.lr"),
        ("train.max_step", "train.max_steps"),
        ("train.maxsteps", "train.max_steps"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("epochs", "train.epochs"),
        ("dta.max_length", "data.max_length"),
        ("data.sources[].pth", "data.sources[].path"),
        ("qqqqq", None),
        # Suggesting a section does not help someone who typed a key inside it.
        ("train.qqqqq", None),
    ],
)
def test_a_setting_that_was_meant(word: str, meant: str | None) -> None:
    assert did_you_mean(word, list(settings())) == (f"did you mean {meant}?" if meant else "")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning-rate", "optim.lr"),
        ("optim.learnig_rate", "optim.lr"),
        ("batch_size", "train.global_batch_size"),
        ("train.batch_size", "train.global_batch_size"),
        ("per_device_train_batch_size", "train.micro_batch_size"),
        ("model.max_lenght", "data.max_length"),
        ("train.save_evry", "checkpoint.save_every"),
        ("optim.lrr", "optim.lr"),
        ("qqqqq", None),
    ],
)
def test_a_setting_is_suggested_across_sections_and_by_its_names_in_other_trainers(key: str, meant: str | None) -> None:
    assert suggest_setting(key) == (f"did you mean {meant}?" if meant else "")


def test_names_in_other_trainers_stand_for_settings_and_are_none_themselves() -> None:
    last_parts = {name.rpartition(".")[2] for name in settings() if "." in name}
    for setting, names in _NAMES_ELSEWHERE.items():
        assert setting in settings()
        assert last_parts.isdisjoint(names.split()), setting


def test_a_name_that_several_sections_know() -> None:
    assert did_you_mean("kind", list(settings())) == "did you mean cluster.kind or tracking.kind?"


def test_every_setting_has_a_type_and_a_meaning() -> None:
    for setting in settings().values():
        assert setting.type, setting
        assert setting.meaning.endswith("."), setting
