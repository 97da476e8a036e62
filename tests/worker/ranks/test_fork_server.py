"""A real fork server, with no heavy imports, forks ranks; the environment and setup of a rank's process.

The CPUs near a PCI device, read from a copy of the kernel's files.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from pace import wait_for
from plan_fixtures import H100, ConfigOf, PlanOf, config_of, facts_for, plan_of

from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.train import loop
from launcher.train.finish import Outcome
from launcher.worker.ranks import fork_server, rank_env, rank_main
from launcher.worker.ranks.rank_env import RankEnv, RankTitle, allocator_defaults, choose_cpus, cpus_near, num_busy_threads
from launcher.worker.ranks.rank_process import ForkedProcess, ForkFailed, ForkServer, RankProcesses
from launcher.worker.signals import CANCEL, StopFlag

__all__ = ["config_of", "plan_of"]
REPO = Path(__file__).resolve().parents[3]
PR_GET_CHILD_SUBREAPER = 37
DEADLINE_S = 30.0
# The server runs LAUNCHER_STACK as its imports, and a rank runs LAUNCHER_SCRIPT.
HOOK = """
import os, sys, types

if {"launcher.worker.ranks.rank_main", "launcher.worker.ranks.fork_server"} & {*sys.orig_argv}:
    entry, preload = types.ModuleType("launcher.worker.ranks.rank_main"), types.ModuleType("launcher.train.preload")
    entry.main = lambda plan_path, attempt: exec(os.environ["LAUNCHER_SCRIPT"], {"plan_path": plan_path, "attempt": attempt})
    preload.import_stack = lambda plan, tracks: exec(os.environ.get("LAUNCHER_STACK", ""), {})
    sys.modules |= {"launcher.worker.ranks.rank_main": entry, "launcher.train.preload": preload}
"""
TELL = """
import json, os, sys
seen = {"env": dict(os.environ), "argv": sys.argv, "parent": os.getppid(), "cwd": os.getcwd(), "input": sys.stdin.read()}
json.dump(seen | {"arguments": [plan_path, attempt]}, open("seen" + os.environ["RANK"], "w"))
"""
LEAVE_AN_ORPHAN = """
import os, time
if pid := os.fork():
    open("orphan", "w").write(str(pid))
else:
    time.sleep(60)
