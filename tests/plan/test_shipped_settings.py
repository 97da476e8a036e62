"""Every YAML file under conf/ composes, plans, and survives a round trip through JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher import facts as facts_module
from launcher.config.compose import conf_dir, run_hydra
from launcher.config.schema import RunConfig
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import plan

# From the weights' own headers: the sums that Hugging Face shows for the safetensors of each repository.
PARAMETERS = {
    "smollm2_135m": 134_515_008,
    "qwen3_0_6b": 596_049_920,
    "qwen3_8b": 8_190_735_360,
    "llama3_1_8b": 8_030_261_248,
    "llama3_3_70b": 70_553_706_496,
    "mistral_small_24b": 23_572_403_200,
}


def compose(*tokens: str) -> RunConfig:
    compositions: list[RunConfig] = []
    run_hydra(tokens, lambda done: compositions.append(done.config))
    return compositions[0]


def test_shipped_settings_compose_and_survive_the_file(
    shipped_tokens: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "rows.jsonl").write_text('{"text": "one row"}\n')
    config = compose(*shipped_tokens)
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
    planned = plan(config, facts_module.gather(config, shipped_tokens))
    (tmp_path / "plan.json").write_text(planned.to_json())
    loaded = LaunchPlan.load(tmp_path / "plan.json")
    assert loaded == planned
    assert loaded.digest() == planned.digest()
    assert planned.deepspeed["zero_optimization"]["stage"] == 3


def test_every_file_under_conf_is_covered(request: pytest.FixtureRequest) -> None:
    models = {file.stem for file in (conf_dir() / "model").glob("*.yaml")}
    assert models == {*PARAMETERS, "demo", "tiny"}
    assert {folder.name for folder in conf_dir().iterdir() if folder.is_dir()} == {
        *("model", "data", "optim", "deepspeed", "cluster", "tracking", "experiment")
    }


@pytest.mark.parametrize(("model", "parameters"), PARAMETERS.items())
def test_parameters_are_counted_exactly(model: str, parameters: int) -> None:
    config = compose(f"model={model}").model
    assert config.config is not None
    assert model_facts(config.config, config.path, None, None).num_params == parameters


@pytest.mark.parametrize("experiment", ["llama3_8b_one_node", "llama3_70b_four_nodes"])
def test_experiments_plan_for_gpus_of_other_machines(plan_of: Callable[..., LaunchPlan], experiment: str) -> None:
    planned = plan_of(f"experiment={experiment}", "data.path=rows.jsonl")
    assert (planned.topology.device, planned.topology.backend) == ("cuda", "nccl")
    assert planned.memory.device_gib == 79.1
    assert planned.memory.per_rank_gib < planned.memory.device_gib
