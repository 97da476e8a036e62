"""The checks of a node, before a start and for doctor; fakes replace only devices that are missing here."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_nvml import H100, OTHER, driver
from plan_fixtures import ConfigOf, config_of, facts_for
from torch.distributed import TCPStore

from launcher.clusters.check_results import FAILURE, OK, SHARED_FILE_VARIABLE, WARNING, CheckResult, MachineReport, ok
from launcher.errors import Problem, RunError
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import DataFacts, LaunchPlan
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.tracking.jsonl import read_events
from launcher.worker.checks import gpus, machine
from launcher.worker.checks.machine import CheckedNode
from launcher.worker.checks.node_check import CHECKS, Check, check_node, exchange, run_check, run_checks

__all__ = ["config_of", "driver"]

HOST = "slurm-calls-it-n7"
REPORT = MachineReport("n1", (CheckResult("packages", OK, "launcher 1.0, torch 2.13.0", must_match=True),))
Planned = Callable[..., tuple[LaunchPlan, RunDir]]
OfConfig = Callable[..., CheckedNode]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with a Slurm node name of its own, no GPU selection, and no wait for processes that end."""
    monkeypatch.setenv("SLURMD_NODENAME", HOST)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpus, "GRACE_S", 0.0)


@pytest.fixture
def node_of(config_of: ConfigOf, tmp_path: Path) -> OfConfig:
    """The node that doctor checks, with one rank on this device."""
    return lambda *tokens, device="cpu": CheckedNode(config_of(f"run.root={tmp_path}/runs", *tokens), device, 1)


@pytest.fixture
def planned(config_of: ConfigOf, tmp_path: Path) -> Planned:
    """A plan whose data cache and tokenizer exist, with attempt 1 started in its run directory."""

    def make(*tokens: str) -> tuple[LaunchPlan, RunDir]:
        config = config_of(f"run.root={tmp_path}/runs", *tokens)
        cache, tokenizer = tmp_path / "cache", tmp_path / "tokenizer"
        for folder in (cache, tokenizer):
            folder.mkdir()
        (cache / "meta.json").write_text("{}")
        counts = {name: 1000 for name, field in DataFacts.model_fields.items() if field.annotation is int}
        data = DataFacts(cache_dir=str(cache), padding_frac=0.0, **counts)
        model = model_facts(config.model.config or {}, None, str(tokenizer), None)
        facts = facts_for(config, data=data, working_dir=str(tmp_path))
        made = plan(config, facts.model_copy(update={"model": model}))
        run = run_store.create(made)
        run.attempt(1).mkdir()
        (run.attempt(1) / "attempt.json").write_text("{}")
        return made, run

    return make


def on_gpus(made: LaunchPlan, **topology: object) -> LaunchPlan:
    return made.model_copy(update={"topology": made.topology.model_copy(update={"device": "cuda", **topology})})


def failures(results: Iterator[CheckResult]) -> list[str]:
    shown = [*results]
    assert all(result.remedy for result in shown if result.verdict != OK)
    return [result.seen for result in shown if result.verdict == FAILURE]


def test_a_sound_node_has_no_problems_and_leaves_nothing_behind(planned: Planned) -> None:
    made, run = planned()
    report = check_node(made, 1)
    assert (report.machine, report.problems) == (HOST, ())
    (packages,) = [result for result in report.results if result.must_match]
    assert f"torch {importlib.metadata.version('torch')}" in packages.seen
    assert [file.name for file in run.attempt(1).iterdir()] == ["attempt.json"]
    assert json_records.decode(MachineReport, json.loads(json.dumps(json_records.encode(report))), "") == report


def test_all_problems_of_a_node_are_reported_at_once(planned: Planned, tmp_path: Path) -> None:
    made, _ = planned()
    (tmp_path / "cache/meta.json").unlink()
    (tmp_path / "tokenizer").rmdir()
    made = made.model_copy(
        update={
            "model": made.model.model_copy(update={"path": "/nowhere/model"}),
            "memory": made.memory.model_copy(update={"host_per_node_gib": 1e6}),
            "checkpoint_bytes": 1 << 60,
        }
    )
    problems = check_node(made, 1).problems
    expected = ("main memory", "room for a checkpoint", "data cache is not", "model is not", "tokenizer is not")
    assert len(problems) == len(expected), problems
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem.message
        assert problem.where == HOST
        assert problem.remedy