"""
FIRST, SECOND = set(range(8)), set(range(8, 16))
NEAR = [FIRST] * 4 + [SECOND] * 4


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(HOOK)
    return {**os.environ, "PYTHONPATH": f"{hook}:{REPO}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def plan_path(config_of: ConfigOf, tmp_path: Path) -> str:
    config = config_of("tracking=none", "run.name=tried")
    (tmp_path / "plan.json").write_text(plan(config, facts_for(config, working_dir=str(tmp_path))).to_json())
    return str(tmp_path / "plan.json")


@pytest.fixture
def server(plan_path: str, environment: Mapping[str, str], tmp_path: Path) -> Iterator[ForkServer]:
    server = ForkServer(plan_path, environment, tmp_path)
    yield server
    server.close()


@pytest.fixture
def fork(server: ForkServer, plan_path: str, environment: Mapping[str, str]) -> Callable[..., ForkedProcess]:
    return lambda script, **variables: server.fork((plan_path, "3"), {**environment, "LAUNCHER_SCRIPT": script, **variables})


@pytest.mark.rest
def test_a_forked_rank_is_a_child_with_its_arguments_and_environment(
    fork: Callable[..., ForkedProcess], plan_path: str, tmp_path: Path
) -> None:
    ranks = [fork(TELL, RANK=str(rank), MASTER_PORT=f"400{rank}", TORCHELASTIC_RESTART_COUNT="2") for rank in (0, 1)]
    assert [rank.wait(DEADLINE_S) for rank in ranks] == [0, 0]
    for number in (0, 1):
        seen = json.loads((tmp_path / f"seen{number}").read_text())
        assert seen["parent"] == os.getpid()
        assert (seen["cwd"], seen["input"], seen["arguments"]) == (str(tmp_path), "", [plan_path, 3])
        assert seen["argv"][1:] == [plan_path, "3"]
        variables = {name: seen["env"][name] for name in ("RANK", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")}
        assert variables == {"RANK": str(number), "MASTER_PORT": f"400{number}", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert ranks[0].pid != ranks[1].pid


@pytest.mark.rest
@pytest.mark.parametrize(
    "script, code",
    [
        ("import sys; sys.exit(7)", 7),
        ("import os; os._exit(0)", 0),
        ("raise ValueError('unforeseen')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_a_forked_rank_reports_exit_codes_like_a_separate_process(
    fork: Callable[..., ForkedProcess], tmp_path: Path, script: str, code: int
) -> None:
    output = (
        "import atexit, sys; sys.stderr = open('output', 'w', buffering=1); atexit.register(print, 'at exit', file=sys.stderr); "
    )
    rank = fork(output + script)
    assert rank.wait(DEADLINE_S) == code
    assert rank.poll() == rank.returncode == code
    # The process ID may now belong to another process.
    rank.send_signal(signal.SIGKILL)
    text = (tmp_path / "output").read_text()
    assert ("at exit" in text) == (code in (1, 7))
    assert ("ValueError: unforeseen" in text) == (code == 1)


@pytest.mark.rest
def test_a_forked_rank_gets_signals_and_a_wait_times_out(fork: Callable[..., ForkedProcess]) -> None:
    rank = fork("import time; time.sleep(60)")
    with pytest.raises(subprocess.TimeoutExpired):
        rank.wait(0.05)
    assert rank.poll() is None
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(DEADLINE_S) == -signal.SIGTERM


@pytest.mark.rest
def test_signals_blocked_in_the_agent_stay_pending_in_a_forked_rank(
    plan_path: str, environment: Mapping[str, str], tmp_path: Path
) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2, signal.SIGTERM})
    try:
        server = ForkServer(plan_path, environment, tmp_path)
        script = "import signal, sys; sys.exit(signal.sigwait({signal.SIGUSR2}) == signal.SIGUSR2 and 5)"
        rank = server.fork((plan_path, "1"), {**environment, "LAUNCHER_SCRIPT": script})
        rank.send_signal(signal.SIGTERM)
        rank.send_signal(signal.SIGUSR2)
        assert rank.wait(DEADLINE_S) == 5
        server.close()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@pytest.mark.rest
def test_orphans_of_ranks_are_not_adopted_by_the_agent(fork: Callable[..., ForkedProcess], tmp_path: Path) -> None:
    assert fork(LEAVE_AN_ORPHAN).wait(DEADLINE_S) == 0
    orphan = psutil.Process(int((tmp_path / "orphan").read_text()))
    assert orphan.ppid() != os.getpid()
    orphan.kill()
    adopts = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(adopts), 0, 0, 0)
    assert adopts.value == 0


@pytest.mark.rest
@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TORCH_LOGS", "HF_HOME", "LD_PRELOAD"])
def test_a_variable_that_imports_may_read_prevents_a_fork_if_it_differs(fork: Callable[..., ForkedProcess], name: str) -> None:
    with pytest.raises(ForkFailed, match=f"^{name} must be set before"):
        fork("pass", **{name: "17"})
    assert fork("pass", NCCL_SOCKET_IFNAME="=lo", GLOO_SOCKET_IFNAME="lo").wait(DEADLINE_S) == 0


@pytest.mark.rest
@pytest.mark.parametrize(
    "stack, reason",
    [
        ("import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()", "has started threads"),
        ("raise ImportError('no torch')", "the fork server has ended with exit code 1"),
        ("import os; os._exit(3)", "the fork server has ended with exit code 3"),
    ],
)
def test_a_rank_starts_as_a_separate_process_where_forking_fails(
    plan_path: str, environment: Mapping[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], stack: str, reason: str
) -> None:
    ranks = RankProcesses(tmp_path)
    ranks.warm_up(plan_path, {**environment, "LAUNCHER_STACK": stack})
    script = "import os, sys; sys.exit(11 + int('fork_server' in ' '.join(sys.orig_argv)))"
    rank = ranks.start(plan_path, 1, {**environment, "LAUNCHER_STACK": stack, "LAUNCHER_SCRIPT": script})
    try:
        # The hook replaces the module launcher.worker.ranks.rank_main, so its main does not run when `-m` runs that module.
        assert isinstance(rank, subprocess.Popen)
        assert rank.args[1:4] == ["-u", "-m", "launcher.worker.ranks.rank_main"]
        assert f"ranks are started as new processes: {reason}" in capfd.readouterr().out.replace("importing ", "")
    finally:
        rank.kill()
        rank.wait(DEADLINE_S)
        ranks.close()


@pytest.mark.rest
def test_a_killed_fork_server_does_not_prevent_the_start_of_ranks(
    plan_path: str, environment: Mapping[str, str], tmp_path: Path
) -> None:
    ranks = RankProcesses(tmp_path)
    ranks.warm_up(plan_path, environment)
    variables = {**environment, "LAUNCHER_SCRIPT": "import time; time.sleep(60)"}
    first = ranks.start(plan_path, 1, variables)
    assert isinstance(first, ForkedProcess)
    others = [child for child in psutil.Process().children() if child.pid != first.pid]
    (server,) = [child for child in others if plan_path in " ".join(child.cmdline())]
    server.kill()
    second = ranks.start(plan_path, 1, variables)
    try:
        assert isinstance(second, subprocess.Popen)
        assert first.poll() is None
    finally:
        ranks.send_signal(signal.SIGKILL)
        assert first.wait(DEADLINE_S) == -signal.SIGKILL
        second.wait(DEADLINE_S)


@pytest.mark.rest
def test_a_cancel_does_not_wait_for_imports(plan_path: str, environment: Mapping[str, str], tmp_path: Path) -> None:
    ranks = RankProcesses(tmp_path)
    ranks.warm_up(plan_path, {**environment, "LAUNCHER_STACK": "import time; time.sleep(60)"})
    assert ranks._server is not None
    assert ranks._server.is_importing()
    ranks.send_signal(CANCEL)
    rank = ranks.start(plan_path, 1, {**environment, "LAUNCHER_SCRIPT": ""})
    assert isinstance(rank, subprocess.Popen)
    rank.wait(DEADLINE_S)


@pytest.mark.rest
def test_server_and_ranks_do_not_outlive_the_agent(plan_path: str, environment: Mapping[str, str], tmp_path: Path) -> None:
    agent = """
