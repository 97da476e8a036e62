"""The keys of `deepspeed.extra`, each provider's environment for `cluster=static`, and the page that lists all settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from settings_page import render

from launcher.config.command_line import GROUPS
from launcher.config.compose import Composed, conf_dir
from launcher.config.resume import with_overrides
from launcher.config.schema import settings
from launcher.config.sections.static import ONE_PER_NODE, NodeIdentity, StaticSection, identify
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


def of(environ: Mapping[str, str], **settings: object) -> NodeIdentity:
    section = StaticSection.model_validate({"kind": "static", **settings})
    return identify(section, environ, section.model_fields_set)


PROVIDERS = {
    "by hand": {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2222"},
    "Kubeflow Trainer": {
        "PET_NNODES": "3",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "10.0.0.1",
        "PET_MASTER_PORT": "2222",
        "PET_NPROC_PER_NODE": "8",
    },
    "PyTorchJob": {"WORLD_SIZE": "3", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2222"},
    "PyTorchJob with nprocPerNode": {
        **{"WORLD_SIZE": "24", "RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2222"},
        **{"PET_NNODES": "3:3", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": "8"},
    },
    "SageMaker": {"SM_HOSTS": '["10.0.0.1", "algo-2", "algo-3"]', "SM_CURRENT_HOST": "algo-2"},
    "Azure ML": {
        **{"AZUREML_NODE_COUNT": "3", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "2222"},
        **{"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "AZ_BATCH_MASTER_NODE": "10.0.0.1:6000"},
    },
    "Azure ML with MPI": {
        **{"AZUREML_NODE_COUNT": "3", "AZ_BATCH_MASTER_NODE": "10.0.0.1:6000"},
        **{"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
    },
    "RunPod": {
        **{"NUM_NODES": "3", "NODE_RANK": "1", "NUM_TRAINERS": "8", "WORLD_SIZE": "24"},
        **{"PRIMARY_ADDR": "10.0.0.1", "MASTER_ADDR": "10.0.0.1", "PRIMARY_PORT": "2222", "MASTER_PORT": "2222"},
    },
    "SkyPilot": {
        "SKYPILOT_NUM_NODES": "3",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3\n",
    },
    "srun": {"SLURM_STEP_NUM_NODES": "3", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "10.0.0.1,n[7-8]", "SLURM_LOCALID": "0"},
}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_variables_of_a_provider_tell_which_machine_this_is(provider: str) -> None:
    environ = PROVIDERS[provider]
    port = 2222 if "2222" in environ.values() else 29500
    assert of(environ) == NodeIdentity(1, 3, "10.0.0.1", port)


def test_settings_tell_it_without_any_variable() -> None:
    expected = NodeIdentity(1, 2, "gpu-0", 4000)
    assert of({}, nodes=2, node_rank=1, master_addr="gpu-0", master_port=4000) == expected
    # A setting precedes variables.
    assert of({"NNODES": "3", "NODE_RANK": "2"}, nodes=2, node_rank=1, master_addr="gpu-0", master_port=4000) == expected


def test_one_machine_needs_nothing() -> None:
    assert of({}) == NodeIdentity(0, 1, None, 29500)


@pytest.mark.parametrize(
    "environ, where",
    [
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "cluster.node_rank"),
        ({"NNODES": "2", "NODE_RANK": "1"}, "cluster.master_addr"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, "cluster.nodes"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "cluster.node_rank"),
        ({"PET_NNODES": "1:4", "NODE_RANK": "0"}, "PET_NNODES"),
        ({"NNODES": "two"}, "NNODES"),
        ({"SM_HOSTS": "algo-1", "SM_CURRENT_HOST": "algo-1"}, "SM_HOSTS"),
        ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-7"}, "SM_CURRENT_HOST"),
    ],
)
def test_what_is_missing_or_unreadable_is_named(environ: Mapping[str, str], where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of(environ)
    assert where in {problem.where for problem in caught.value.problems}


@pytest.mark.parametrize("name, most", ONE_PER_NODE.items())
def test_several_processes_on_one_machine_are_refused(name: str, most: int) -> None:
    assert of({name: str(most)})
    with pytest.raises(ConfigError):
        of({name: str(most + 1)})


def test_a_plan_counts_the_machines_without_knowing_which_one_this_is() -> None:
    section = StaticSection.model_validate({"kind": "static"})
    assert section.completed({"NNODES": "4"}) == StaticSection(nodes=4)


def test_a_setting_of_two_clusters_is_described_for_each() -> None:
    static = render().split("\n### cluster=static\n")[1]
    assert "Unset: NNODES or the provider's variable" in static


def test_the_page_has_every_setting_and_every_option() -> None:
    page = render()
    for key in settings():
        assert f"`{key}`" in page or f"\n## {key}\n" in page
    folders = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()}
    assert folders == set(GROUPS)
    for group in GROUPS:
        for file in (conf_dir() / group).glob("*.yaml"):
            assert f"- `{file.stem}`: " in page
            assert f"- `{file.stem}`: \n" not in page, f"{file} has no comment at its head"


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("model.dtype", "auto | bf16 | fp16 | fp32", "bf16"),
        ("train.max_steps", "int > 0 or null", "null"),
        ("optim.lr", "float > 0", "1e-05"),
        ("optim.betas", "[0 <= float <= 1, 0 <= float <= 1]", "[0.9, 0.95]"),
        ("data.eval_fraction", "0 <= float < 1", "0.0"),
        ("data.sources[].path", "text", None),
        ("deepspeed.hpz_partition_size", "int > 0 | node", "1"),
        ("tracking.tags", "list of name", "[]"),
        ("export.enabled", "true | false", "true"),
        ("model.config", "mapping or null", "null"),
    ],
)
def test_types_and_defaults_are_readable(key: str, type_: str, default: str | None) -> None:
    assert (settings()[key].type, settings()[key].default) == (type_, default)