def test_a_run_directory_of_other_storage_is_a_problem(planned: Planned, tmp_path: Path) -> None:
    made, run = planned()
    (problem,) = check_node(made, 2).problems
    assert "lacks the attempt" in problem.message
    run.root.rename(tmp_path / "elsewhere")
    assert any("the run directory is not visible" in problem.message for problem in check_node(made, 1).problems)


def test_a_run_directory_that_cannot_be_written_is_a_problem(planned: Planned) -> None:
    made, run = planned()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        (problem,) = check_node(made, 1).problems
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in problem.message
    assert [file.name for file in run.attempt(1).iterdir()] == ["attempt.json"]


@pytest.mark.parametrize(("device", "num_ranks", "is_enough"), [("cuda", 8, False), ("cuda", 1, True), ("cpu", 8, True)])
def test_gpus_of_one_node_need_more_shared_memory_than_a_container_gets(
    node_of: OfConfig, monkeypatch: pytest.MonkeyPatch, device: str, num_ranks: int, is_enough: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=64 << 20, total=64 << 20))
    assert (failures(machine.check_shared_memory(replace(node_of(device=device), num_ranks=num_ranks))) == []) is is_enough


def test_adapters_need_their_devices(node_of: OfConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, devices = tmp_path / "infiniband", tmp_path / "devices"
    for name, path in (("ADAPTERS", kernel), ("ADAPTER_DEVICES", devices)):
        monkeypatch.setattr(machine, name, path)
    assert [*machine.check_adapters(node_of())] == []
    for folder in (kernel / "mlx5_0", devices):
        folder.mkdir(parents=True)
    assert [result.verdict for result in machine.check_adapters(node_of())] == [WARNING]
    (devices / "uverbs0").touch()
    assert [*machine.check_adapters(node_of())] == []


def test_the_code_digest_changes_with_the_content_of_python_files(planned: Planned) -> None:
    made, run = planned()

    def packages() -> str:
        return next(machine.check_packages(CheckedNode(made.config, "cpu", 1, made, 1))).seen

    first = packages()
    (run.code / "launcher/errors.pyc").write_bytes(b"compiled")
    assert packages() == first
    (run.code / "launcher/errors.py").write_bytes(b"\n")
    assert packages() != first


@pytest.mark.parametrize(
    ("tokens", "device", "num_missing"),
    [((), "cuda", 0), (("model.compile=true",), "cpu", 1), (("model.compile=true", "model.liger=true"), "cuda", 1)],
)
def test_compilers_that_the_settings_need_are_looked_for(
    node_of: OfConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tokens: tuple[str, ...], device: str, num_missing: int
) -> None:
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert len(failures(machine.check_build_tools(node_of(*tokens, device=device)))) == num_missing


def test_a_kernel_for_another_torch_fails_with_the_last_line_of_its_traceback(
    node_of: OfConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('flash_attn_2_cuda.so: undefined symbol')\n")
    (tmp_path / "flash_attn-2.8.3.dist-info").mkdir()
    (tmp_path / "flash_attn-2.8.3.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def of_flash_attention(*tokens: str) -> CheckResult:
        (result,) = [each for each in machine.check_kernels(node_of(*tokens)) if each.seen.startswith("flash-attn ")]
        return result

    found = of_flash_attention("model.attention=flash_attention_2")
    assert found.verdict == FAILURE
    assert found.seen.endswith("ImportError: flash_attn_2_cuda.so: undefined symbol")
    # With model.attention=auto, ranks use only a kernel that they can import.
    assert of_flash_attention().verdict == WARNING
    (package / "__init__.py").write_text("flash_attn_func = flash_attn_varlen_func = None\n")
    assert of_flash_attention().verdict == OK
    assert "flash-attn-3 is not installed" in failures(machine.check_kernels(node_of("model.attention=flash_attention_3")))[0]


def test_sound_gpus_of_the_planned_kind_pass(driver: Callable[..., None], planned: Planned, node_of: OfConfig) -> None:
    driver({**H100, "processes": [(os.getpid(), 500)]}, OTHER)
    node = replace(node_of("cluster.gpu_type=H100-80GB", device="cuda"), num_ranks=2)
    first, memory, _ = gpus.check_gpus(node)
    assert (first.verdict, first.seen, first.must_match) == (OK, f"2 x {H100['name']}", True)
    assert memory.seen == f"79.0 of 80.0 GiB free on {H100['uuid']}"
    made, _ = planned("cluster.ranks_per_node=2")
    (of_run,) = gpus.check_gpus(CheckedNode(made.config, "cuda", 2, made, 1))
    assert of_run.seen == H100["name"], "ranks of one run may be on some GPUs of a node only"


@pytest.mark.parametrize(
    ("gpu", "verdict", "words"),
    [
        ({"name": "NVIDIA A100-SXM4-80GB"}, FAILURE, "NVIDIA A100-SXM4-80GB found, H100-80GB planned"),
        ({"ecc": 3}, FAILURE, "GPU-bbbb: 3 errors"),
        ({"slowdowns": 0x80}, WARNING, "GPU-bbbb: power brake"),
        ({"free_gib": 20}, WARNING, "20.0 of 80.0 GiB free on GPU-bbbb"),
        (
            {"processes": [(999999999, 700)]},
            FAILURE,
            "process 999999999 of an unknown user: 700 MiB of GPU-bbbb",
        ),
    ],
)
def test_an_unfit_or_slow_gpu_is_reported(
    driver: Callable[..., None], node_of: OfConfig, gpu: dict[str, object], verdict: str, words: str
) -> None:
    driver(H100, {**OTHER, **gpu})
    results = gpus.check_gpus(replace(node_of("cluster.gpu_type=H100-80GB", device="cuda"), num_ranks=2))
    (found,) = [result for result in results if result.verdict != OK]
    assert found.verdict == verdict
    assert words in found.seen
    assert found.remedy


def test_a_driver_that_fails_or_is_missing_is_a_failure_for_runs_on_gpus(
    driver: Callable[..., None], node_of: OfConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(init="Driver Not Loaded")
    assert "Driver Not Loaded" in failures(gpus.check_gpus(node_of(device="cuda")))[0]
    monkeypatch.setattr("launcher.nvml.has_driver", lambda: False)
    assert [result.verdict for result in gpus.check_gpus(node_of())] == [WARNING]
    assert len(failures(gpus.check_gpus(node_of(device="cuda")))) == 1


def test_the_check_waits_for_a_process_that_is_ending(
    driver: Callable[..., None], node_of: OfConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "GRACE_S", 60.0)
    driver({**H100, "processes": [(999999998, 5)]})
    # A later process may be a rank of a local run, which does not wait for its check.
    later = {**H100, "processes": [(999999999, 5)]}
    monkeypatch.setattr(gpus, "time", SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: driver(later)))
    assert failures(gpus.check_gpus(node_of(device="cuda"))) == []


def test_a_slow_gpu_is_an_alert_and_a_missing_one_a_problem(driver: Callable[..., None], planned: Planned) -> None:
    made, run = planned("cluster.ranks_per_node=4")
    driver({**H100, "slowdowns": 0x80})
    (problem,) = [each for each in check_node(on_gpus(made), 1).problems if "GPU" in each.message]
    assert "1 found, 4 needed" in problem.message
    (alert,) = read_events(run.events)
    assert alert["kind"] == "alert"
    assert alert["text"].startswith(f"{HOST}: the clocks of a GPU are lowered")


@pytest.mark.rest
def test_torch_and_an_all_reduce_are_tried_in_processes_of_their_own(node_of: OfConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [result.verdict for result in gpus.check_torch(node_of())] == [OK]
    (result,) = gpus.check_all_reduce(node_of())
    assert (result.verdict, result.seen.partition(":")[0]) == (OK, "gloo over 2 processes on the CPU")
    monkeypatch.setattr(gpus, "COMPUTE_DEADLINE_S", 0.5)
    assert "did not end" in failures(gpus.check_all_reduce(node_of()))[0]
    # Either this torch has no CUDA or the machine has no GPU.
    monkeypatch.setattr("launcher.nvml.has_driver", lambda: True)
    monkeypatch.setattr(gpus, "COMPUTE_DEADLINE_S", 100.0)
    if not Path("/dev/nvidiactl").exists():
        assert len(failures(gpus.check_torch(node_of()))) == 1


def test_storage_is_measured_and_left_as_it_was(node_of: OfConfig, tmp_path: Path) -> None:
    speed, room = machine.check_run_storage(node_of())
    assert speed.verdict == OK
    assert "MB/s" in speed.seen
    assert "free" in room.seen
    assert list(tmp_path.iterdir()) == []


def test_storage_that_is_another_than_the_submitting_machines_is_a_failure(
    node_of: OfConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "known"
    monkeypatch.setenv(SHARED_FILE_VARIABLE, f"{file}=12ab")
    assert len(failures(machine.check_run_storage(node_of()))) == 1
    file.write_text("other")
    assert len(failures(machine.check_run_storage(node_of()))) == 1
    file.write_text("12ab")
    assert failures(machine.check_run_storage(node_of())) == []


def test_locks_without_effect_are_a_failure(node_of: OfConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    assert ["locks have no effect" in text for text in failures(machine.check_run_storage(node_of()))] == [True]


def test_a_check_that_hangs_or_raises_does_not_keep_the_others(node_of: OfConfig) -> None:
    def hanging(_: CheckedNode) -> Iterator[CheckResult]:
        yield ok("the first part")
        time.sleep(60)

    def raising(_: CheckedNode) -> Iterator[CheckResult]:
        yield ok("the first part")
        raise ValueError("broken")

    for function, message in ((hanging, "no answer within 0 s"), (raising, "ValueError: broken")):
        first, second = run_check(Check("name", function, 0.2), node_of())
        assert (first.name, first.verdict) == ("name", OK)
        assert (second.name, second.verdict) == ("name", FAILURE)
        assert message in second.seen


def test_a_start_runs_its_checks_only_and_imports_no_torch(planned: Planned) -> None:
    made, _ = planned()
    names = {result.name for result in run_checks(CheckedNode(made.config, "cpu", 1, made, 1))}
    assert names.isdisjoint({"torch", "all-reduce", "kernels"})
    assert all(0 < check.deadline_s <= 300 for check in CHECKS)
    code = "import sys; from launcher.worker.checks import node_check; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


def client(store: TCPStore) -> TCPStore:
    return TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))


def gather(store: TCPStore, reports: dict[int, MachineReport], hosts: list[str], deadline_s: float) -> dict[int, list[Problem]]:
    """The problems that each participating node receives; each node is a thread with its own connection."""
    received: dict[int, list[Problem]] = {}

    def take_part(index: int, report: MachineReport) -> None:
        received[index] = exchange(client(store), report, hosts, index, deadline_s)

    threads = [threading.Thread(target=take_part, args=item) for item in reports.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return received


def test_every_node_gets_the_problems_of_all_nodes(store: TCPStore) -> None:
    full = CheckResult("run.root", FAILURE, "a disk is full", "clear it")
    other = CheckResult("packages", OK, "launcher 1.0, torch 2.12.0", must_match=True)
    reports = {
        0: REPORT,
        1: replace(REPORT, machine="n2", results=(*REPORT.results, full)),
        2: replace(REPORT, machine="n3", results=(other,)),
        3: replace(REPORT, machine="n4"),
    }
    received = gather(store, reports, ["n1", "n2", "n3", "n4"], 30)
    assert received.keys() == reports.keys()
    assert [(problem.where, problem.message) for problem in received[0]] == [
        ("n2", "a disk is full"),
        ("n3", "nodes differ in packages: torch 2.12.0; most nodes: torch 2.13.0"),
    ]
    assert all(problems == received[0] for problems in received.values())


def test_nodes_that_do_not_report_are_named_at_the_deadline(store: TCPStore) -> None:
    started = time.monotonic()
    received = gather(store, {0: REPORT, 2: replace(REPORT, machine="n3")}, ["n1", "n2", "n3", "n4"], 1.0)
    assert 1.0 <= time.monotonic() - started < 10
    assert [problem.where for problem in received[0]] == ["n2", "n4"]
    assert received[2] == received[0]


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
    thread = threading.Thread(target=exchange, args=(slow, replace(REPORT, machine="n2"), hosts, 1, 30.0), daemon=True)
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
    with pytest.raises(RunError) as caught:
        exchange(connection, replace(REPORT, machine="n2"), ["n1", "n2"], 1, 5.0)
    assert caught.value.problems[0].where == "n2"
