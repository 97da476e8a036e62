"""The files for rented nodes are accepted by the parsers of their tools, and their commands by the launcher."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import require_exit
from packaging.requirements import Requirement

from launcher.config.compose import compose_one
from launcher.config.sections.static import NodeIdentity, identify
from launcher.security.folders import Trust

DOCKER = Path(__file__).resolve().parents[1] / "docker"


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return document


def launcher_commands(text: str) -> list[list[str]]:
    """The arguments of each `python -m launcher` command in a text, with shell variables replaced."""
    joined = re.sub(r"\\\n\s*", " ", text)
    commands = re.findall(r"python -m launcher (\+cluster=ray[^\n|]*)", joined)
    return [
        shlex.split(re.sub(r"\$\w+", "10.0.0.1", command.replace("$here:$RAY_PORT", "10.0.0.1:6479"))) for command in commands
    ]


def assert_reaches_adapters(container: dict[str, Any]) -> None:
    """A container gets InfiniBand adapters, and may pin memory for them."""
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert container["resources"]["limits"]["rdma/ib"] == "1"
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


def test_ray_accepts_the_ssh_cluster_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(load("ray-ssh.yaml"))
    validate_config(config)
    assert config["provider"]["type"] == "local"
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        assert "ray start" not in command or "RAY_AUTH_MODE=token" in command
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    # NCCL needs the adapters, and memory that it may pin.
    assert {"--device=/dev/infiniband", "--cap-add=IPC_LOCK", "--ulimit=memlock=-1"} <= {*config["docker"]["run_options"]}


def test_the_kubernetes_job_is_complete() -> None:
    job = load("rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
        trust = Trust.from_environ(environment)
        # The volume belongs to root, and Kubernetes makes it writable for this group.
        assert trust.accepts_group(pod["securityContext"]["fsGroup"], owner=0)
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == volumes
            assert "/shared" in {mount["mountPath"] for mount in container["volumeMounts"]}
    (workers,) = spec["workerGroupSpecs"]
    worker = workers["template"]["spec"]["containers"][0]
    gpus = int(worker["resources"]["limits"]["nvidia.com/gpu"])
    assert_reaches_adapters(worker)
    assert f"cluster.nodes={workers['replicas']} cluster.ranks_per_node={gpus} " in job["spec"]["entrypoint"]


def test_the_pods_of_the_pytorchjob_run_one_command() -> None:
    """The file meets the operator's requirements, and its pods get a plan as machines of one run."""
    job = load("pytorchjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: spec["restartPolicy"] for name, spec in replicas.items()} == {"Master": "OnFailure", "Worker": "OnFailure"}
    assert replicas["Master"]["replicas"] == 1
    pods = [spec["template"]["spec"] for spec in replicas.values()]
    assert pods[0] == pods[1]
    (container,) = pods[0]["containers"]
    assert container["name"] == "pytorch"
    assert_reaches_adapters(container)
    assert pods[0]["securityContext"]["runAsNonRoot"] is True
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert Trust.from_environ(environment).accepts_group(pods[0]["securityContext"]["fsGroup"], owner=0)
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pods[0]["volumes"]}
    verb, *words = container["args"]
    assert verb == "train"
    config = compose_one(words).config
    assert (config.cluster.kind, config.run.root, config.run.name) == ("static", "/shared/runs", "llama")
    assert config.cluster.ranks_per_node == int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.cluster.stop_grace_seconds < pods[0]["terminationGracePeriodSeconds"]
    count = sum(spec["replicas"] for spec in replicas.values())
    pod = {"WORLD_SIZE": str(count), "RANK": "1", "MASTER_ADDR": "launcher-master-0", "MASTER_PORT": "23456"}
    assert identify(config.cluster, pod, config.cluster.model_fields_set) == NodeIdentity(1, count, "launcher-master-0", 23456)


def test_skypilot_accepts_the_task_file() -> None:
    task = load("skypilot.yaml")
    assert task["num_nodes"] == 2
    assert task["resources"]["network_tier"] == "best"
    assert all(value is None for value in task["secrets"].values()), "no key stands in the file"
    assert task["envs"]["RAY_memory_monitor_refresh_ms"] == "0"
    checked = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True, timeout=10)
    require_exit(checked)
    if importlib.util.find_spec("sky") is not None:
        import sky

        assert sky.Task.from_yaml(str(DOCKER / "skypilot.yaml")).num_nodes == 2


