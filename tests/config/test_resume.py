from __future__ import annotations

from collections.abc import Callable

import pytest

from launcher.config.compose import Composed
from launcher.config.resume import CHANGEABLE, with_overrides
from launcher.config.schema import RunConfig
from launcher.config.settings import settings
from launcher.errors import ConfigError, Problem


@pytest.fixture
def config(compose: Callable[..., list[Composed]]) -> RunConfig:
    return compose("model=tiny", "tracking=none")[0].config


def problems(config: RunConfig, *overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as error:
        with_overrides(config, overrides)
    assert all(problem.where == "command line" and problem.remedy for problem in error.value.problems)
    return list(error.value.problems)


def test_nothing_changes_without_overrides(config: RunConfig) -> None:
    assert with_overrides(config, []) == config


def test_a_changed_length(config: RunConfig) -> None:
    assert (config.train.max_steps, config.train.epochs) == (16, None)
    assert with_overrides(config, ["train.max_steps=20"]).train.max_steps == 20
    longer = with_overrides(config, ["train.epochs=2"]).train
    assert (longer.max_steps, longer.epochs) == (None, 2.0)


def test_values_keep_their_types(config: RunConfig) -> None:
    changed = with_overrides(config, ["optim.lr=1e-3", "tracking.tags=[a, b]", "train.export=false", "cluster.ranks_per_node=4"])
    assert (changed.optim.lr, changed.tracking.tags, changed.train.export) == (1e-3, ("a", "b"), False)
    assert changed.cluster.ranks_per_node == 4


def test_all_mistakes_in_one_pass(config: RunConfig) -> None:
    found = problems(
        config, "train.max_stepz=3", "data.max_length=64", "optim.lr=-1", "cluster.nodes=[", "word", "train.keep_last=0"
    )
    assert [p.what.split(":")[0] for p in found] == [
        "train.max_stepz",
        "data.max_length",
        "cluster.nodes",
        "word",
        "optim.lr",
        "train.keep_last",
    ]
    assert found[0].remedy == "did you mean train.max_steps?"
    assert "start another run with it; what may change: train.max_steps," in found[1].remedy
    assert (found[4].what, found[4].value) == ("optim.lr: must be above 0", "-1")


@pytest.mark.parametrize("key", ["run.seed", "run.name", "model.path", "model.dtype", "data.packing", "train.global_batch_size"])
def test_what_makes_it_another_run_is_refused(config: RunConfig, key: str) -> None:
    (problem,) = problems(config, f"{key}=1")
    assert problem.what == f"{key}: cannot change when a run is continued"


def test_what_may_change_exists() -> None:
    for key in CHANGEABLE:
        assert any(known == key or (key.endswith(".") and known.startswith(key)) for known in settings()), key