import os, sys
from launcher.worker.ranks.rank_env import RankTitle
from launcher.worker.ranks.rank_process import RankProcesses
ranks = RankProcesses(".")
ranks.warm_up(sys.argv[1], os.environ)
script = "import os, time; from launcher.child_process import die_with_parent; die_with_parent(); "
script += "print(os.getpid(), flush=True); time.sleep(60)"
ranks.start(sys.argv[1], 1, {**os.environ, "LAUNCHER_SCRIPT": script}).wait()
"""
    command = [sys.executable, "-c", agent, plan_path]
    with subprocess.Popen(command, env=dict(environment), stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        rank = psutil.Process(int(process.stdout.readline()))
        everyone = [rank, *psutil.Process(process.pid).children()]
        assert len({each.pid for each in everyone}) == 2
        process.kill()
        _, alive = psutil.wait_procs(everyone, timeout=DEADLINE_S)
        assert not alive


@pytest.mark.rest
@pytest.mark.parametrize("result, is_unsafe", [(3, False), (0, True), (201, True)])
def test_a_cuda_context_forbids_forks(monkeypatch: pytest.MonkeyPatch, result: int, is_unsafe: bool) -> None:
    """cuCtxGetCurrent returns CUDA_ERROR_NOT_INITIALIZED (3) until cuInit has been called."""
    driver = SimpleNamespace(cuCtxGetCurrent=lambda context: result)
    monkeypatch.setattr(fork_server.ctypes, "CDLL", lambda name, mode: driver)
    monkeypatch.setattr(fork_server.Path, "iterdir", lambda folder: [])
    refusal = fork_server.find_fork_hazard()
    assert (refusal is not None and "CUDA" in refusal) is is_unsafe


@pytest.mark.rest
def test_process_names_contain_no_space(server: ForkServer, plan_path: str, environment: Mapping[str, str]) -> None:
    """Slurm's proctrack/linuxproc splits /proc/PID/stat at spaces."""
    script = (
        "from launcher.worker.ranks.rank_env import set_title; set_title(12, plan_path, attempt); import time; time.sleep(60)"
    )
    rank = server.fork((plan_path, "3"), {**environment, "LAUNCHER_SCRIPT": script})
    try:
        process = psutil.Process(rank.pid)
        wait_for("the title", lambda: RankTitle.of(process) is not None)
        assert RankTitle.of(process) == RankTitle(12, plan_path, 3)
        others = [child for child in psutil.Process().children() if plan_path in " ".join(child.cmdline())]
        assert {each.name() for each in others} == {"rank-12", "fork-server"}
    finally:
        rank.kill()
        rank.wait(DEADLINE_S)


# Prints the page faults of five allocations of a large tensor, after a first one.
_PAGE_FAULTS = """
import resource, torch
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
tensors = lambda: [torch.ones(2**23) for _ in range(4)] + [torch.ones(2**25)]
tensors()
before = faults()
for _ in range(5):
    tensors()
print(faults() - before)
"""