@pytest.mark.parametrize(
    "rank, start, wait_s, words",
    [
        ("0", "exit 1", "600", "Ray's head has ended on 10.0.0.1"),
        ("0", "exec sleep 60", "1", "Ray's head did not answer on 10.0.0.1 within 1 s"),
        ("1", "exit 1", "1", "10.0.0.2 could not join Ray at 10.0.0.1 within 1 s"),
    ],
)
def test_rented_nodes_do_not_wait_for_ever_for_a_ray_that_does_not_come(
    tmp_path: Path, rank: str, start: str, wait_s: str, words: str
) -> None:
    """`ray start` exits or hangs, and Ray's status is never available; the launcher is not reached."""
    task = load("skypilot.yaml")
    programs = {
        "ray": f'if [ "$1" = start ]; then {start}; fi; exit 1',
        "sleep": 'if [ "$1" != 60 ]; then set -- 0.1; fi; exec /bin/sleep "$1"',
        "python": "exit 0",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    node = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": rank, "RAY_WAIT_S": wait_s}
    env = {**task["envs"], **node, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", task["run"]], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert words in done.stderr


@pytest.mark.parametrize("name", ["rayjob.yaml", "skypilot.yaml"])
def test_the_commands_in_the_files_are_settings_of_the_launcher(name: str) -> None:
    document = load(name)
    text = document["spec"]["entrypoint"] if "spec" in document else document["run"]
    (command,) = launcher_commands(text)
    assert "--follow" in command
    config = compose_one([word for word in command if "=" in word]).config
    assert (config.cluster.kind, config.cluster.nodes, config.cluster.gpu_type) == ("ray", 2, "H100-80GB")
    assert config.run.root == "/shared/runs"


def test_the_entry_point_tells_verbs_from_programs(tmp_path: Path) -> None:
    for program in ("python", "ray"):
        (tmp_path / program).write_text(f'#!/bin/sh\necho {program} "$@"\n')
        (tmp_path / program).chmod(0o755)

    def run(*words: str) -> str:
        command = ["sh", DOCKER / "entrypoint.sh", *words]
        done = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=10)
        return done.stdout.strip()

    assert run("plan", "model=tiny") == "python -m launcher plan model=tiny"
    assert run("--help") == "python -m launcher --help"
    assert run("ray", "status") == "ray status"


def test_the_image_runs_as_nobody_special_and_holds_no_host_or_key() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert commands[0].startswith("ARG BASE_IMAGE=")
    assert [line for line in commands if line.startswith("USER ")] == ["USER launcher"]
    assert re.search(r"^ +useradd .*--uid \"\$\{USER_ID\}\" .* launcher$", text, re.MULTILINE)
    # NCCL opens libibverbs, which needs a provider for each kind of adapter.
    assert {"libibverbs1", "ibverbs-providers", "rdma-core"} <= {*text.split()}
    (user_id,) = re.findall(r"^ARG USER_ID=(\d+)$", text, re.MULTILINE)
    assert int(user_id) >= 1000
    assert load("rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"][
        "runAsUser"
    ] == int(user_id)
    assert not re.search(r"https?://|TOKEN=|API_KEY=", text)


def test_the_image_installs_the_wheel_and_begins_with_the_launcher() -> None:
    """The README's commands create the files that the Dockerfile copies; the entry point is the script in the same folder."""
    text = re.sub(r"\\\n\s*", " ", (DOCKER / "Dockerfile").read_text())
    instructions = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    copied = [rest.split() for name, rest in instructions if name == "COPY"]
    assert copied == [
        ["dist/*.whl", "dist/constraints.txt", "/tmp/dist/"],
        ["--chmod=0755", "entrypoint.sh", "/usr/local/bin/launcher-entrypoint"],
    ]
    assert "pip wheel --no-deps -w docker/dist . && cp constraints.txt docker/dist/" in (DOCKER / "README.md").read_text()
    (install,) = [rest for name, rest in instructions if name == "RUN" and "/tmp/dist" in rest]
    assert (
        "for wheel in /tmp/dist/*.whl; do /opt/launcher/bin/pip install --no-cache-dir -c /tmp/dist/constraints.txt "
        '"${TORCH}" "${wheel}[${EXTRAS}]"' in install
    )
    (extras,) = [rest.removeprefix("EXTRAS=").split(",") for name, rest in instructions if rest.startswith("EXTRAS=")]
    known = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= known.keys()
    named = dict(instructions)
    assert (json.loads(named["ENTRYPOINT"]), json.loads(named["CMD"])) == (["launcher-entrypoint"], ["--help"])
    assert named["ENV"].startswith("PATH=/opt/launcher/bin:")
    assert "RAY_memory_monitor_refresh_ms=0" in named["ENV"].split()
    # All steps that need root come before USER.
    assert max(i for i, (name, _) in enumerate(instructions) if name == "RUN") < [name for name, _ in instructions].index("USER")


def test_the_constraints_are_names_and_versions_that_the_project_accepts() -> None:
    lines = [line for line in (DOCKER.parent / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[\w.]+|torch>=[\d.]+,<[\d.]+", line)] == []
    pinned = {constraint.name: constraint.specifier for constraint in map(Requirement, lines)}
    project = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = map(Requirement, (*project["dependencies"], *extras["test"], *extras["dev"], *extras["ray-jobs"], *extras["s3"]))
    for requirement in needed:
        if requirement.name not in ("launcher", "torch"):
            (version,) = pinned[requirement.name.lower().replace("_", "-")]
            assert requirement.specifier.contains(version.version, prereleases=True), requirement.name
