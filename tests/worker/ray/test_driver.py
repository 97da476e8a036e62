"""The driver of a run on Ray: what it asks Ray Train for, how it counts nodes, and how it concludes attempts; evaluations."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hand_made
import pytest
from forked import require_exit
from pace import slowness
from plan_fixtures import CPU, H100, PlanOf

import launcher
from launcher.config.sections.ray import RaySection
from launcher.errors import Superseded
from launcher.plan.launch_plan import DeviceFacts, LaunchPlan
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, json_records, run_store
from launcher.runs.journal import NodeEnded, TrainingEnded
from launcher.runs.run_records import Attempt, CancelRequest
from launcher.tracking.jsonl import read_events
from launcher.worker.ray import driver as module
from launcher.worker.ray.driver import Driver, RunEnded, build_trainer, is_eligible
from launcher.worker.ray.train_function import AttemptArguments, NodeFailed, NodeUnfit, resize_request

REPO = Path(__file__).resolve().parents[3]
ARGUMENTS = AttemptArguments("/plan.json", 1, None, {})
NAMES = ("n1", "n2", "n3")


@pytest.fixture
def own_signals() -> Iterator[None]:
    """Restore what the driver changes in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
    before, umask = {number: signal.getsignal(number) for number in numbers}, os.umask(0o077)
    yield
    os.umask(umask)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.usefixtures("own_signals")
def test_the_first_signal_to_the_driver_asks_for_a_save_and_the_second_for_an_end(
    ray_plan: PlanOf, tmp_path: Path, number: signal.Signals
) -> None:
    run = hand_made.run(ray_plan(working_dir=str(tmp_path)), Attempt(None))
    asked = run.cancel(1)
    driver = Driver(LaunchPlan.load(run.plan), run, 1)
    driver.receive_signals()
    assert not driver.is_cancelled()
    for saves in (True, False):
        os.kill(os.getpid(), number)
        assert driver.is_cancelled()
        assert json_records.read_json(asked)["save"] is saves


class FakeRay:
    """Ray with `nodes` by name, and a Ray Train that does what `attempts` say, one after the other."""

    def __init__(self, plan: LaunchPlan, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run = hand_made.run(plan, Attempt(None))
        self.driver = Driver(plan, self.run, 1)
        self.nodes = dict.fromkeys(NAMES, True)
        self.attempts: list[Callable[[], Any]] = []
        self.asked: list[tuple[int, list[str]]] = []
        monkeypatch.setattr("ray.nodes", self._list_nodes)
        monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 16.0, "memory": 1e9})
        monkeypatch.setattr("ray.available_resources", lambda: {"memory": 1e9})
        monkeypatch.setattr(module, "build_trainer", self._build_trainer)
        monkeypatch.setattr(module, "find_raylet", lambda: None)
        for name, value in {"_TRAINER": "ray.train", "_LOOK_S": 0.001, "_RETRY_S": 0.001, "_RESTART_S": 0.0}.items():
            monkeypatch.setattr(module, name, value)
        monkeypatch.setattr(module.detached_process, "start_liveness_file", lambda run: None)

    def _list_nodes(self) -> list[dict[str, Any]]:
        kinds = {"Resources": {"CPU": 1.0}, "Labels": {}}
        return [{"NodeName": name, "NodeID": f"id-{name}", "Alive": alive, **kinds} for name, alive in self.nodes.items()]

    def _build_trainer(self, plan: LaunchPlan, run: RunDir, arguments: Any, left_out: Any) -> Any:
        self.asked.append((plan.topology.nodes, [node["NodeName"] for node in left_out]))
        return SimpleNamespace(fit=lambda: SimpleNamespace(return_value=self.attempts.pop(0)()))

    def begin(self, *nodes: str, **ended: Any) -> None:
        """The agents of these nodes begin; `ended` is how training ends."""
        attempt = run_store.read_attempt(self.run, self.driver.number)
        begun = Attempt(attempt.resume_step, job=attempt.job, nodes=nodes, begun_at=1.0, automatic=attempt.automatic)
        run_store.write_attempt(self.run, self.driver.number, begun)
        if ended:
            known = {"state": "preempted", "step": 1, "message": "", **ended}
            journal.append(self.run, self.driver.number, TrainingEnded(**known))
            for number in range(len(nodes)):
                journal.append(self.run, self.driver.number, NodeEnded(node=number))

    def finish(self) -> str:
        """Run with a last attempt that completes."""
        self.attempts.append(lambda: self.begin("n1", state="completed", reason="completed"))
        return self.driver.run_attempts()

    @property
    def causes(self) -> list[str]:
        ends = [journal.read_end(self.run, number) for number in run_store.attempt_numbers(self.run)]
        return [end.cause for end in ends if end is not None]


