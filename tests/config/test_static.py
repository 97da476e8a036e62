"""How a machine finds out its node rank and the master address from each provider's environment variables."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from launcher.config.sections.static import ONE_PER_NODE, NodeIdentity, StaticSection, count_nodes, identify
from launcher.errors import ConfigError


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
    # Equal values do not conflict.
    assert of({"NNODES": "2", "NODE_RANK": "1"}, nodes=2, node_rank=1, master_addr="gpu-0", master_port=4000) == expected


def test_one_machine_needs_nothing() -> None:
    assert of({}) == NodeIdentity(0, 1, None, 29500)


@pytest.mark.parametrize(
    "environ, settings, where",
    [
        ({**PROVIDERS["by hand"], "PET_NNODES": "4"}, {}, "cluster.nodes"),
        (PROVIDERS["RunPod"], {"node_rank": 2}, "cluster.node_rank"),
        (PROVIDERS["by hand"], {"master_addr": "gpu-9"}, "cluster.master_addr"),
        (PROVIDERS["by hand"], {"master_port": 9}, "cluster.master_port"),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, {}, "cluster.node_rank"),
        ({"NNODES": "2", "NODE_RANK": "1"}, {}, "cluster.master_addr"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, {}, "cluster.nodes"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, {}, "cluster.node_rank"),
        ({"PET_NNODES": "1:4", "NODE_RANK": "0"}, {}, "PET_NNODES"),
        ({"NNODES": "two"}, {}, "NNODES"),
        ({"SM_HOSTS": "algo-1", "SM_CURRENT_HOST": "algo-1"}, {}, "SM_HOSTS"),
        ({"SM_HOSTS": '["algo-1"]', "SM_CURRENT_HOST": "algo-7"}, {}, "SM_CURRENT_HOST"),
    ],
)
def test_what_is_missing_contradictory_or_unreadable_is_named(
    environ: Mapping[str, str], settings: dict[str, object], where: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        of(environ, **settings)
    assert where in {problem.where for problem in caught.value.problems}


@pytest.mark.parametrize("name, most", ONE_PER_NODE.items())
def test_several_processes_on_one_machine_are_refused(name: str, most: int) -> None:
    assert of({name: str(most)})
    with pytest.raises(ConfigError):
        of({name: str(most + 1)})


def test_a_plan_counts_the_machines_without_knowing_which_one_this_is() -> None:
    section = StaticSection.model_validate({"kind": "static"})
    assert count_nodes(section, {"NNODES": "4"}, section.model_fields_set) == 4
    assert section.completed({"NNODES": "4"}) == StaticSection(nodes=4)