@pytest.mark.rest
def test_tensors_in_main_memory_take_the_place_of_those_before() -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    kept = _count_page_faults({**plain, **allocator_defaults(plain, "cpu")})
    assert kept < 0.1 * _count_page_faults(plain)


def test_what_the_user_has_set_stays() -> None:
    assert "MALLOC_TRIM_THRESHOLD_" not in allocator_defaults({"MALLOC_TRIM_THRESHOLD_": "1"}, "cpu")
    assert allocator_defaults({}, "cuda") == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert allocator_defaults({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "cuda") == {}


def _count_page_faults(environment: dict[str, str]) -> int:
    command = [sys.executable, "-c", _PAGE_FAULTS]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300).stdout)


def test_the_cpus_next_to_a_gpu_are_those_of_its_numa_node(tmp_path: Path) -> None:
    for address, node in (("0000:3b:00.0", 1), ("0000:5e:00.0", -1)):
        device = tmp_path / "bus/pci/devices" / address
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
    folder = tmp_path / "devices/system/node/node1"
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text("4-6,12\n")
    assert cpus_near("0000:3b:00.0", tmp_path) == {4, 5, 6, 12}
    # Most virtual machines do not report the node.
    assert cpus_near("0000:5e:00.0", tmp_path) == set()
    assert cpus_near("0000:aa:00.0", tmp_path) == set()


@pytest.mark.parametrize(
    ("local_rank", "near", "allowed", "num_threads", "expected"),
    [
        (0, NEAR, FIRST | SECOND, 2, FIRST),
        (5, NEAR, FIRST | SECOND, 2, SECOND),
        # Most of the job's CPUs are on one socket: the four ranks of the other would share two CPUs.
        (5, NEAR, FIRST | {8, 9}, 1, set()),
        (0, NEAR, FIRST | {8, 9}, 1, FIRST),
        # All GPUs are on one socket, but the ranks use the CPUs of both.
        (0, [FIRST] * 8, FIRST | SECOND, 2, set()),
        (0, [FIRST], SECOND, 1, set()),
        (0, [set(), set()], FIRST, 1, set()),
    ],
)
def test_a_rank_is_bound_where_all_ranks_next_to_its_cpus_have_room(
    local_rank: int, near: list[set[int]], allowed: set[int], num_threads: int, expected: set[int]
) -> None:
    assert choose_cpus(near, local_rank, allowed, num_threads) == expected


@pytest.mark.parametrize(("value", "expected"), [(None, 1), ("12", 12), ("4,2", 4), ("many", 1)])
def test_an_optimizer_on_cpus_keeps_the_first_number_of_omp_num_threads_busy(value: str | None, expected: int) -> None:
    environ = {} if value is None else {"OMP_NUM_THREADS": value}
    assert num_busy_threads(environ, steps_on_cpu=True) == expected
    assert num_busy_threads(environ, steps_on_cpu=False) == min(expected, 4)


def test_a_rank_binds_itself_before_it_trains(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The agent and Ray start the same module."""
    bound: list[set[int]] = []

    def train(*arguments: object) -> Outcome:
        assert bound == [SECOND]
        return Outcome("completed", "completed", 1, "", None)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    addresses = [SimpleNamespace(pci_domain_id=0, pci_bus_id=bus, pci_device_id=0) for bus in range(8)]
    monkeypatch.setattr(torch.cuda, "get_device_properties", addresses.__getitem__)
    monkeypatch.setattr(rank_env, "cpus_near", lambda address: NEAR[int(address.split(":")[1], 16)])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: FIRST | SECOND)
    monkeypatch.setattr(os, "sched_setaffinity", lambda process, cpus: bound.append(cpus))
    monkeypatch.setattr(loop, "train", train)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    planned = plan_of("train.global_batch_size=8", device=H100)
    progress = rank_main._Progress()
    rank_main._train(planned, RunDir(tmp_path), RankEnv(5, 5, 8, 0), 1, StopFlag(loading=True), progress)
    assert bound == [SECOND]


def test_a_rank_is_bound_where_a_socket_has_several_numa_nodes() -> None:
    """192 CPUs in eight NUMA nodes, two of eight GPUs next to each of four; the agent gives each rank 24 threads."""
    near = [set(range(48 * (gpu // 2), 48 * (gpu // 2) + 24)) for gpu in range(8)]
    everything, environ = set(range(192)), {"OMP_NUM_THREADS": "24"}
    assert choose_cpus(near, 3, everything, num_busy_threads(environ, steps_on_cpu=False)) == set(range(48, 72))
    assert choose_cpus(near, 3, everything, num_busy_threads(environ, steps_on_cpu=True)) == set()
