from __future__ import annotations

import importlib.util
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from launcher import nvml, run_store
from launcher.config.compose import run_hydra
from launcher.config.schema import RunConfig
from launcher.errors import Problem, RunError
from launcher.nvml import GpuInfo
from launcher.plan.architecture.facts import model_facts
from launcher.plan.launch_plan import DataFacts, DeviceFacts, Facts, LaunchPlan, Provenance
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.tracking.jsonl import read_events
from launcher.worker.checks import node_check
from launcher.worker.checks.node_check import NodeReport, check_node, differences, exchange

HOST = "slurm-calls-it-n7"
CPU = DeviceFacts(kind="cpu", name="a CPU", count=2, host_memory_gib=24.0)
H100 = "NVIDIA H100 80GB HBM3"
REPORT = NodeReport("n1", "c0de", {"launcher": "1.0", "torch": "2.13.0"}, "3.11.9", (H100, H100), 900.0, ())


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with a Slurm node name of its own and no GPU selection."""
    monkeypatch.setenv("SLURMD_NODENAME", HOST)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set the network adapters, whether their devices exist, the limit on locked memory, and the effective capabilities."""
    kernel, devices, own = tmp_path / "infiniband", tmp_path / "devices", tmp_path / "status"
    for name, path in (("ADAPTERS", kernel), ("ADAPTER_DEVICES", devices), ("OWN_STATUS", own)):
        monkeypatch.setattr(node_check, name, path)

    def install(has_devices: bool, locked_bytes: int, capabilities: int = 0) -> None:
        for folder in (kernel / "mlx5_0", devices):
            folder.mkdir(parents=True, exist_ok=True)
        if has_devices:
            (devices / "uverbs0").touch()
        own.write_text(f"Name:\tpython\nCapEff:\t{capabilities:016x}\n")
        monkeypatch.setattr(resource, "getrlimit", lambda kind: (locked_bytes, locked_bytes))

    return install


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., tuple[LaunchPlan, RunDir]]:
    """A plan whose data cache and tokenizer exist, with attempt 1 started in its run directory."""

    def make(*tokens: str) -> tuple[LaunchPlan, RunDir]:
        found: list[RunConfig] = []
        run_hydra(("model=tiny", f"run.root={tmp_path}/runs", *tokens), lambda done: found.append(done.config))
        cache, tokenizer = tmp_path / "cache", tmp_path / "tokenizer"
        for folder in (cache, tokenizer):
            folder.mkdir()
        (cache / "meta.json").write_text("{}")
        counts = {name: 1000 for name, field in DataFacts.model_fields.items() if field.annotation is int}
        facts = Facts(
            working_dir=str(tmp_path),
            device=CPU,
            model=model_facts(found[0].model.config or {}, None, str(tokenizer), None),
            data=DataFacts(cache_dir=str(cache), padding_frac=0.0, **counts),
            provenance=Provenance(created_at="2026-01-31T09:15:00Z", launcher_version="0.1.0", python="3.11.9", packages={}),
        )
        made = plan(found[0], facts)
        run = run_store.create(made)
        run.attempt(1).mkdir()
        (run.attempt(1) / "attempt.json").write_text("{}")
        return made, run

    return make


def only(report: NodeReport) -> Problem:
    (problem,) = report.problems
    assert problem.where == HOST
    assert problem.remedy
    return problem