@pytest.fixture
def fake(ray_plan: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeRay]:
    return lambda **settings: FakeRay(
        ray_plan(working_dir=str(tmp_path), **{"workers": 2, "ranks_per_node": 1, **settings}), monkeypatch
    )


def worker_errors(failures: dict[int, Exception]) -> Callable[[], Any]:
    from ray.train import WorkerGroupError

    def fail() -> None:
        raise WorkerGroupError("workers failed", failures)

    return fail


def test_an_unfit_node_is_named_and_an_elastic_run_leaves_it_out(fake: Callable[..., FakeRay]) -> None:
    unfit = {1: NodeUnfit(("n1", "n2"), 1, "the run directory is not visible")}
    ray = fake(min_nodes=1, address="auto")
    ray.nodes = dict.fromkeys(("n1", "n2"), True)
    ray.attempts = [worker_errors(unfit)]
    assert ray.finish() == "completed"
    assert ray.causes == ["bad_node", "completed"]
    assert ray.asked == [(2, []), (1, ["n2"])]
    assert any("without n2, which failed the node checks" in event["text"] for event in read_events(ray.run.events))


def test_a_run_of_a_fixed_size_ends_with_an_unfit_node(fake: Callable[..., FakeRay]) -> None:
    ray = fake(address="auto")
    ray.attempts = [worker_errors({1: NodeUnfit(("n1", "n2"), 1, "the run directory is not visible")})]
    assert ray.driver.run_attempts() == "failed"
    assert "n2: the run directory is not visible" in run_store.read_status(ray.run).message


def test_a_lost_node_is_named_and_the_run_continues_with_the_others(fake: Callable[..., FakeRay]) -> None:
    from ray.exceptions import ActorDiedError

    def lose() -> None:
        ray.begin("n1", "n2")
        ray.nodes = {"n1": True, "n2": False}
        worker_errors({1: ActorDiedError()})()

    ray = fake(min_nodes=1, address="auto")
    ray.attempts = [lose]
    assert ray.finish() == "completed"
    assert ray.asked == [(2, []), (1, [])]
    assert ray.causes == ["infrastructure", "completed"]
    end = journal.read_end(ray.run, 1)
    assert end is not None
    assert end.message == "Ray has lost n2; no record from n1"


def test_a_killed_worker_a_killed_agent_and_a_silent_worker_are_named(fake: Callable[..., FakeRay]) -> None:
    from ray.exceptions import ActorDiedError

    silent = type("WorkerHealthCheckTimeoutError", (Exception,), {})()
    failures = {0: ActorDiedError(), 1: NodeFailed(NAMES, 1, "the agent of n2 was killed by SIGKILL"), 2: silent}
    ray = fake(address="auto")

    def fail() -> None:
        ray.begin(*NAMES)
        worker_errors(failures)()

    ray.attempts = [fail]
    assert ray.finish() == "completed"
    end = journal.read_end(ray.run, 1)
    assert end is not None
    assert end.message.split("; ") == [
        "Ray's worker on n1 was killed or has ended",
        "the agent of n2 was killed by SIGKILL",
        "no answer from Ray's worker on n3: it hangs or is cut off from the network",
    ]


def test_nodes_that_ray_takes_away_are_not_counted_again(fake: Callable[..., FakeRay]) -> None:
    def preempt() -> list[str]:
        ray.begin("n1", "n2", reason="preempted")
        return ["id-n2"]

    ray = fake(min_nodes=1, address="auto")
    ray.nodes = dict.fromkeys(("n1", "n2"), True)
    ray.attempts = [preempt]
    assert ray.finish() == "completed"
    assert ray.asked == [(2, []), (1, [])]
    assert ray.causes == ["preempted", "completed"]


