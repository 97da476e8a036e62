"""Fixtures for all tests: the launcher as a command, a cache of models and data for the session, and a real Slurm."""

from __future__ import annotations

import builtins
import functools
import io
import json
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import forked_stack
import hand_made
import hypothesis
import progress
import pytest
from filelock import FileLock
from forked import ForkedProcess, ForkingWorkers, ForkServer, Launch, require_exit
from forked_ranks import VARIABLES as RANK_VARIABLES
from forked_ranks import RankServer
from forked_stack import ForkingAgents
from missing_program import PROGRAMS, path_of_a_bare_machine, skip_or_fail
from pace import slowness
from testbed_cluster import SlotTaken, Testbed
from testbed_config import NUM_SLOTS, Settings, install_command, missing_commands

from launcher.plan.run_dir import RunDir
from launcher.runs.run_records import Attempt

REPO = Path(__file__).resolve().parents[1]
RUN_DEADLINE_S = 240
BUILD_DEADLINE_S = 1700
# The files of `make test` first, then those of `make test-rest`; `--durations=0` shows how long each test takes.
LONGEST_FILES = (
    "e2e/test_first_ray_run.py",
    "e2e/test_first_runs.py",
    "e2e/test_first_slurm_run.py",
    "e2e/test_ray_cluster.py",
    "e2e/test_slurm_interruptions.py",
    "e2e/test_static.py",
    "e2e/test_slurm_life.py",
    "e2e/test_slurm_nodes.py",
    "clusters/test_slurm_doctor.py",
    "clusters/test_slurm_queue.py",
    "e2e/test_mirror.py",
    # Starts about when test_ray_cluster.py ends, so that no two Ray clusters run at once.
    "e2e/test_ray.py",
    "journeys/test_journeys.py",
    "e2e/test_resume_exact.py",
    "e2e/test_resume_safety.py",
    "e2e/test_wandb_run.py",
    "e2e/test_weights_of_another_run.py",
    "e2e/test_drill.py",
    "tracking/test_wandb_faults.py",
    "e2e/test_causes.py",
    "e2e/test_local.py",
    "e2e/test_finish.py",
)


def pytest_configure(config: pytest.Config) -> None:
    progress.register(config)
    # A shell starts background jobs with SIGINT ignored, which child processes inherit; some tests send SIGINT.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # With many processes on few cores, threads that wait must not use the CPU.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The duration of an example depends on how busy the machine is.
    hypothesis.settings.register_profile("launcher", deadline=None)
    hypothesis.settings.load_profile("launcher")


_PATH = os.environ.get("PATH", os.defpath)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hide Slurm, browsers and compilers from tests without their marker, which must pass on a machine that has none."""
    os.environ["PATH"] = _PATH if any(map(item.get_closest_marker, PROGRAMS)) else _bare_path(item.config)


@functools.cache
def _bare_path(config: pytest.Config) -> str:
    folder = tempfile.mkdtemp(prefix="launcher-programs-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    return path_of_a_bare_machine(_PATH, Path(folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that none runs alone at the end, and tests that need compiled extensions last."""

    def position(item: pytest.Item) -> int:
        if "extensions" in getattr(item, "fixturenames", ()):
            return len(LONGEST_FILES) + 1
        name = item.path.relative_to(REPO / "tests").as_posix() if item.path.is_relative_to(REPO / "tests") else ""
        return LONGEST_FILES.index(name) if name in LONGEST_FILES else len(LONGEST_FILES)

    items.sort(key=position)
    for item in items:
        if "extensions" in getattr(item, "fixturenames", ()):
            item.add_marker("compiler")


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that all pytest-xdist processes of this session share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def launcher_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for converted models and built data, shared by all pytest-xdist processes."""
    cache = shared_folder(tmp_path_factory) / "launcher-cache"
    cache.mkdir(exist_ok=True)
    return cache


@pytest.fixture(scope="session", autouse=True)
def _no_terminal_width() -> None:
    """Remove the terminal width that pytest-xdist sets in its workers, so that captured output is not wrapped."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session", autouse=True)
def _little_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Runs that the test process creates get a copy of only these files: most of these runs execute no code, and copying 700
    files takes longer than most tests. `whole_code` and `module_whole_code` are for runs that do.
    """
    package = tmp_path_factory.mktemp("code") / "launcher"
    for folder in ("train", "runs"):
        (package / folder).mkdir(parents=True)
    for name in ("__init__.py", "errors.py", "runs/__init__.py", "runs/run_store.py", "train/__init__.py", "train/loop.py"):
        shutil.copy(REPO / "launcher" / name, package / name)
    py_compile.compile(str(package / "errors.py"), doraise=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.runs.run_store._PACKAGE", package)
        yield


def _copied_whole() -> Iterator[None]:
    """Runs get a copy of the whole package, as they do for users."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launcher.runs.run_store._PACKAGE", REPO / "launcher")
        yield