def test_a_sound_node_has_no_problems_and_leaves_nothing_behind(planned: Callable[..., tuple[LaunchPlan, RunDir]]) -> None:
    made, run = planned()
    report = check_node(made, run, 1)
    assert report.problems == ()
    assert (report.host, report.gpus) == (HOST, ())
    assert {"launcher", "torch", "deepspeed", "transformers", "accelerate", "tokenizers", "ray"} <= set(report.packages)
    assert 0 < report.memory_gib < 1e5
    assert [file.name for file in run.attempt(1).iterdir()] == ["attempt.json"]
    assert NodeReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_all_problems_of_a_node_are_reported_at_once(planned: Callable[..., tuple[LaunchPlan, RunDir]], tmp_path: Path) -> None:
    made, run = planned()
    (tmp_path / "cache/meta.json").unlink()
    (tmp_path / "tokenizer").rmdir()
    made = made.model_copy(
        update={
            "model": made.model.model_copy(update={"path": "/nowhere/model"}),
            "memory": made.memory.model_copy(update={"host_per_node_gib": 1e6}),
            "checkpoint_bytes": 1 << 60,
        }
    )
    report = check_node(made, run, 2)
    said = [problem.message for problem in report.problems]
    expected = (
        "differs from that of the other nodes",
        "data cache",
        "model is not",
        "tokenizer",
        "room for a check",
        "main memory",
    )
    assert len(said) == len(expected), said
    for what, words in zip(said, expected, strict=True):
        assert words in what
    assert {problem.where for problem in report.problems} == {HOST}
    assert all(problem.remedy and problem.value for problem in report.problems)
    snapshot = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/b968826d"
    of_the_hub = made.model_copy(update={"model": made.model.model_copy(update={"path": snapshot})})
    (unseen,) = [problem for problem in node_check._check_inputs(of_the_hub) if problem.value == snapshot]
    assert unseen.remedy.startswith("set HF_HOME to a folder on shared storage")
    assert NodeReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_a_run_directory_that_is_not_mounted_is_reported(
    planned: Callable[..., tuple[LaunchPlan, RunDir]], tmp_path: Path
) -> None:
    made, run = planned()
    run.root.rename(tmp_path / "elsewhere")
    said = [problem.message for problem in check_node(made, run, 1).problems]
    assert said[0] == "the run directory is not visible"


