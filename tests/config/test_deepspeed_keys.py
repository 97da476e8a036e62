"""The keys that `deepspeed.extra` accepts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.compose import Composed
from launcher.config.resume import with_overrides
from launcher.errors import ConfigError, Problem

Compose = Callable[..., list[Composed]]
Refused = Callable[..., list[Problem]]


@pytest.mark.parametrize(
    ("override", "key", "value", "remedy"),
    [
        ("zero_optimisation.overlap_comm=true", "zero_optimisation.overlap_comm", "true", "zero_optimization.overlap_comm?"),
        ("zero_optimization.stage=2", "zero_optimization.stage", "2", "remove it"),
        ("bf16.enabled=false", "bf16.enabled", "false", "remove it"),
        ("train_batch_size=4", "train_batch_size", "4", "remove it"),
        ("zero_optimization.zero_quantized_gradients=true", "zero_optimization.zero_quantized_gradients", "true", "remove it"),
        ("zero_optimization=null", "zero_optimization", "null", "remove it"),
        ("zero_optimization.offload_optimizer.device=cpu", "zero_optimization.offload_optimizer.device", "'cpu'", "remove it"),
        ("aio.use_gds=true", "aio.use_gds", "true", "remove it"),
    ],
)
def test_every_other_key_is_refused(refused: Refused, override: str, key: str, value: str, remedy: str) -> None:
    (problem,) = refused(f"deepspeed.extra.{override}")
    assert problem.message.startswith(f"deepspeed.extra.{key}: ")
    assert (problem.where, problem.value) == ("command line", value)
    assert remedy in problem.remedy


def test_all_refusals_come_in_one_pass_with_other_mistakes(refused: Refused) -> None:
    extra = "{bf16: {enabled: false}, zero_optimization: {stage: 2}, comet: {api_key: abcdef}, _target_: x}"
    problems = refused(f"deepspeed.extra={extra}", "optim.lr=0")
    assert [problem.message.split(":")[0] for problem in problems] == [
        "deepspeed.extra.comet.api_key",
        "deepspeed.extra._target_",
        "deepspeed.extra.bf16.enabled",
        "deepspeed.extra.zero_optimization.stage",
        "optim.lr",
    ]


def test_a_refused_key_in_a_file_names_file_and_line(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "deepspeed"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("offload_params: none\nextra:\n  zero_optimization:\n    stage: 2\n")
    (problem,) = refused("--config-dir", str(tmp_path / "conf"), "deepspeed=mine")
    assert problem.where == f"{folder}/mine.yaml:4"


@pytest.mark.parametrize(
    "extra",
    [
        "{zero_optimization: {round_robin_gradients: true, sub_group_size: 1000, leaf_module: {classes: [a.B]}}}",
        "{wall_clock_breakdown: true, communication_data_type: fp32, csv_monitor: {enabled: true}, aio: {queue_depth: 16}}",
        "{zero_optimization: {offload_optimizer: {pin_memory: false}}}",
    ],
)
def test_keys_that_tune_or_report_are_accepted(compose: Compose, extra: str) -> None:
    (composed,) = compose(f"deepspeed.extra={extra}")
    assert composed.config.deepspeed.extra


def test_a_resume_checks_the_keys_that_it_is_given(compose: Compose) -> None:
    config = compose("model=tiny")[0].config
    with pytest.raises(ConfigError, match=r"extra\.bf16\.enabled: "):
        with_overrides(config, ["deepspeed.extra={bf16: {enabled: false}}"])
