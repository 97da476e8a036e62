"""The connection to Ray: start a private Ray or join a cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from launcher.clusters import detached_process
from launcher.clusters.ray import address as cluster_address
from launcher.config.sections.ray import RaySection
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store

_MAX_FOLDER_CHARS = 28
_MEET_S = 300
_SILENT_S = 60.0
_CONTROL_SERVICE_S = 120
_WORKERS_END_S = 20
# Nothing goes through Ray's object store, which by default takes a third of the machine's memory.
_OBJECT_STORE_BYTES = 100 * 2**20
# A private Ray has no dashboard: its agent measures nothing, and its workers report no tasks.
_UNWATCHED = {
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
}


@contextmanager
def connected(plan: LaunchPlan, run: RunDir) -> Iterator[None]:
    """Start a private Ray, or join the cluster that the settings name, for this block; raises what Ray raises."""
    section = RaySection.of(plan.config.cluster)
    with _own_folder(run) if section.address is None else nullcontext(Path()) as folder:
        # Ray reads these on import.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
        os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
        os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
        # If the raylet ends, Ray calls _exit at once in a driver whose parent has already ended, so the driver could not record
        # why. Ray does not do this while the process with this id is alive. Workers and Ray's own processes get their raylet's
        # id instead.
        os.environ["RAY_RAYLET_PID"] = str(os.getpid())
        # Placed workers meet within seconds. A worker that hangs before that would hold the others and their nodes forever.
        os.environ.setdefault("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", str(_MEET_S))
        # A worker that is silent for this long is cut off, or its machine hangs.
        silent_s = min(plan.config.cluster.stall_seconds or _SILENT_S, _SILENT_S)
        os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(silent_s))
        # Workers print to the ranks' logs and to Ray's own; events.jsonl reports what happens to them.
        common = {"log_to_driver": False, "logging_level": "WARNING", "namespace": plan.wandb_id}
        variables = detached_process.python_variables(run.code, os.environ)
        if section.address is not None:
            join(section, variables, **common)
        else:
            _start_private_ray(plan, variables["PYTHONPATH"], folder, common)
        try:
            yield
        finally:
            import ray

            # A worker of a private Ray can hang in its exit, because it waits for a control service that has ended first.
            workers = []
            for process in psutil.Process().children(recursive=True) if section.address is None else ():
                with suppress(psutil.Error):
                    if "".join(process.cmdline()).startswith("ray::"):
                        workers.append(process)
            ray.shutdown()
            for process in psutil.wait_procs(workers, timeout=_WORKERS_END_S)[1]:
                process.kill()


class _NoFolders(list[str]):
    """Stays empty."""

    def extend(self, folders: Iterable[str]) -> None:
        pass


def config_without_search_path() -> Any:
    """Return a JobConfig with which workers import nothing from the driver's working directory.

    Ray puts that folder first in their sys.path on each node, whoever owns it there.
    """
    from ray.job_config import JobConfig

    config = JobConfig()
    config._py_driver_sys_path = _NoFolders()
    return config


def remove_placement_groups() -> None:
    """Remove all placement groups: those of a controller that was killed would hold their resources until the driver ends."""
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    for number, group in placement_group_table().items():
        if group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(number))))


def find_raylet() -> psutil.Process | None:
    """Return the raylet through which this process is connected to Ray; None if it is not visible here."""
    import ray

    flag = f"--node_id={ray.get_runtime_context().get_node_id()}"
    return next((process for process in psutil.process_iter(["cmdline"]) if flag in (process.info["cmdline"] or ())), None)


@contextmanager
def _own_folder(run: RunDir) -> Iterator[Path]:
    """Create the folder for the token, sockets and logs of the run's private Ray; it is kept if the run failed.

    Ray makes this folder and its subfolders world-writable, so they are inside a private folder: whoever replaces a socket there
    controls what workers unpickle.
    """
    # A socket path is limited to 107 characters, and Ray's own names take most of them.
    parent = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir=parent if len(parent) <= _MAX_FOLDER_CHARS else "/tmp"))  # noqa: S108
    try:
        yield folder / "r"
    finally:
        if run_store.read_status(run).state in ("completed", "cancelled", "preempted"):
            shutil.rmtree(folder, ignore_errors=True)
        else:
            print(f"Ray's own logs are in {folder}", flush=True)


def join(section: RaySection, variables: Mapping[str, str], **options: Any) -> None:
    """Join the cluster that the settings name; Ray's workers get `variables`, or those of the job that this driver is."""
    import ray

    if section.is_http:
        ray.init(address="auto", job_config=config_without_search_path(), **options)
    else:
        address = cluster_address.address_to_join(section.address or "")
        ray.init(address=address, runtime_env={"env_vars": variables}, job_config=config_without_search_path(), **options)


def _start_private_ray(plan: LaunchPlan, path: str, folder: Path, common: dict[str, Any]) -> None:
    section, cores = RaySection.of(plan.config.cluster), os.cpu_count() or 1
    # Not in the run directory, which its user may let a group read: whoever has the token can run code.
    token = folder.with_name("token")
    token.write_text(secrets.token_hex(32))
    os.environ.pop("RAY_ADDRESS", None)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "PYTHONPATH": path}
    # Despite its name this applies to Linux: without it, Ray replaces loopback with a network address.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    # Ray's memory monitor would kill workers without telling the user.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # Nobody takes this machine away through Ray, so this process is not needed.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Ray would start a worker for each core of this machine in advance. The run needs few, most with other variables.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    # On a busy machine Ray's control service may need longer than Ray's default of 20 s.
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", str(_CONTROL_SERVICE_S))
    for name, value in _UNWATCHED.items():
        os.environ.setdefault(name, value)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    import ray

    needed = section.node_resources(plan.topology.device, plan.topology.ranks_per_node).get("CPU", 0.0)
    ray.init(
        num_cpus=max(cores, int(needed + 0.999)) if plan.topology.device == "cpu" else None,
        _temp_dir=str(folder),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        job_config=config_without_search_path(),
        **common,
    )