def test_a_run_directory_that_cannot_be_written_is_reported(planned: Callable[..., tuple[LaunchPlan, RunDir]]) -> None:
    made, run = planned()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        report = check_node(made, run, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert only(report).message == "the run directory cannot be written: File too large"
    assert [file.name for file in run.attempt(1).iterdir()] == ["attempt.json"]


@pytest.mark.parametrize(
    "own, limits, gib",
    [
        ("0::/slurm/job_7/step_0/task_0\n", {"v2/slurm/job_7/memory.max": 2 << 30, "v2/slurm/memory.max": "max"}, 2.0),
        ("0::/\n", {"v2/memory.max": 3 << 30}, 3.0),
        (
            "9:pids:/x\n4:memory:/slurm/uid_0/job_7\n0::/\n",
            {"v1/slurm/uid_0/job_7/memory.limit_in_bytes": 1 << 30, "v1/memory.limit_in_bytes": (1 << 63) - 4096},
            1.0,
        ),
    ],
)
def test_available_memory_is_limited_by_the_control_groups(
    planned: Callable[..., tuple[LaunchPlan, RunDir]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    own: str,
    limits: dict[str, int | str],
    gib: float,
) -> None:
    made, run = planned()
    (tmp_path / "own").write_text(own)
    for file, limit in limits.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"{limit}\n")
    roots = {"": (tmp_path / "v2", "memory.max"), "memory": (tmp_path / "v1", "memory.limit_in_bytes")}
    monkeypatch.setattr(node_check, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(node_check, "CGROUP_MEMORY", roots)
    enough, more = (made.memory.model_copy(update={"host_per_node_gib": needed}) for needed in (gib, gib + 0.1))
    report = check_node(made.model_copy(update={"memory": enough}), run, 1)
    assert (report.memory_gib, report.problems) == (gib, ())
    problem = only(check_node(made.model_copy(update={"memory": more}), run, 1))
    assert f"{gib:.1f} GiB available, {gib + 0.1:.1f} GiB needed" in problem.value


def may_mount() -> bool:
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    return bool(shutil.which("unshare")) and subprocess.run(command, capture_output=True, timeout=20).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_too_little_shared_memory_is_reported(planned: Callable[..., tuple[LaunchPlan, RunDir]]) -> None:
    _, run = planned()
    code = (
        "import json, sys; from pathlib import Path; from launcher.plan.launch_plan import LaunchPlan;"
        "from launcher.plan.run_dir import RunDir; from launcher.worker.checks.node_check import check_node;"
        f"run = RunDir(Path({str(run.root)!r}));"
        "print(json.dumps(check_node(LaunchPlan.load(run.plan), run, 1).to_json()));"
        "assert 'torch' not in sys.modules"
    )
    shell = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "{sys.executable}" -c "$0"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", shell, code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    problem = only(NodeReport.from_json(json.loads(done.stdout)))
    assert problem.value == "/dev/shm: 1 MiB free, 64 MiB needed"


@pytest.mark.parametrize(("device", "num_ranks", "is_enough"), [("cuda", 8, False), ("cuda", 1, True), ("cpu", 8, True)])
def test_gpus_of_one_node_need_more_shared_memory_than_a_container_gets(
    planned: Callable[..., tuple[LaunchPlan, RunDir]],
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    num_ranks: int,
    is_enough: bool,
) -> None:
    made, run = planned()
    made = made.model_copy(update={"topology": made.topology.model_copy(update={"device": device})})
    monkeypatch.setattr(node_check, "_free_bytes", lambda folder: 64 << 20 if folder == node_check.SHARED_MEMORY else 1 << 50)
    monkeypatch.setattr(node_check.gpu_check, "check_gpus", lambda needed, section: ((H100,) * needed, []))
    report = check_node(made, run, 1, num_ranks)
    assert is_enough == (not report.problems)
    if not is_enough:
        assert only(report).value == "/dev/shm: 64 MiB free, 1024 MiB needed"


@pytest.mark.parametrize(("device", "package"), [("cpu", "g++"), ("cuda", "gcc")])
def test_what_the_settings_need_to_build_kernels_is_looked_for_on_every_node(
    planned: Callable[..., tuple[LaunchPlan, RunDir]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, package: str
) -> None:
    made, run = planned("model.compile=true", "model.liger=true")
    made = made.model_copy(update={"topology": made.topology.model_copy(update={"device": device}), "liger": device == "cuda"})
    monkeypatch.setattr(node_check.gpu_check, "check_gpus", lambda needed, section: ((H100,) * needed, []))
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    compiler, *others = check_node(made, run, 1, 1).problems
    needed = "model.compile=true and model.liger=true" if device == "cuda" else "model.compile=true"
    assert compiler.message.endswith(f"compiler is found, for {needed}")
    assert compiler.remedy == f"apt-get install {package}, or set {needed.replace('true', 'false')}"
    if importlib.util.find_spec("liger_kernel") is None:
        assert [problem.message for problem in others] == (["Liger is not installed"] if device == "cuda" else [])
    # With `auto`, each rank tries for itself, so the node check reports nothing.
    settings = made.config.model.model_copy(update={"compile": False, "liger": "auto"})
    made = made.model_copy(update={"config": made.config.model_copy(update={"model": settings})})
    assert check_node(made, run, 1, 1).problems == ()


def test_the_code_digest_is_of_python_files_by_name_and_content(planned: Callable[..., tuple[LaunchPlan, RunDir]]) -> None:
    made, run = planned()
    file = run.code / "launcher/errors.py"
    first, content = check_node(made, run, 1).code, file.read_bytes()
    (run.code / "launcher/errors.pyc").write_bytes(b"compiled")
    assert check_node(made, run, 1).code == first
    file.write_bytes(content + b"\n")
    assert check_node(made, run, 1).code != first
    file.write_bytes(content)
    assert check_node(made, run, 1).code == first
    # The new name leaves the order of the files unchanged.
    file.rename(run.code / "launcher/errorz.py")
    assert check_node(made, run, 1).code != first


@pytest.mark.parametrize(
    ("has_devices", "locked_bytes", "capabilities", "expected"),
    [
        (True, resource.RLIM_INFINITY, 0, []),
        # CAP_IPC_LOCK
        (True, 8 << 20, 1 << 14, []),
        (True, 8 << 20, 1 << 13, ["locked memory is limited"]),
        (False, 8 << 20, 0, ["the network adapters cannot be opened here, so NCCL uses TCP", "locked memory is limited"]),
    ],
)
def test_adapters_need_their_devices_and_memory_that_may_be_locked(
    adapters: Callable[..., None], has_devices: bool, locked_bytes: int, capabilities: int, expected: list[str]
) -> None:
    assert node_check.adapter_problems() == []
    adapters(has_devices, locked_bytes, capabilities)
    problems = node_check.adapter_problems()
    assert [problem.message.partition(", so NCCL may")[0] for problem in problems] == expected
    assert all(problem.remedy for problem in problems)


def test_kernels_that_ranks_may_choose_must_be_the_same_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("flash_attn", "flash_attn_3", "flash_attn_4"):
        (tmp_path / f"{name}-1.2.dist-info").mkdir()
        (tmp_path / f"{name}-1.2.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    versions = node_check._packages()
    assert [versions[name] for name in ("flash-attn", "flash-attn-3", "flash-attn-4")] == ["1.2"] * 3


def test_a_gpu_problem_is_a_problem_of_its_node(
    planned: Callable[..., tuple[LaunchPlan, RunDir]], monkeypatch: pytest.MonkeyPatch, adapters: Callable[..., None]
) -> None:
    made, run = planned("cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=4")
    made = made.model_copy(update={"topology": made.topology.model_copy(update={"nodes": 2})})
    adapters(has_devices=False, locked_bytes=resource.RLIM_INFINITY)
    slow = GpuInfo("GPU-aaaa", H100, "0000:3b:00", 80.0, 0, pcie_lanes=4, most_pcie_lanes=16)
    monkeypatch.setattr(nvml, "list_gpus", lambda deadline_s: [slow])
    monkeypatch.setattr(nvml, "list_processes", lambda deadline_s: [])
    report = check_node(made, run, 1)
    assert report.gpus == (H100,)
    assert "1 found, 4 needed" in only(report).value
    # A slow GPU is no reason to refuse the node, but an alert.
    alert, of_network = read_events(run.events)
    assert alert["kind"] == of_network["kind"] == "alert"
    assert "the network adapters cannot be opened here, so NCCL uses TCP (mlx5_0)" in of_network["text"]
    assert alert["text"].startswith(f"{HOST}: a GPU's PCIe link has fewer lanes")
    assert f"{H100} GPU-aaaa: 4 of 16 lanes" in alert["text"]


@pytest.mark.parametrize(
    "change, what, value",
    [
        ({"code": "beef"}, "the code of the run", "n2: beef; n1: c0de"),
        ({"packages": {"launcher": "1.0", "torch": "2.12.0"}}, "the version of torch", "n2: 2.12.0; n1: 2.13.0"),
        ({"packages": {"launcher": "1.0"}}, "the version of torch", "n2: none; n1: 2.13.0"),
        ({"python": "3.12.1"}, "the version of Python", "n2: 3.12.1; n1: 3.11.9"),
        ({"gpus": (H100, "NVIDIA A100-SXM4-80GB")}, "the GPU model", f"n2: NVIDIA A100-SXM4-80GB, {H100}; n1: {H100}"),
    ],
)
def test_a_difference_from_the_head_node_is_reported_with_both_values(change: dict[str, object], what: str, value: str) -> None:
    (problem,) = differences(replace(REPORT, host="n2", **change), REPORT)
    assert problem.message == f"{what} differs from the head node's"
    assert (problem.where, problem.value) == ("n2", value)
    assert problem.remedy


def test_equal_nodes_do_not_differ() -> None:
    assert differences(replace(REPORT, host="n2", memory_gib=1.0, gpus=(H100,), problems=(Problem("x"),)), REPORT) == []


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def client(store: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))


def gather(store: TCPStore, reports: dict[int, NodeReport], hosts: list[str], deadline_s: float) -> dict[int, list[Problem]]:
    """The problems that each participating node receives; each node is a thread with its own connection."""
    told: dict[int, list[Problem]] = {}

    def take_part(place: int, report: NodeReport) -> None:
        told[place] = exchange(client(store), report, hosts, place, deadline_s, "try-1")

    threads = [threading.Thread(target=take_part, args=item) for item in reports.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return told


def test_every_node_gets_the_problems_of_all_nodes(store: TCPStore) -> None:
    broken = Problem("a disk is full", where="n2", value="/", remedy="clear it")
    reports = {
        0: REPORT,
        1: replace(REPORT, host="n2", problems=(broken,)),
        2: replace(REPORT, host="n3", python="3.12.1"),
        3: replace(REPORT, host="n4"),
    }
    told = gather(store, reports, ["n1", "n2", "n3", "n4"], 30)
    assert told.keys() == reports.keys()
    assert told[0] == [broken, *differences(reports[2], REPORT)]
    assert all(problems == told[0] for problems in told.values())


def test_nodes_that_do_not_report_are_named_at_the_deadline(store: TCPStore) -> None:
    started = time.monotonic()
    told = gather(store, {0: REPORT, 2: replace(REPORT, host="n3")}, ["n1", "n2", "n3", "n4"], 1.0)
    assert 1.0 <= time.monotonic() - started < 10
    assert [problem.where for problem in told[0]] == ["n2", "n4"]
    assert all("did not report within 1 s" in problem.message and problem.where in problem.remedy for problem in told[0])
    assert told[2] == told[0]


def test_the_other_nodes_report_a_missing_head_node(store: TCPStore) -> None:
    told = gather(store, {1: replace(REPORT, host="n2", python="3.12.1")}, ["n1", "n2"], 0.5)
    assert [(problem.where, problem.message) for problem in told[1]] == [("n1", "the node did not report within 0.5 s")]


def test_the_head_node_stays_until_the_slowest_has_read(store: TCPStore) -> None:
    class Slow:
        """A connection that reads slowly."""

        def __init__(self) -> None:
            self.connection, self.read_at = client(store), 0.0

        def set(self, key: str, value: str) -> None:
            self.connection.set(key, value)

        def wait(self, keys: list[str], timeout: timedelta) -> None:
            self.connection.wait(keys, timeout)

        def get(self, key: str) -> bytes:
            time.sleep(0.4)
            self.read_at = time.monotonic()
            return self.connection.get(key)

    slow, hosts = Slow(), ["n1", "n2"]
    thread = threading.Thread(target=exchange, args=(slow, replace(REPORT, host="n2"), hosts, 1, 30.0), daemon=True)
    thread.start()
    assert exchange(store, REPORT, hosts, 0, 30.0) == []
    ended = time.monotonic()
    thread.join(timeout=30)
    assert 0 < slow.read_at < ended


def test_a_lost_connection_to_the_store_is_reported_as_a_run_error() -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    connection = client(server)
    # The server stops when its last reference is gone.
    del server
    with pytest.raises(RunError, match="connection to the head node broke") as caught:
        exchange(connection, replace(REPORT, host="n2"), ["n1", "n2"], 1, 5.0)
    assert caught.value.problems[0].where == "n2"


def test_rounds_with_other_prefixes_do_not_meet(store: TCPStore) -> None:
    hosts = ["n1", "n2"]
    assert len(exchange(store, REPORT, hosts, 0, 0.2, "try-1")) == 1
    (problem,) = exchange(store, replace(REPORT, host="n2"), hosts, 1, 0.2, "try-2")
    assert problem.where == "n1"
