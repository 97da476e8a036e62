"""The text of the batch script: golden files, submitit's own rendering, and how sbatch parses it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plan_fixtures import H100, PlanOf
from testbed_cluster import Testbed

from launcher.clusters.slurm import queue, sbatch
from launcher.clusters.slurm.cluster import SlurmCluster
from launcher.clusters.slurm.commands import slurm
from launcher.config.sections.slurm import SlurmSection
from launcher.errors import SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir

REPO = str(Path(__file__).resolve().parents[2])
PYTHON = "/srv/project/.venv/bin/python"

EVERYTHING: dict[str, Any] = {
    "nodes": 2,
    "account": "research",
    "partition": "main,high",
    "time": "2-12:30:00",
    "cpus_per_task": 96,
    "exclusive": True,
    "signal_lead_seconds": 300,
    "setup": [
        "module load cuda/12.8",
        "module load gcc/13.2.0",
        "source /opt/site/env.sh",
        "ulimit -l unlimited",
        "export SITE=a:b",
    ],
    "env": {"NCCL_IB_HCA": "^mlx5_0,mlx5_1", "OMP_NUM_THREADS": 12},
    "srun_args": ["--mpi=none", "--cpu-freq=high"],
    "additional_parameters": {
        "qos": "urgent",
        "gres": "gpu:h100:8,nvme:1",
        "mem": "900G",
        "constraint": "[rack1|rack2]&ib",
        "exclude": "n[7-9],n12",
        "nodelist": "n1",
        "reservation": "maintenance_2",
        "comment": "run 7: lr=1e-5, with care",
        "dependency": "afterok:12:13?singleton",
        "switches": "1@10:00",
        "contiguous": "",
    },
}
CASES: dict[str, dict[str, Any]] = {
    "slurm_plain": {"nodes": 2},
    "slurm_everything": {**EVERYTHING, "device": H100},
    "slurm_pyxis": {
        "nodes": 2,
        "device": H100,
        "container_image": "nvcr.io#nvidia/pytorch:25.10-py3",
        "container_mounts": ["/scratch:/scratch", "/opt/data:/data:ro"],
    },
    "slurm_apptainer": {
        "nodes": 2,
        "device": H100,
        "container_runtime": "apptainer",
        "container_image": "/opt/images/train.sif",
        "container_mounts": ["/scratch:/scratch"],
        "container_python": "/opt/venv/bin/python",
    },
    "slurm_no_requeue": {"nodes": 1, "requeue": False, "exclusive": False},
}


@pytest.fixture(autouse=True)
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set sys.executable to a path that is the same on every machine."""
    monkeypatch.setattr(sys, "executable", PYTHON)


def rendered(plan: LaunchPlan) -> str:
    return sbatch.render(plan, RunDir(Path(plan.run_dir)).plan)


@pytest.mark.parametrize("name", CASES)
def test_scripts_equal_the_golden_files(slurm_plan: PlanOf, golden: Callable[[str, str], None], name: str) -> None:
    text = rendered(slurm_plan(**CASES[name]))
    # The private group of the user who runs the tests is also trusted, so remove it.
    golden(f"{name}.sbatch", text.replace(f" '!' -gid {os.getgid()}", "") if os.getgid() else text)
    assert REPO not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""


def test_every_setting_occurs_in_a_golden_file() -> None:
    """Each Slurm setting has a distinctive value in a golden file, or does not affect the script."""
    no_part = {"kind", "interface", "node_checks", "exclude_bad_nodes"} | {
        name for name in SlurmSection.model_fields if name.startswith("max_")
    }
    of_all = {"ranks_per_node", "gpu_type", "price_per_gpu_hour", "timeout_minutes", "stall_seconds", "stop_grace_seconds"}
    set_somewhere = {name for case in CASES.values() for name in case}
    # Excluded by gres; tested below.
    assert SlurmSection.model_fields.keys() - no_part - of_all - set_somewhere == {"gpus_per_node"}


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"device": H100}, ["--gpus-per-node=8"]),
        ({"device": H100, "gpus_per_node": 4, "ranks_per_node": 4}, ["--gpus-per-node=4"]),
        ({"device": H100, "additional_parameters": {"gres": "gpu:8"}}, ["--gres=gpu:8"]),
        ({"device": H100, "additional_parameters": {"gres": "nvme:1"}}, ["--gpus-per-node=8", "--gres=nvme:1"]),
        ({"gpus_per_node": 0}, []),
        ({}, []),
    ],
)
def test_gpus_are_requested_once(slurm_plan: PlanOf, settings: dict[str, Any], options: list[str]) -> None:
    text = rendered(slurm_plan(**settings))
    assert re.findall(r"^#SBATCH (--g(?:pu|re)s.*)$", text, re.MULTILINE) == options