whole_code = pytest.fixture(_copied_whole)
module_whole_code = pytest.fixture(_copied_whole, scope="module")


@pytest.fixture(scope="session")
def launcher_env(launcher_cache: Path, pytestconfig: pytest.Config) -> dict[str, str]:
    """The environment of launcher processes: no keys, no Hub, a separate cache, and only programs that every machine has."""
    dropped = ("WANDB_", "HF_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "COLUMNS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    cache_only = {"LAUNCHER_CACHE": str(launcher_cache), "HF_HUB_OFFLINE": "1", "NETRC": os.devnull}
    # With several threads, fp32 matrix products are not bitwise reproducible.
    return kept | cache_only | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PATH": _bare_path(pytestconfig)}


@pytest.fixture(scope="session")
def launch(launcher_env: Mapping[str, str]) -> Launch:
    """Run `python -m launcher ARGUMENTS` to completion."""

    def run(
        *arguments: str, cwd: Path | None = None, timeout: float = RUN_DEADLINE_S, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "launcher", *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or REPO,
            env={**launcher_env, "PATH": os.environ["PATH"], **env},
            timeout=timeout * slowness(),
        )

    return run


@pytest.fixture(scope="session")
def torch_server(launcher_env: Mapping[str, str]) -> Iterator[Callable[[], ForkServer]]:
    """Return a process that has imported torch and DeepSpeed, and forks others; the first call starts it."""
    servers: list[ForkServer] = []

    def started() -> ForkServer:
        if not servers:
            servers.append(ForkServer(*forked_stack.MODULES, variables={**launcher_env, **RANK_VARIABLES}))
        return servers[0]

    yield started
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def launch_here(launcher_env: Mapping[str, str], torch_server: Callable[[], ForkServer]) -> Launch:
    """Like `launch`, but calls main() in this process: a second faster, for tests that are not about processes.

    Environment, working directory and output are the same as for the command. The processes that it starts, except agents, are
    forked from one that has imported what they need.
    """
    return _called_here(launcher_env, {"worker_process": ForkingWorkers(launcher_env, torch_server)})


@pytest.fixture(scope="session")
def train_here(launcher_env: Mapping[str, str], torch_server: Callable[[], ForkServer]) -> Launch:
    """Like `launch_here`, but agents of local runs are forked too, see forked_stack.py: a third of the CPU time of `launch`."""
    workers, agents = ForkingWorkers(launcher_env, torch_server), ForkingAgents(torch_server)
    return _called_here(launcher_env, {"worker_process": workers, "detached_process": agents})


def _called_here(launcher_env: Mapping[str, str], starters: Mapping[str, Any]) -> Launch:
    """Call main() in this process, with `starters` in place of the module `subprocess` of modules of the launcher."""
    from launcher.cli import worker_process
    from launcher.cli.main import main
    from launcher.clusters import detached_process

    modules = {"worker_process": worker_process, "detached_process": detached_process}

    def run(*arguments: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
        for name, module in [*sys.modules.items()]:
            if name.startswith("launcher."):
                for value in [*vars(module).values()]:
                    if callable(clear := getattr(value, "cache_clear", None)):
                        clear()
        before, folder = dict(os.environ), os.getcwd()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            kept = os.dup(1), os.dup(2)
            try:
                os.environ.clear()
                os.environ.update({**launcher_env, "PATH": before["PATH"], **env})
                os.chdir(cwd or REPO)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                with redirect_stdout(out), redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
                    for name, starter in starters.items():
                        patch.setattr(modules[name], "subprocess", starter)
                    try:
                        code = main(arguments)
                    except SystemExit as end:
                        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            finally:
                out.flush()
                err.flush()
                for descriptor, number in zip(kept, (1, 2), strict=True):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(before)
            texts = [Path(f"/proc/self/fd/{file.fileno()}").read_text() for file in (out, err)]
        return subprocess.CompletedProcess(["launcher", *arguments], code, *texts)

    return run


StorageFails = Callable[..., AbstractContextManager[None]]


@pytest.fixture
def storage_fails(monkeypatch: pytest.MonkeyPatch) -> StorageFails:
    """`with storage_fails(PATH, CODE)`: open() and stat() of PATH raise this error; with `stat=False` only open()."""

    @contextmanager
    def failing(path: Path, code: int, stat: bool = True) -> Iterator[None]:
        def unless_it(action: Callable[..., Any]) -> Callable[..., Any]:
            def act(of: Any, *args: Any, **kwargs: Any) -> Any:
                if isinstance(of, str | os.PathLike) and os.fspath(of) == str(path):
                    raise OSError(code, os.strerror(code), str(path))
                return action(of, *args, **kwargs)

            return act

        with monkeypatch.context() as patch:
            for module, name in ((builtins, "open"), (io, "open"), (os, "open"), *([(os, "stat")] if stat else [])):
                patch.setattr(module, name, unless_it(getattr(module, name)))
            yield

    return failing


@pytest.fixture(scope="session")
def rank_server(torch_server: Callable[[], ForkServer]) -> RankServer:
    """Run functions on several ranks, forked from a process that has imported DeepSpeed; see tests/forked_ranks.py."""
    return RankServer(torch_server)


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compile DeepSpeed's C++ extensions for offloaded states in advance: it takes minutes, longer than a run's deadline.

    One pytest-xdist process compiles; all share the user's cache, or TORCH_EXTENSIONS_DIR if that is set.
    """
    folder = shared_folder(tmp_path_factory)
    with FileLock(folder / "extensions.lock", timeout=BUILD_DEADLINE_S):
        if (folder / "extensions-are-compiled").exists():
            return
        command = [sys.executable, str(REPO / "tests/build_extensions.py")]
        env = {**os.environ, "PYTHONPATH": str(REPO)}
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_DEADLINE_S, env=env)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        (folder / "extensions-are-compiled").touch()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run whose first attempt has been submitted."""
    return hand_made.run(tmp_path / "runs/demo", Attempt(None))


@pytest.fixture(scope="session")
def demo_model(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a Hugging Face folder; its data cache is built too."""
    done = launch("data", "--json")
    require_exit(done)
    plan = json.loads(launch("plan", "--json").stdout)
    return Path(plan["model"]["path"])


@pytest.fixture(scope="session")
def start(launcher_env: Mapping[str, str]) -> Callable[..., object]:
    """Start `python -m launcher ARGUMENTS` in the background; the process is killed at the end of the block."""

    @contextmanager
    def begin(*arguments: str, cwd: Path | None = None, **env: str) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd or REPO,
            env={**launcher_env, "PATH": os.environ["PATH"], **env},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(timeout=30)
            if process.stdout is not None:
                process.stdout.close()

    return begin


@pytest.fixture(scope="session")
def start_here(launcher_env: Mapping[str, str], torch_server: Callable[[], ForkServer]) -> Callable[..., object]:
    """Like `start`, but the command and the processes that it starts are forked, see forked_stack.py."""

    @contextmanager
    def begin(*arguments: str, cwd: Path | None = None, **env: str) -> Iterator[ForkedProcess]:
        options: dict[str, Any] = {"cwd": cwd or REPO, "env": {**launcher_env, "PATH": os.environ["PATH"], **env}, "text": True}
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with torch_server().popen("forked_stack", "launcher", *arguments, **options) as process:
            try:
                yield process
            finally:
                process.kill()

    return begin


@contextmanager
def running_slurm(**settings: Any) -> Iterator[Testbed]:
    """A testbed Slurm cluster (slurm/testbed_config.py: Settings) in the first free slot."""
    if missing := missing_commands():
        skip_or_fail(f"the Slurm testbed needs {', '.join(missing)}: {install_command(missing)}")
    if os.geteuid() != 0:
        skip_or_fail("only root can start the Slurm testbed: run pytest as root")
    for slot in range(1, NUM_SLOTS):
        # An abstract socket is a lock without a file that ends with its process in any case. Its holder may remove what a killed
        # test run left in the slot.
        with socket.socket(socket.AF_UNIX) as lock:
            bed = Testbed(f"/tmp/launcher-slurm-{slot}")
            try:
                lock.bind(f"\0{bed.root}")
            except OSError:
                continue
            try:
                bed.start(Settings(slot=slot, **settings))
            except SlotTaken:
                continue
            try:
                yield bed
            finally:
                bed.stop()
            return
    pytest.fail("every slot of the Slurm testbed is in use")


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Testbed]:
    """A Slurm cluster of three nodes with four CPUs each, for the whole session."""
    with running_slurm() as bed:
        yield bed


@pytest.fixture
def slurm(slurm_cluster: Testbed) -> Iterator[Testbed]:
    """The session's Slurm cluster, with all nodes idle; repaired after the test. Pass `**slurm.variables` to the launcher."""
    yield slurm_cluster
    slurm_cluster.reset()


@pytest.fixture(scope="session")
def other_slurm() -> Callable[..., AbstractContextManager[Testbed]]:
    """A separate Slurm cluster, for other settings than the session's: `with other_slurm(accounting=False) as bed:`."""
    return running_slurm
