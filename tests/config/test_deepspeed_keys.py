"""The keys that `deepspeed.extra` accepts: the tables compared with the installed DeepSpeed, and the messages."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import deepspeed
import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from launcher.config import deepspeed_keys
from launcher.config.compose import Composed
from launcher.config.introspect import settings
from launcher.config.resume import with_overrides
from launcher.errors import ConfigError, Problem
from launcher.worker.checks.deepspeed_check import Recorder

Compose = Callable[..., list[Composed]]
Refused = Callable[..., list[Problem]]
TABLES = (deepspeed_keys.VALUES, deepspeed_keys.SECTIONS, deepspeed_keys.SET_BY, deepspeed_keys.REFUSED)


def test_the_tables_cover_the_keys_that_the_installed_deepspeed_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    # With a rank and a world size, DeepSpeed also reads the keys of other kinds of parallelism.
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda: 1)
    recorder = Recorder({"train_batch_size": 1})
    DeepSpeedConfig(recorder)
    source = inspect.getsource(deepspeed.initialize)
    in_initialize = set(re.findall(r"config(?:\[|\.get\()[\"'](\w+)", source)) | set(
        re.findall(r"[\"'](\w+)[\"'] in config", source)
    )
    assert "data_parallel_size" in in_initialize
    assert deepspeed_keys.top_level_keys() == set(recorder.looked_up) | in_initialize


def test_no_key_is_in_two_tables() -> None:
    assert [set(one) & set(other) for one, other in combinations(TABLES, 2)] == [set()] * 6


def test_the_keys_inside_sections_exist() -> None:
    models = {
        "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
        "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
        "zero_optimization": DeepSpeedZeroConfig,
    }
    removed = {key for key, reason in deepspeed_keys.REFUSED.items() if "removed" in reason}
    inside = {key for table in (*TABLES, deepspeed_keys._SET_FOR_NVME) for key in table if key.startswith("zero_optimization.")}
    for key in inside - removed:
        section, _, name = key.rpartition(".")
        assert name in {n for f, info in models[section].model_fields.items() for n in (f, info.alias)}, key


def test_every_setting_that_is_named_exists() -> None:
    assert set(deepspeed_keys.SET_BY.values()) <= set(settings())


@pytest.mark.parametrize(
    ("override", "what", "value", "remedy"),
    [
        (
            "zero_optimisation.overlap_comm=true",
            "zero_optimisation: DeepSpeed has no such key",
            "",
            "did you mean zero_optimization?",
        ),
        ("bf61.enabled=true", "bf61: DeepSpeed has no such key", "", "did you mean bf16?"),
        ("qqq=1", "qqq: DeepSpeed has no such key", "1", "lists DeepSpeed's keys"),
        ("bf16.enabled=false", "bf16.enabled: the launcher sets this from model.dtype", "false", "set model.dtype"),
        ("fp16.enabled=true", "fp16.enabled: the launcher sets this from model.dtype", "true", "set model.dtype"),
        ("bfloat16.enabled=true", "bfloat16: the launcher sets this from model.dtype", "", "set model.dtype"),
        ("fp16.hysteresis=3", "fp16: has no effect with model.dtype=auto", "", "set model.dtype=fp16, or remove it"),
        ("train_batch_size=4", "train_batch_size: the launcher sets this from train.global_batch_size", "4", "remove it"),
        ("data_types.grad_accum_dtype=bf16", "data_types: the memory plan counts gradients", "", "remove it"),
        ("amp.enabled=true", "amp: DeepSpeed has removed this feature", "", "remove it"),
        ("zero_optimization.stage=2", "zero_optimization.stage: only ZeRO stage 3 is supported", "2", "remove it"),
        (
            "zero_optimization.zero_quantized_gradients=true",
            "zero_optimization.zero_quantized_gradients: DeepSpeed 0.19.8 sums quantized gradients (qgZ) wrongly",
            "true",
            "remove it",
        ),
        ("zero_optimization=null", "zero_optimization: is not a mapping", "null", "write its keys one by one"),
        ("fp16=true", "fp16: is not a mapping", "true", "write its keys one by one"),
        (
            "zero_optimization.reduce_bucket_size=9",
            "zero_optimization.reduce_bucket_size: the launcher sets this from deepspeed.reduce_bucket_size",
            "9",
            "set deepspeed.reduce_bucket_size",
        ),
        (
            "zero_optimization.overlap_comm=auto",
            "zero_optimization.overlap_comm: only Hugging Face's Trainer fills in auto",
            "'auto'",
            "write the value",
        ),
        (
            "zero_optimization.offload_optimizer.device=cpu",
            "zero_optimization.offload_optimizer.device: the launcher sets this from deepspeed.offload_optimizer",
            "'cpu'",
            "set deepspeed.offload_optimizer=cpu",
        ),
        (
            "zero_optimization.offload_param.pin_memory=false",
            "zero_optimization.offload_param: has no effect with deepspeed.offload_params=none",
            "",
            "set deepspeed.offload_params to cpu or nvme",
        ),
    ],
)
def test_refused_keys_give_reason_and_remedy(refused: Refused, override: str, what: str, value: str, remedy: str) -> None:
    (problem,) = refused(f"deepspeed.extra.{override}")
    assert problem.message.startswith(f"deepspeed.extra.{what}")
    assert (problem.where, problem.value) == ("command line", value)
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    "key",
    [
        "sub_group_size",
        "stage3_max_live_parameters",
        "max_reuse_distance",
        "offload_param.buffer_size",
        "offload_param.nvme_path",
    ],
)
def test_what_the_plan_sets_for_states_on_nvme_is_refused(refused: Refused, key: str) -> None:
    (problem,) = refused("deepspeed=zero3_nvme", f"deepspeed.extra.zero_optimization.{key}=1")
    assert problem.message.startswith(f"deepspeed.extra.zero_optimization.{key}: ")


def test_all_refusals_come_in_one_pass_with_other_mistakes(refused: Refused) -> None:
    extra = (
        "{bf16: {enabled: false}, zero_optimisation: {}, zero_optimization: {stage: 2}, comet: {api_key: abcdef}, _target_: x}"
    )
    problems = refused(f"deepspeed.extra={extra}", "optim.lr=0")
    assert [problem.message.split(":")[0] for problem in problems] == [
        "deepspeed.extra.comet.api_key",
        "deepspeed.extra._target_",
        "deepspeed.extra.bf16.enabled",
        "deepspeed.extra.zero_optimisation",
        "deepspeed.extra.zero_optimization.stage",
        "optim.lr",
    ]


def test_a_refused_key_in_a_file_names_file_and_line(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "conf" / "deepspeed"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("name: mine\nextra:\n  zero_optimization:\n    stage: 2\n")
    (problem,) = refused("--config-dir", str(tmp_path / "conf"), "deepspeed=mine")
    assert problem.where == f"{folder}/mine.yaml:4"


@pytest.mark.parametrize(
    "extra",
    [
        "{zero_optimization: {round_robin_gradients: true, sub_group_size: 1000}, bf16: {immediate_grad_update: true}}",
        "{wall_clock_breakdown: true, communication_data_type: fp32, csv_monitor: {enabled: true}, aio: {queue_depth: 16}}",
    ],
)
def test_keys_that_tune_or_report_are_accepted(compose: Compose, extra: str) -> None:
    (composed,) = compose(f"deepspeed.extra={extra}")
    assert composed.config.deepspeed.extra


def test_states_in_main_memory_can_be_tuned(compose: Compose) -> None:
    (composed,) = compose("deepspeed=zero3_offload", "deepspeed.extra.zero_optimization.offload_optimizer.pin_memory=false")
    assert composed.config.deepspeed.extra == {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}


def test_a_resume_checks_the_keys_that_it_is_given_and_no_others(compose: Compose) -> None:
    config = compose("model=tiny")[0].config
    with pytest.raises(ConfigError, match=r"extra\.bf16\.enabled: the launcher sets this from model\.dtype"):
        with_overrides(config, ["deepspeed.extra={bf16: {enabled: false}}"])
    # A run that started before the key was refused can still be resumed.
    older = config.model_copy(update={"deepspeed": config.deepspeed.model_copy(update={"extra": {"amp": {}}})})
    assert with_overrides(older, ["train.max_steps=9"]).deepspeed.extra == {"amp": {}}