@pytest.mark.parametrize(
    ("settings", "memory"), [({}, "0"), ({"additional_parameters": {"mem": "64G"}}, "64G"), ({"exclusive": False}, None)]
)
def test_an_exclusive_node_is_requested_with_its_memory(slurm_plan: PlanOf, settings: dict[str, Any], memory: str | None) -> None:
    text = rendered(slurm_plan(**settings))
    assert re.findall(r"^#SBATCH --mem=(.*)$", text, re.MULTILINE) == ([] if memory is None else [memory])


@pytest.mark.parametrize("root", ["it's", "100%", "$HOME", "a;b", "a,b", "a\tb"])
def test_a_path_with_special_characters_is_refused_before_the_run_exists(slurm_plan: PlanOf, tmp_path: Path, root: str) -> None:
    plan = slurm_plan(str(tmp_path / root))
    with pytest.raises(SubmitError) as error:
        SlurmCluster().check(plan)
    (problem,) = error.value.problems
    assert problem.value.startswith(plan.run_dir)
    assert problem.remedy
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["with blank", "données"])
def test_a_path_with_blanks_or_accents_is_quoted(slurm_plan: PlanOf, tmp_path: Path, root: str) -> None:
    plan = slurm_plan(str(tmp_path / root))
    text = rendered(plan)
    assert f"#SBATCH --chdir='{plan.run_dir}'" in text
    assert f"#SBATCH --output='{plan.run_dir}/jobs/%j/%j_0_log.out'" in text
    assert f"export PYTHONPATH='{plan.run_dir}/code'" in text
    assert plan.run_dir not in re.sub(r"'[^']*'", "", text), "nowhere without quotes"


@pytest.mark.parametrize("root", ["with blank", "données"])
def test_a_path_that_a_container_cannot_mount_is_refused(slurm_plan: PlanOf, tmp_path: Path, root: str) -> None:
    plan = slurm_plan(str(tmp_path / root), container_image="/images/torch.sqsh", container_runtime="pyxis")
    with pytest.raises(SubmitError):
        SlurmCluster().check(plan)


@pytest.mark.slurm
@pytest.mark.parametrize("name", CASES)
def test_the_script_is_the_one_that_submitit_submits(slurm_plan: PlanOf, here: Testbed, name: str) -> None:
    import submitit

    plan = slurm_plan(**CASES[name])
    run = RunDir(Path(plan.run_dir))
    executor = submitit.SlurmExecutor(folder=run.jobs / "%j", python=sbatch.python_command(plan, run.plan))
    executor.update_parameters(**sbatch.parameters(plan, run.plan))
    assert rendered(plan) == executor._make_submission_file_text(executor._submitit_command_str, "") + "\n"


@pytest.fixture
def racks(here: Testbed) -> Iterator[None]:
    """Nodes with features."""
    slurm("scontrol", "update", "NodeName=n[1-2]", "AvailableFeatures=rack1,ib")
    slurm("scontrol", "update", "NodeName=n3", "AvailableFeatures=rack2,ib")
    yield
    slurm("scontrol", "update", "NodeName=n[1-3]", "ActiveFeatures=", "AvailableFeatures=")


@pytest.mark.slurm
def test_slurm_parses_the_options_of_the_script(slurm_plan: PlanOf, racks: None, tmp_path: Path) -> None:
    """sbatch parses quotes and comments by its own rules, so compare what it understood."""
    options = {
        **EVERYTHING["additional_parameters"],
        "nodelist": "n[1-2]",
        "exclude": "n3",
        "mem": "1G",
        "dependency": "singleton",
    }
    for name in ("gres", "reservation"):
        del options[name]
    here = {"time": "10", "cpus_per_task": 2, "additional_parameters": options}
    plan = slurm_plan(str(tmp_path), **{**EVERYTHING, **here})
    file = tmp_path / "job.sh"
    file.write_text(rendered(plan))
    job = slurm("sbatch", "--hold", "--parsable", str(file)).strip()
    try:
        details = queue.read_details(job)
        written = slurm("scontrol", "write", "batch_script", job, "-")
    finally:
        slurm("scancel", job)
    assert written == file.read_text()
    wanted = {
        "JobName": "tried",
        "Account": "research",
        "QOS": "urgent",
        "Partition": "main,high",
        "TimeLimit": "00:10:00",
        "NumNodes": "2-2",
        "ReqNodeList": "n[1-2]",
        "ExcNodeList": "n3",
        "Features": "[rack1|rack2]&ib",
        "CPUs/Task": "2",
        "MinMemoryNode": "1G",
        "OverSubscribe": "NO",
        "Contiguous": "1",
        "Requeue": "1",
        "Comment": "run 7: lr=1e-5, with care",
        "Dependency": "singleton(unfulfilled)",
        "WorkDir": plan.run_dir,
        "StdOut": f"{plan.run_dir}/jobs/{job}/{job}_0_log.out",
    }
    assert {key: details.get(key) for key in wanted} == wanted
