"""The connection to Ray: start a private Ray or join a cluster."""

from __future__ import annotations

import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, nullcontext
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
_END_S = 20
# Nothing goes through Ray's object store, which by default takes a third of the machine's memory.
_OBJECT_STORE_BYTES = 100 * 2**20
_OF_PRIVATE_RAY = {
    # It has no dashboard: its agent measures nothing, and its workers report no tasks.
    "RAY_enable_metrics_collection": "0",
    "RAY_task_events_report_interval_ms": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    # Ray's memory monitor would kill workers without telling the user.
    "RAY_memory_monitor_refresh_ms": "0",
    # Nobody takes this machine away through Ray, so this process is not needed.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray would start a worker for each core of this machine in advance. The run needs few, most with other variables.
    "RAY_prestart_worker_first_driver": "0",
    # On a busy machine Ray's control service may need longer than Ray's default of 20 s.
    "RAY_gcs_server_port_wait_time_s": "120",
}


@contextmanager
def connected(plan: LaunchPlan, run: RunDir) -> Iterator[None]:
    """Start a private Ray, or join the cluster that the settings name, for this block; raises what Ray raises."""
    section = RaySection.of(plan.config.cluster)
    # A worker that is silent for this long is cut off, or its machine hangs.
    silent_s = min(plan.config.cluster.stall_seconds or _SILENT_S, _SILENT_S)
    # Ray reads these on import.
    defaults = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "RAY_TRAIN_METRICS_ENABLED": "0",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        # Placed workers meet within seconds. A worker that hangs before that would hold the others and their nodes forever.
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": str(_MEET_S),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(silent_s),
        **(_OF_PRIVATE_RAY if section.address is None else {}),
    }
    # If the raylet ends, Ray calls _exit at once in a driver whose parent has already ended, so the driver could not record why.
    # Ray does not do this while the process with this id is alive. Workers and Ray's own processes get their raylet's id instead.
    os.environ |= {**defaults, **os.environ, "RAY_RAYLET_PID": str(os.getpid())}
    # Workers print to the ranks' logs and to Ray's own; events.jsonl reports what happens to them.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "WARNING", "namespace": plan.wandb_id}
    with _own_folder(run) if section.address is None else nullcontext(Path()) as folder:
        if section.address is None:
            _start_private_ray(plan, run.code, folder, **options)
        else:
            join(section, run.code, **options)
        try:
            yield
        finally:
            import ray

            # A worker of a private Ray can hang in its exit, because it waits for a control service that has ended first.
            processes = psutil.Process().children(recursive=True) if section.address is None else []
            ray.shutdown()
            for process in psutil.wait_procs(processes, timeout=_END_S)[1]:
                process.kill()


def join(section: RaySection, code: Path, variables: Mapping[str, str] | None = None, **options: Any) -> None:
    """Join the cluster that the settings name. Its workers run `code` with `variables`, or with those of the job that this is."""
    import ray

    if section.is_http:
        address, runtime_env = "auto", None
    else:
        address = cluster_address.address_to_join(section.address or "")
        runtime_env = {"env_vars": {**detached_process.python_variables(code, os.environ), **(variables or {})}}
    # Workers import from the driver's folder first, whoever owns it on their node.
    with chdir(code):
        ray.init(address=address, runtime_env=runtime_env, **options)


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


def _start_private_ray(plan: LaunchPlan, code: Path, folder: Path, **options: Any) -> None:
    # Not in the run directory, which its user may let a group read: whoever has the token can run code.
    token = folder.with_name("token")
    token.write_text(secrets.token_hex(32))
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        os.environ.pop(name, None)
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Despite its name this applies to Linux: without it, Ray replaces loopback with a network address.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        **detached_process.python_variables(code, os.environ),
    }
    import ray

    resources = RaySection.of(plan.config.cluster).node_resources(plan.topology.device, plan.topology.ranks_per_node)
    num_cpus = max(os.cpu_count() or 1, math.ceil(resources.get("CPU", 0.0)))
    with chdir(code):
        ray.init(
            num_cpus=num_cpus if plan.topology.device == "cpu" else None,
            _temp_dir=str(folder),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _node_name=os.uname().nodename,
            **options,
        )
