"""The Ray backend without Ray: preview, refused settings, states, cancel requests, job submissions, and other users' Ray."""

from __future__ import annotations

import json
import math
import os
import pwd
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hand_made
import psutil
import pytest
from missing_program import skip_or_fail
from pace import wait_for
from plan_fixtures import H100, ConfigOf, PlanOf
from pydantic import ValidationError
from ray.job_submission import JobStatus

from launcher.cli.status import require_idle
from launcher.clusters import detached_process
from launcher.clusters.local import LocalCluster
from launcher.clusters.ray import address as cluster_address
from launcher.clusters.ray import cluster as module
from launcher.clusters.ray import jobs
from launcher.clusters.ray.cluster import RayCluster
from launcher.config.sections.ray import RaySection
from launcher.errors import RunError, SubmitError
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, run_store
from launcher.runs.run_records import Attempt
from launcher.security.folders import Trust
from launcher.worker.ray import connection, node_tasks

SECTION = RaySection(kind="ray", address="http://head:8265")
NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later."
DAEMON = 1
MINE, THEIRS = "127.0.0.1:7001", "127.0.0.1:7002"
StartRaylet = Callable[..., Path]


def section(**settings: Any) -> RaySection:
    return RaySection.model_validate({"kind": "ray", **settings})


def test_the_preview_shows_rays_defaults(ray_plan: PlanOf, golden: Callable[[str, str], None]) -> None:
    settings = {
        "address": "10.0.0.1:6379",
        "workers": 4,
        "ranks_per_node": 1,
        "min_nodes": 2,
        "accelerator_type": "H100",
        "resources_per_rank": {"CPU": 8.0},
        "env": {"NCCL_IB_HCA": "mlx5"},
    }
    labeled = {"workers": 2, "label_selector": {"ray.io/market-type": "spot"}}
    previews = [RayCluster().preview(ray_plan(**chosen)) for chosen in ({}, settings, labeled)]
    previews.append(RayCluster().preview(ray_plan(device=H100, workers=4, stop_grace_seconds=120.0)))
    golden("ray_requests.txt", "\n".join(text or "" for text in previews))


@pytest.mark.parametrize(
    "address",
    [
        "local",
        "10.0.0.1",
        "http://user:password@host:8265",
        "ray://host:10001",
        "host:6379; rm -rf /",
    ],
)
def test_invalid_addresses_are_refused(address: str) -> None:
    assert section(address="[fd00::1]:6379").address
    with pytest.raises(ValidationError):
        section(address=address)


