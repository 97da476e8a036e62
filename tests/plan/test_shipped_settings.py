"""Every YAML file under conf/ composes, plans offline, and survives a round trip through JSON."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from plan_fixtures import ConfigOf, PlanOf, plan_lines
from transformers import AutoConfig, AutoModelForCausalLM

from launcher import facts as facts_module
from launcher.config.compose import compose_one, conf_dir
from launcher.config.run_file import render, to_values
from launcher.config.schema import RunConfig
from launcher.hardware import device
from launcher.models.found_model import find_model
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.plan_checks import find_warnings
from launcher.plan.planner import plan, sizing_inputs
from launcher.plan.sizing.combinations import USABLE_SHARE, choose_combination

# Published sizes: the Hub's sum over the safetensors headers, with a tied head counted once.
PARAMETERS = {
    "gemma3_1b": 999_885_952,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_3_70b": 70_553_706_496,
    "mistral_7b_v0_3": 7_248_023_552,
    "mistral_nemo_12b": 12_247_782_400,
    "mistral_small_24b": 23_572_403_200,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "olmoe_1b_7b": 6_919_161_856,
    "phi4": 14_659_507_200,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_32b": 32_762_123_264,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "smollm3_3b": 3_075_098_624,
}


def compose(*tokens: str) -> RunConfig:
    return compose_one(tokens).config


@pytest.mark.parametrize("text", ["${run.name}", r"\${oc.env:HOME}", r"\\${a}", r"a\b", "$"])
def test_a_text_that_looks_like_a_reference_is_read_back_as_it_was(text: str) -> None:
    """`init` copies text from a config.json on the Hub."""
    from omegaconf import OmegaConf

    assert OmegaConf.to_container(OmegaConf.create(render({"x": text})), resolve=True) == {"x": text}


def no_network(*args: Any, **kwargs: Any) -> NoReturn:
    raise AssertionError("a plan needs no network")


def test_shipped_settings_compose_plan_offline_and_survive_the_file(
    shipped_tokens: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n')
    config = compose(*shipped_tokens)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    planned = plan(config, facts_module.gather(config, find_model(config.model), shipped_tokens, device()))
    (tmp_path / "plan.json").write_text(planned.to_json())
    loaded = LaunchPlan.load(tmp_path / "plan.json")
    assert loaded == planned
    assert loaded.digest() == planned.digest()
    assert planned.deepspeed["zero_optimization"]["stage"] == 3
    assert not [line for line in plan_lines(planned) if "perf/mfu" in line], "the FLOPs of every shipped model are known"


@pytest.mark.rest
def test_shipped_settings_are_printed_as_a_file_that_composes_to_them(shipped_tokens: tuple[str, ...], tmp_path: Path) -> None:
    config = compose(*shipped_tokens)
    file = tmp_path / "printed.yaml"
    file.write_text(render(to_values(config, conf_dir())))
    assert compose(str(file)) == config


def test_every_file_under_conf_is_covered(request: pytest.FixtureRequest) -> None:
    models = {file.stem for file in (conf_dir() / "model").glob("*.yaml")}
    assert models == {*PARAMETERS, "demo", "tiny"}
    assert {folder.name for folder in conf_dir().iterdir() if folder.is_dir()} == {
        *("model", "data", "objective", "optim", "deepspeed", "cluster", "tracking", "experiment")
    }


@pytest.mark.rest
def test_the_plan_and_transformers_count_the_published_parameters(config_of: ConfigOf) -> None:
    sections = {name: config_of(f"model={name}").model for name in PARAMETERS}
    planned = {name: model_facts(model.config or {}, model.path, None, None).num_params for name, model in sections.items()}
    assert planned == PARAMETERS
    with torch.device("meta"):
        configs = {name: AutoConfig.for_model(**model.config) for name, model in sections.items()}
        models = {name: AutoModelForCausalLM.from_config(config) for name, config in configs.items()}
    assert {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()} == PARAMETERS


def test_experiments_fit_the_gpus_that_they_name(plan_of: PlanOf) -> None:
    names = {file.stem for file in (conf_dir() / "experiment").glob("*.yaml")}
    plans = {name: plan_of(f"experiment={name}", "data.path=rows.jsonl") for name in names}
    assert {planned.topology.world_size for planned in plans.values()} == {1, 8, 16, 32}
    for name, planned in plans.items():
        assert (planned.topology.device, planned.topology.backend) == ("cuda", "nccl")
        assert planned.memory.device_gib == 79.1
        assert planned.peak is not None
        assert planned.peak.peak_gib <= USABLE_SHARE * 79.1, name
        assert list(find_warnings(planned)) == [], name
        offloaded = planned.memory.host_per_node_gib > 0
        assert offloaded == name.endswith("_offload"), name
        if offloaded:
            inputs = sizing_inputs(planned)
            in_gpus = {"offload_optimizer": "none", "offload_params": "none"}
            section = inputs.config.deepspeed.model_copy(update=in_gpus)
            with_all = replace(inputs, config=inputs.config.model_copy(update={"deepspeed": section}))
            assert not choose_combination(with_all).fits, "offload would not be needed"