def test_an_elastic_run_saves_and_grows_when_there_are_more_nodes(
    fake: Callable[..., FakeRay], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(module.RESIZE_VARIABLE, "0.001")

    def grow() -> None:
        ray.begin("n1")
        run_store.update_status(ray.run, state="running", step=1, message="")
        ray.nodes["n2"] = True
        while not resize_request(ray.run, 1).exists():
            pass
        ray.begin("n1", reason="preempted")

    ray = fake(min_nodes=1, address="auto")
    ray.nodes = {"n1": True}
    ray.attempts = [grow]
    assert ray.finish() == "completed"
    assert ray.asked == [(1, []), (2, [])]
    assert ray.causes == ["resized", "completed"]
    assert run_store.load_plan(ray.run).topology.nodes == 2


def test_missing_nodes_are_reported_with_total_and_free_resources(fake: Callable[..., FakeRay]) -> None:
    def wait() -> None:
        from ray.train import ControllerError

        raise ControllerError(type("WorkerGroupStartupTimeoutError", (Exception,), {})())

    ray = fake(address="auto", placement_minutes=1e-9)
    ray.attempts = [wait] * 9
    with pytest.raises(RunEnded) as end:
        ray.driver.run_attempts()
    assert end.value.args[1].endswith("asked for 2 nodes with CPU: 1 each; it has CPU: 16 on 3 nodes, of these free: CPU: 0")


def test_an_error_of_ray_train_before_a_node_begins_is_retried_a_few_times(fake: Callable[..., FakeRay]) -> None:
    def fail() -> None:
        raise RuntimeError("no room in /tmp")

    ray = fake(address="auto")
    ray.attempts = [fail] * 20
    with pytest.raises(RunEnded, match="Ray Train ended the run: no room in /tmp"):
        ray.driver.run_attempts()
    assert len(ray.asked) == module._MAX_EARLY_FAILURES + 1
    assert run_store.newest_attempt(ray.run) == 1, "the attempt has not begun"


def test_a_cancel_while_it_waits_ends_the_run(fake: Callable[..., FakeRay]) -> None:
    ray = fake(min_nodes=1, address="auto")
    ray.nodes = {}
    json_records.write(ray.run.cancel(1), CancelRequest())
    with pytest.raises(RunEnded) as end:
        ray.driver.run_attempts()
    assert end.value.args[0] == "cancelled"


def test_a_run_that_another_command_has_started_again_is_left_alone(fake: Callable[..., FakeRay]) -> None:
    ray = fake(address="auto")

    def restart() -> None:
        ray.begin("n1", "n2")
        run_store.create_attempt(ray.run, Attempt(None))

    ray.attempts = [restart]
    with pytest.raises(Superseded):
        ray.driver.run_attempts()
    assert ray.causes == []


@pytest.mark.usefixtures("own_signals")
def test_the_loss_of_ray_is_reported_with_the_way_to_continue(
    fake: Callable[..., FakeRay], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake().run
    monkeypatch.setattr(module, "close_wandb_run", lambda *_: None)

    def lose(*_: object) -> Any:
        raise RuntimeError("The connection\n to the head is lost")

    monkeypatch.setattr(module, "connected", lose)
    assert module.main(str(run.plan), 1) == 1
    way_on = f"continue with: python -m launcher resume {run.root}"
    assert run_store.read_status(run).message == f"Ray cannot be used: The connection to the head is lost; {way_on}"
    monkeypatch.setattr(module, "connected", lambda *_: nullcontext())
    monkeypatch.setattr(Driver, "run_attempts", lose)
    assert module.main(str(run.plan), 1) == 1
    assert run_store.read_status(run).message == f"the driver lost Ray: The connection to the head is lost; {way_on}"


@pytest.mark.parametrize(
    "selector, is_chosen",
    [("spot", True), ("!spot", False), ("in(spot, free)", True), ("!in(spot)", False), ("!in(paid)", True), ("paid", False)],
)
def test_nodes_count_with_their_resources_labels_and_accelerator(selector: str, is_chosen: bool) -> None:
    node = {"Alive": True, "Resources": {"GPU": 8.0, "accelerator_type:H100": 1.0}, "Labels": {"market": "spot"}}

    def section(**settings: Any) -> RaySection:
        return RaySection.model_validate({"kind": "ray", **settings})

    assert is_eligible(node, {"GPU": 8.0}, section(label_selector={"market": selector})) is is_chosen
    assert is_eligible(node, {"GPU": 8.0}, section(accelerator_type="H100"))
    assert not is_eligible(node, {"GPU": 8.0}, section(accelerator_type="H200"))
    assert not is_eligible(node, {"GPU": 9.0}, section())
    assert not is_eligible({**node, "Alive": False}, {}, section())


@pytest.mark.parametrize(
    "device, settings, of_node",
    [
        (CPU, {}, {"CPU": 2.0}),
        (CPU, {"resources_per_rank": {"memory": 1e9}}, {"memory": 2e9}),
        (H100, {}, {"GPU": 2.0}),
        (H100, {"resources_per_rank": {"CPU": 8.0}}, {"GPU": 2.0, "CPU": 16.0}),
    ],
)
def test_ray_train_is_asked_for_one_worker_a_node_with_the_resources_of_its_ranks(
    ray_plan: PlanOf, tmp_path: Path, device: DeviceFacts, settings: dict[str, Any], of_node: dict[str, float]
) -> None:
    plan = ray_plan(device=device, workers=4, ranks_per_node=2, **settings)
    scaling = build_trainer(plan, RunDir(tmp_path), ARGUMENTS).scaling_config
    assert (scaling.num_workers, scaling.placement_strategy) == (2, "STRICT_SPREAD")
    assert (scaling.resources_per_worker, scaling.use_gpu) == (of_node, device is H100)


def test_the_settings_of_placement_and_the_secrets_reach_ray_train(
    ray_plan: PlanOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    chosen = {"accelerator_type": "H100", "stop_grace_seconds": 90.0, "label_selector": {"ray.io/market-type": "spot"}}
    plan = ray_plan(device=H100, workers=4, **chosen)
    trainer = build_trainer(plan, RunDir(tmp_path), ARGUMENTS, [{"NodeID": "a"}, {"NodeID": "b"}])
    assert trainer.scaling_config.accelerator_type == "H100"
    assert trainer.scaling_config.label_selector == {"ray.io/market-type": "spot", "ray.io/node-id": "!in(a,b)"}
    assert trainer.run_config.failure_config.preemption_grace_s == 90.0
    assert trainer.run_config.storage_path == str(tmp_path / "ray")
    assert trainer.backend_config.secrets["WANDB_API_KEY"] == "canary"
    assert "canary" not in repr(trainer.train_loop_config)


@pytest.mark.parametrize("address", [None, "head:6379"])
def test_ray_train_starts_only_processes_that_the_run_uses(ray_plan: PlanOf, tmp_path: Path, address: str | None) -> None:
    """Without datasets, and without other jobs on the cluster, Ray Train has no use for some of its processes."""
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    trainer = build_trainer(ray_plan(address=address), RunDir(tmp_path), ARGUMENTS)
    by_default = {type(callback).__name__ for callback in DataParallelTrainer._create_default_callbacks(trainer)}
    left_out = by_default - {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert left_out == {"DatasetsCallback"} | ({"PlacementGroupCleanerCallback"} if address is None else set())


def test_no_driver_gives_its_working_directory_to_workers() -> None:
    """Ray puts the driver's working directory first in the workers' sys.path."""
    starts = []
    for file in Path(launcher.__file__).parent.rglob("*.py"):
        nodes = [*ast.walk(ast.parse(file.read_text()))]
        inside = {
            id(call)
            for node in nodes
            if isinstance(node, ast.With) and "chdir(code)" in ast.unparse(node.items[0])
            for call in ast.walk(node)
        }
        starts += [id(node) in inside for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "ray.init"]
    assert starts == [True, True]


# Runs in a process of its own: Ray reads its variables once per process, and other tests use a Ray with a token.
WAITING = """
import math, sys
import ray
from ray.util.placement_group import placement_group
from launcher.worker.ray import connection, node_tasks

slowness = float(sys.argv[1])
ray.init("local", num_cpus=4, num_gpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
try:
    node_tasks._RECOUNT_S = 1
    assert node_tasks.reserve_gpus(1, 60.0 * slowness).bundle_count == 1
    # At first, Ray still counts the GPU that has just been reserved.
    count, old = ray.available_resources, [{"GPU": 2.0}]
    ray.available_resources = lambda: old.pop() if old else count()
    second = node_tasks.reserve_gpus(None, 60.0 * slowness)
    assert second.bundle_specs == [{"CPU": 1.0, "GPU": 1.0}]
    assert node_tasks.reserve_gpus(None, 1.0) is None, "both GPUs are reserved"
    assert node_tasks.reserve_gpus(None, 1.0, gpus_per_task=2) is None
    assert not placement_group([{"GPU": 1}]).wait(0.1)
    connection.remove_placement_groups()
    assert placement_group([{"GPU": 2}]).wait(math.ceil(60 * slowness))
finally:
    ray.shutdown()
"""


@pytest.mark.rest
@pytest.mark.ray
def test_an_evaluation_waits_for_gpus_only_as_long_as_it_may() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_gcs_server_port_wait_time_s": "120",
    }
    command = [sys.executable, "-c", WAITING, str(slowness())]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=REPO, timeout=240 * slowness())
    require_exit(done)
