from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.compose import Composed
from launcher.config.known_settings import settings
from launcher.config.resume import CHANGEABLE, FIXED, differences, require_same, with_overrides
from launcher.config.schema import RunConfig
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


def test_a_changed_length_unsets_the_other_length(config: RunConfig) -> None:
    assert (config.train.max_steps, config.train.epochs) == (16, None)
    assert with_overrides(config, ["train.max_steps=20"]).train.max_steps == 20
    longer = with_overrides(config, ["train.epochs=2"]).train
    assert (longer.max_steps, longer.epochs) == (None, 2.0)


def test_values_keep_their_types(config: RunConfig) -> None:
    changed = with_overrides(
        config, ["optim.lr=1e-3", "tracking.tags=[a, b]", "export.enabled=false", "cluster.ranks_per_node=4"]
    )
    assert (changed.optim.lr, changed.tracking.tags, changed.export.enabled) == (1e-3, ("a", "b"), False)
    assert changed.cluster.ranks_per_node == 4


def test_all_mistakes_in_one_pass(config: RunConfig) -> None:
    mistakes = problems(config, "train.max_stepz=3", "optim.lr=-1", "cluster.nodes=[", "word", "checkpoint.keep_last=0")
    assert [p.message.split(":")[0] for p in mistakes] == [
        "train.max_stepz",
        "cluster.nodes",
        "word",
        "optim.lr",
        "checkpoint.keep_last",
    ]
    assert mistakes[0].remedy == "did you mean train.max_steps?"
    assert mistakes[3].value == "-1"


def test_a_whole_group_is_refused_with_the_reason(config: RunConfig) -> None:
    model, data, experiment = problems(config, "model=qwen3_8b", "+data=jsonl", "experiment=other")
    assert model.message.startswith("model=qwen3_8b: ")
    assert "python -m launcher model.path=run:NAME" in model.remedy
    assert data.message.startswith("data=jsonl: ")
    assert experiment.message.startswith("experiment=other: ")


def refusal(saved: RunConfig, *overrides: str, force: bool = False) -> list[Problem]:
    with pytest.raises(ConfigError) as error:
        require_same(differences(saved, with_overrides(saved, overrides)), force, Path("first"), "checkpoints/step-00000003")
    assert all(problem.where == "checkpoints/step-00000003" and problem.remedy for problem in error.value.problems)
    return list(error.value.problems)


def test_refused_differences_are_shown_key_by_key(config: RunConfig) -> None:
    (problem,) = refusal(config, "data.max_length=64", "run.seed=7", "optim.lr=1e-3", "train.max_steps=99", "data.packing=true")
    assert problem.message.splitlines() == [
        "these settings differ from those that the checkpoint was saved with:",
        "                   checkpoint  requested",
        "  run.seed         42          7",
        "  data.max_length  256         64",
    ]
    assert "--force" in problem.remedy
    assert "another run" in problem.remedy


def test_lists_are_compared_entry_by_entry(config: RunConfig) -> None:
    (problem,) = refusal(config, "data.sources=[{name: stdlib_docs, path: builtin:stdlib_docs}, {name: more, path: more.jsonl}]")
    lines = [line.split() for line in problem.message.splitlines()[2:]]
    assert lines[:3] == [
        ["data.sources[1].name", "-", "'more'"],
        ["data.sources[1].path", "-", "'more.jsonl'"],
        ["data.sources[1].format", "-", "'auto'"],
    ]
    assert all(key.startswith("data.sources[1].") for key, *_ in lines)


def test_force_accepts_all_differences_but_fixed_settings(config: RunConfig) -> None:
    changed = with_overrides(config, ["data.max_length=64", "run.seed=7"])
    require_same(differences(config, changed), True, Path("first"), "")
    for override in (
        "model.path=./other",
        "run.name=b",
        "run.root=elsewhere",
        "model.config={hidden_size: 8}",
        "cluster.kind=ray",
    ):
        (problem,) = refusal(config, override, "run.seed=7", force=True)
        assert "not even with --force" in problem.message
        assert override.split("=")[0] in problem.message
        assert "run.seed" not in problem.message
        assert "model.path=run:first" in problem.remedy
    assert len(refusal(config, "run.name=b", "run.seed=7")) == 2


def test_the_same_value_is_no_difference(config: RunConfig) -> None:
    overrides = [
        f"run.seed={config.run.seed}",
        "model.dtype=auto",
        "data.packing=true",
        f"train.grad_clip={config.train.grad_clip}",
    ]
    assert differences(config, with_overrides(config, [*overrides, "train.max_steps=3", "cluster.ranks_per_node=4"])) == []


def test_data_path_changes_its_source(compose: Callable[..., list[Composed]]) -> None:
    config = compose("model=tiny", "data=jsonl", "data.path=a.jsonl")[0].config
    changed = with_overrides(config, ["data.path=b.jsonl"])
    assert [source.path for source in changed.data.sources] == ["b.jsonl"]
    assert [d.key for d in differences(config, changed)] == ["data.path", "data.sources[0].path"]


def test_settings_with_an_effect_are_not_free_to_change(config: RunConfig) -> None:
    """A setting in neither table must not change freely."""
    free_keys = {key for key in settings() if key.startswith(CHANGEABLE)}
    for key in ("data.max_length", "run.seed", "model.dtype", "optim.weight_decay", "train.global_batch_size", "train.grad_clip"):
        assert key not in free_keys


@pytest.mark.parametrize("keys", [CHANGEABLE, tuple(key for key in FIXED if not key.startswith("plan."))])
def test_every_key_in_the_tables_is_a_setting(keys: tuple[str, ...]) -> None:
    for key in keys:
        assert any(known == key or (key.endswith(".") and known.startswith(key)) for known in settings()), key