@pytest.mark.parametrize("address", ["8.8.8.8:6379", "http://0.0.0.0:8265", "head.example:6379"])
def test_a_public_address_is_refused(ray_plan: PlanOf, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    resolve = socket.getaddrinfo
    named = lambda host, port: resolve("8.8.8.8" if host == "head.example" else host, port)  # noqa: E731
    monkeypatch.setattr(cluster_address.socket, "getaddrinfo", named)
    with pytest.raises(SubmitError, match="the whole internet can reach"):
        RayCluster().check(ray_plan(address=address))


def test_only_an_elastic_run_excludes_bad_nodes() -> None:
    assert section(nodes=2, min_nodes=1).leaves_out_bad_nodes
    for settings in ({}, {"min_nodes": 2}):
        assert not section(nodes=2, **settings).leaves_out_bad_nodes


def test_ray_without_an_address_refuses_several_nodes(ray_plan: PlanOf) -> None:
    with pytest.raises(SubmitError, match="the plan needs 2 nodes and this is one machine"):
        RayCluster().check(ray_plan(nodes=2))


class Client:
    """A cluster that refuses jobs with each of `refusals` in turn, then accepts one; without a `state` it has no job."""

    def __init__(self, *refusals: str, state: JobStatus | None = None, message: str = "") -> None:
        self.refusals, self.state, self.message = list(refusals), state, message
        self.variables: dict[str, str] = {}
        self.has_stopped = False

    def submit_job(self, runtime_env: dict[str, dict[str, str]], **job: Any) -> str:
        self.variables = runtime_env["env_vars"]
        if self.refusals:
            raise RuntimeError(self.refusals.pop(0))
        return "raysubmit_1"

    def get_job_info(self, job: str) -> Any:
        if self.state is None:
            raise RuntimeError(f"Job {job} does not exist")
        return SimpleNamespace(status=self.state, message=self.message)

    def get_job_status(self, job: str) -> JobStatus:
        return JobStatus.STOPPED

    def get_job_logs(self, job: str) -> str:
        return "answered\n"

    def stop_job(self, job: str) -> None:
        self.get_job_info(job)
        self.has_stopped = True

    def delete_job(self, job: str) -> None:
        pass


def use(monkeypatch: pytest.MonkeyPatch, client: Client) -> None:
    """Let Ray's client be this one."""

    class OfRay:
        def __new__(cls, address: str) -> Any:
            return client

    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", OfRay)


@pytest.fixture
def run(ray_plan: PlanOf, tmp_path: Path) -> RunDir:
    return hand_made.run(ray_plan(working_dir=str(tmp_path)), Attempt(None))


def identity_of(driver: subprocess.Popen[bytes]) -> dict[str, Any]:
    return detached_process.describe_process(driver.pid)


def test_submission_details_name_the_job_and_its_log(run: RunDir) -> None:
    assert RayCluster().submission_details(run, 1) == [("driver", str(run.attempt(1) / "agent.log"))]
    atomic_files.write_json(run.attempt(1) / "submitted.json", {"job": "raysubmit_1", "address": "http://127.0.0.1:8265"})
    through_the_jobs_api = [
        ("job", "raysubmit_1"),
        ("log", "ray job logs --address http://127.0.0.1:8265 -f raysubmit_1"),
        ("dashboard", "http://127.0.0.1:8265/#/jobs/raysubmit_1"),
    ]
    assert RayCluster().submission_details(run, 1) == through_the_jobs_api
    # An automatic attempt belongs to the same job; an attempt that a user starts belongs to a new one.
    assert run_store.create_attempt(run, Attempt(resume_step=5, automatic=True)) == 2
    assert RayCluster().submission_details(run, 2) == through_the_jobs_api
    assert run_store.create_attempt(run, Attempt(resume_step=5)) == 3
    assert RayCluster().submission_details(run, 3) == [("driver", str(run.attempt(3) / "agent.log"))]


def test_status_is_failed_once_the_driver_is_gone(run: RunDir) -> None:
    with subprocess.Popen(["sleep", "60"]) as driver:
        job = identity_of(driver)
        run_store.update_status(run, state="running", attempt=1, job=job)
        assert RayCluster().status(run).state == "running"
        driver.kill()
    status = RayCluster().status(run)
    assert status.state == "failed"
    assert f"python -m launcher resume {run.root}" in status.message


def test_a_driver_on_another_machine_counts_as_alive_while_it_writes_files(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = {**detached_process.describe_this_process(), "host": "another", "space": "another-boot pid:[1]"}
    run_store.update_status(run, state="running", attempt=1, job=elsewhere)
    old = time.time() - 600
    os.utime(run.status, (old, old))
    assert RayCluster().status(run).state == "failed"
    (run.root / "driver.json").write_text("{}")
    assert RayCluster().status(run).state == "running"
    # The clocks of two machines differ; file times come from the storage.
    monkeypatch.setattr(time, "time", lambda: old + 1200)
    assert RayCluster().status(run).state == "running"


def test_a_local_run_is_failed_after_a_reboot_or_without_sign_of_life(run: RunDir) -> None:
    here = detached_process.describe_this_process()
    boot, namespace = here["space"].split(" ", 1)
    restarted = {**here, "space": f"another-boot {namespace}"}
    run_store.update_status(run, state="running", attempt=1, job=restarted)
    assert LocalCluster().status(run).state == "failed"
    run_store.update_status(run, state="running", attempt=1, job={**here, "space": f"{boot} pid:[1]"})
    assert LocalCluster().status(run).state == "running"
    old = time.time() - 600
    os.utime(run.status, (old, old))
    assert LocalCluster().status(run).state == "failed"
    detached_process.start_liveness_file(run)
    deadline = time.monotonic() + 10
    while not run.alive.exists():
        assert time.monotonic() < deadline
    assert LocalCluster().status(run).state == "running"


def test_the_second_cancel_skips_the_save_and_the_third_kills_the_driver(run: RunDir) -> None:
    with subprocess.Popen(["sleep", "60"]) as driver:
        job = identity_of(driver)
        run_store.update_status(run, state="running", attempt=1, job=job)
        RayCluster().cancel(run)
        assert json_records.read_json(run.attempt(1) / "cancel.json")["save"] is True
        assert driver.poll() is None
        RayCluster().cancel(run)
        assert json_records.read_json(run.attempt(1) / "cancel.json")["save"] is False
        assert driver.poll() is None
        RayCluster().cancel(run)
        assert driver.wait(10) == -9
    assert run_store.read_status(run).state == "cancelled"
    with pytest.raises(SubmitError, match="the run is not running"):
        RayCluster().cancel(run)


def test_an_unreachable_jobs_api_is_refused_by_the_check(ray_plan: PlanOf) -> None:
    with pytest.raises(SubmitError, match="does not answer"):
        RayCluster().check(ray_plan(address="http://127.0.0.1:1"))


def test_auto_needs_a_ray_on_this_machine(ray_plan: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster_address.psutil, "process_iter", lambda attrs: iter(()))
    with pytest.raises(SubmitError, match="no Ray runs on this machine"):
        RayCluster().check(ray_plan(address="auto"))
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        RayCluster().check(ray_plan(address="auto"))
    monkeypatch.setenv("RAY_ADDRESS", "8.8.8.8:6379")
    with pytest.raises(SubmitError, match="the whole internet can reach"):
        RayCluster().check(ray_plan(address="auto"))
    for other in ("ray://10.0.0.1:10001", "http://10.0.0.1:8265", "local"):
        monkeypatch.setenv("RAY_ADDRESS", other)
        with pytest.raises(SubmitError, match="cannot be resolved"):
            RayCluster().check(ray_plan(address="auto"))


def test_a_request_to_a_silent_jobs_api_times_out(ray_plan: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_REQUEST_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address, began = f"http://127.0.0.1:{silent.getsockname()[1]}", time.monotonic()
        with pytest.raises(SubmitError, match="Jobs API does not answer") as error:
            RayCluster().check(ray_plan(address=address))
        assert time.monotonic() - began < 20
    assert "timed out" in str(error.value).lower()


def test_a_head_node_without_the_run_directory_is_reported_by_submit_and_status(
    run: RunDir, ray_plan: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = "http://127.0.0.1:8265"
    plan = ray_plan(working_dir=str(run.root.parent.parent), address=address)
    message = (
        "Job entrypoint command failed with exit code 1, last available logs:\nModuleNotFoundError: No module named 'launcher'\n"
    )
    monkeypatch.setattr(jobs, "submit", lambda *_: "raysubmit_1")
    use(monkeypatch, Client(state=JobStatus.FAILED, message=message))
    path = run_store.write_plan(run, 1, plan)
    with pytest.raises(RunError, match="ended before it could write to the run directory") as error:
        RayCluster().submit(run, 1, path)
    assert "No module named 'launcher'" in str(error.value)
    assert "set run.root to a folder that the cluster's nodes can write to" in str(error.value)
    status = RayCluster().status(run)
    assert status.state == "failed"
    assert "No module named 'launcher'" in status.message
    # The submitting command may have ended before the job failed.
    run_store.update_status(run, state="pending", message="")
    later_status = RayCluster().status(run)
    assert (later_status.state, later_status.message) == ("failed", status.message)


def test_a_job_in_rays_queue_is_pending(run: RunDir, ray_plan: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = ray_plan(working_dir=str(run.root.parent.parent), address="http://127.0.0.1:8265")
    monkeypatch.setattr(module, "_JOIN_DEADLINE_S", 0.05)
    monkeypatch.setattr(module, "_LOOK_S", 0.01)
    monkeypatch.setattr(jobs, "submit", lambda *_: "raysubmit_1")
    use(monkeypatch, Client(state=JobStatus.PENDING, message="no node has room"))
    RayCluster().submit(run, 1, run_store.write_plan(run, 1, plan))
    assert (RayCluster().status(run).state, RayCluster().status(run).message) == ("pending", "no node has room")


@pytest.mark.parametrize("reason", ["no such job", "no answer"])
def test_a_job_that_the_cluster_does_not_have_or_report_is_running_while_its_liveness_file_is_fresh(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """For example, an ssh tunnel leads to another cluster, or its head node is lost."""
    address = "http://127.0.0.1:1"

    if reason == "no such job":
        use(monkeypatch, Client())
    atomic_files.write_json(run.attempt(1) / "submitted.json", {"job": "raysubmit_1", "address": address})
    elsewhere = {**detached_process.describe_this_process(), "host": "another", "space": "another-boot pid:[1]"}
    run_store.update_status(run, state="running", attempt=1, job=elsewhere)
    status = RayCluster().status(run)
    assert status.state == "running"
    cause = {"no such job": "the cluster has no such job", "no answer": "the cluster's Jobs API does not answer"}[reason]
    assert status.message == f"{cause}: {address}; this is the last known state"
    with pytest.raises(SubmitError, match="the run is running already"):
        require_idle(run, RayCluster())
    # The driver reads the cancel request from the run directory, without the connection to the cluster.
    RayCluster().cancel(run)
    assert json_records.read_json(run.cancel(1))["save"] is True
    RayCluster().cancel(run)
    assert json_records.read_json(run.cancel(1))["save"] is False
    with pytest.raises(jobs.JobUnknown if reason == "no such job" else SubmitError):
        RayCluster().cancel(run)
    old = time.time() - 600
    os.utime(run.status, (old, old))
    lost = RayCluster().status(run)
    assert lost.state == "failed"
    assert f"python -m launcher resume {run.root}" in lost.message


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def submit(monkeypatch: pytest.MonkeyPatch, client: Client, folder: Path) -> str:
    use(monkeypatch, client)
    return jobs.submit(SECTION, folder, "run", "launcher.worker.ray.driver", ["plan.json"])


def test_a_missing_agent_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    assert submit(monkeypatch, Client(NO_AGENT, NO_AGENT), tmp_path) == "raysubmit_1"
    assert slept == [1, 1]


def test_the_driver_accepts_the_owners_that_the_command_and_its_own_node_accept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver may run as another user, where this machine's user names are unknown and the volume shows other owners."""
    from ray._private.utils import update_envs

    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "daemon,group:54322")
    client = Client()
    submit(monkeypatch, client, tmp_path)
    for own, expected_gids in (("group:54323", {54322, 54323}), (None, {54322})):
        monkeypatch.delenv("LAUNCHER_TRUST_OWNERS")
        if own is not None:
            monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", own)
        update_envs({"LAUNCHER_TRUST_OWNERS": client.variables["LAUNCHER_TRUST_OWNERS"]})
        accepted = Trust.from_environ(os.environ)
        assert {os.geteuid(), 0, pwd.getpwnam("daemon").pw_uid} <= accepted.uids
        assert accepted.gids == expected_gids


def test_other_errors_end_the_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    with pytest.raises(SubmitError):
        submit(monkeypatch, Client("the entrypoint is invalid"), tmp_path)
    assert slept == []


def test_a_cluster_without_agents_is_reported_after_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    monkeypatch.setattr(jobs, "_AGENT_DEADLINE_S", 0.0)
    with pytest.raises(SubmitError):
        submit(monkeypatch, Client(NO_AGENT), tmp_path)
    assert slept == []


class BusyClient(Client):
    """A job that ends after `num_failures` requests that the head node leaves unanswered."""

    def __init__(self, num_failures: int) -> None:
        super().__init__(state=JobStatus.SUCCEEDED, message="done")
        self.num_failures = num_failures

    def get_job_logs(self, job: str) -> str:
        if self.num_failures:
            self.num_failures -= 1
            raise ConnectionError("timed out")
        return super().get_job_logs(job)


def test_a_command_outlasts_requests_that_fail(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr(time, "monotonic", monotonic)
    client = BusyClient(num_failures=20)
    use(monkeypatch, client)
    shown: list[str] = []
    run = partial(jobs.run_driver, SECTION, "evaluate", "a_module", [], {}, math.inf, shown.append)
    assert run() == ["answered", "done"]
    assert shown == ["answered\n"]
    client = BusyClient(num_failures=100_000)
    use(monkeypatch, client)
    with pytest.raises(SubmitError, match="does not answer"):
        run()
    assert client.has_stopped


@pytest.fixture
def start_raylet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StartRaylet]:
    """Start a process that looks like a user's raylet; other Rays on this machine are ignored."""
    if os.geteuid() != 0:
        skip_or_fail("only root can start processes of other users: run pytest as root")
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS", raising=False)
    pids: list[int] = []
    all_processes = psutil.process_iter
    of_this_test = lambda attributes: (process for process in all_processes(attributes) if process.pid in pids)  # noqa: E731
    monkeypatch.setattr(cluster_address.psutil, "process_iter", of_this_test)
    with ExitStack() as stack:

        def start(address: str, uid: int = 0) -> Path:
            session = tmp_path / f"session-{len(pids)}"
            session.mkdir()
            flags = [f"--gcs-address={address}", f"--session_dir={session}"]
            # A program that other users can run too; it waits for input.
            command = ["/ray/raylet", "-c", "read _", *flags]
            process = subprocess.Popen(command, executable="/bin/sh", user=uid, cwd="/", stdin=subprocess.PIPE)
            stack.enter_context(process)
            stack.callback(process.kill)
            pids.append(process.pid)
            wait_for("the arguments", lambda: flags[0] in psutil.Process(process.pid).cmdline())
            return session

        yield start


@pytest.mark.rest
def test_the_ray_of_another_user_is_not_joined(start_raylet: StartRaylet, monkeypatch: pytest.MonkeyPatch) -> None:
    start_raylet(THEIRS, DAEMON)
    with pytest.raises(SubmitError, match="the Ray on this machine belongs to daemon") as error:
        cluster_address.find_address()
    assert "--trust-owner daemon" in error.value.problems[0].remedy
    monkeypatch.setenv("LAUNCHER_TRUST_OWNERS", "daemon")
    assert cluster_address.find_address() == THEIRS
    monkeypatch.delenv("LAUNCHER_TRUST_OWNERS")
    start_raylet(MINE)
    assert cluster_address.find_address() == MINE


@pytest.mark.rest
@pytest.mark.timeout(300)
def test_one_of_several_own_rays_has_to_be_chosen(start_raylet: StartRaylet) -> None:
    start_raylet(MINE)
    start_raylet(other := "127.0.0.1:7003")
    with pytest.raises(SubmitError, match="several Rays run on this machine") as error:
        cluster_address.find_address()
    assert error.value.problems[0].value == f"{MINE}, {other}"


@pytest.mark.rest
def test_a_session_folder_that_another_user_has_replaced_is_refused(start_raylet: StartRaylet) -> None:
    session = start_raylet(MINE)
    # The mode that Ray gives the folder.
    session.parent.chmod(0o777)
    assert cluster_address.find_address() == MINE
    os.chown(session, DAEMON, -1)
    with pytest.raises(SubmitError, match="the Ray on this machine belongs to daemon"):
        cluster_address.find_address()


@pytest.mark.rest
@pytest.mark.parametrize("driver", ["run", "doctor"])
def test_a_driver_joins_the_ray_that_was_checked(
    start_raylet: StartRaylet,
    config_of: ConfigOf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    driver: str,
) -> None:
    """Ray's own search would join the Ray that was started last, whoever started it."""
    import ray

    def init(address: str, **_: object) -> None:
        raise ConnectionError(address)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = config_of("cluster=ray", "cluster.address=auto")
    request = json.dumps({"config": config.model_dump(mode="json"), "environ": {}})
    section = RaySection.of(config.cluster)
    join = {"run": lambda: connection.join(section, tmp_path), "doctor": lambda: node_tasks.check_nodes(request, 60)}[driver]
    start_raylet(THEIRS, DAEMON)
    with pytest.raises(SubmitError, match="the Ray on this machine belongs to daemon"):
        join()
    start_raylet(MINE)
    with pytest.raises(ConnectionError, match=MINE):
        join()
    monkeypatch.setenv("RAY_ADDRESS", other := "127.0.0.1:7004")
    with pytest.raises(ConnectionError, match=other):
        join()
