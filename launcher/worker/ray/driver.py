"""The driver of a run on Ray: `python -m launcher.worker.ray.driver PLAN ATTEMPT`.

It starts or joins Ray and stays until the run has ended. It opens each attempt, lets Ray Train place one worker a node, which
runs the node's agent (launcher.worker.ray.train_function), judges how the attempt ended, and decides by the retry budgets that
apply on every backend. Ray Train itself restarts nothing. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from tenacity import Retrying, retry_if_exception_type, retry_if_not_exception_type, stop_after_delay, wait_fixed

from launcher import clock
from launcher.checkpoint import store
from launcher.clusters import detached_process
from launcher.clusters.ray.cluster import JOINING
from launcher.config.sections.ray import RaySection
from launcher.errors import EXIT_CODES, EXIT_FAILED, ConfigError, LauncherError, Problem, Superseded
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.quantities import format_count
from launcher.plan.run_dir import RunDir
from launcher.runs import journal, run_store
from launcher.runs.journal import NodeEnded
from launcher.runs.run_records import RUNNING_STATES, Attempt
from launcher.tracking import goodput
from launcher.tracking.jsonl import append_event
from launcher.worker import postmortem
from launcher.worker.postmortem import Evidence
from launcher.worker.ray.connection import connected, find_raylet, remove_placement_groups
from launcher.worker.ray.train_function import AttemptArguments, NodeFailed, NodeUnfit, resize_request, run_agent
from launcher.worker.wandb_closing import close_wandb_run

# Seconds between looks for more nodes in an elastic run, by default 60.
RESIZE_VARIABLE = "LAUNCHER_RAY_RESIZE_SECONDS"
_LOOK_S = 0.2
_LOCK_WAIT_S = 60.0
# How long and how often to retry while storage does not answer.
_STORAGE_S, _RETRY_S = 600.0, 1.0
# For a few seconds after it has lost a node, Ray still counts it. An elastic run then asks again, for what is left.
_PLACE_S = 20.0
# How long Ray may take to decide whether it has lost a node whose worker does not answer.
_DECIDE_S = 20.0
# Consecutive errors of Ray Train before a worker has begun, and seconds between them. With more, the error is not transient.
_MAX_EARLY_FAILURES, _RESTART_S = 10, 5.0
_TRAINER = "ray.train.v2.api.data_parallel_trainer"
# Maximum characters of a Ray error in a run's status; the log has the full message.
_MAX_MESSAGE_CHARS = 400
_RAYLET_LOST = f"the raylet of {os.uname().nodename} (Ray's process on the driver's node) was killed or has ended"
# Variables that hold keys or their locations; they reach the ranks only through memory.
_SECRETS = (
    *("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "HF_TOKEN", "HF_ENDPOINT"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_REGION"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_CONNECTION_STRING"),
    *("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"),
)

retry = Retrying(
    retry=retry_if_exception_type((OSError, LauncherError)) & retry_if_not_exception_type(Superseded),
    stop=stop_after_delay(_STORAGE_S),
    wait=wait_fixed(_RETRY_S),
    reraise=True,
)


class RunEnded(Exception):
    """Ends the run; the arguments are its state and the reason."""


def main(plan_path: str, attempt: int) -> int:
    """Run one attempt and its automatic successors; returns the exit code."""
    # As in a batch job: only the run's user can access what it writes.
    os.umask(0o077)
    try:
        plan = LaunchPlan.load(plan_path)
        run = RunDir(Path(plan.run_dir))
        job = detached_process.describe_this_process()
        run_store.update_status(run, state="pending", attempt=attempt, job=job, message=JOINING)
    except OSError as error:
        # The run's status cannot hold this message.
        print(f"{os.uname().nodename} does not see the run directory, or may not write there: {error}", file=sys.stderr)
        return EXIT_FAILED
    driver = Driver(plan, run, attempt)
    problem = "Ray cannot be used"
    try:
        driver.receive_signals()
        with connected(plan, run):
            problem = "the driver lost Ray"
            # Ray has installed its own handlers.
            driver.receive_signals()
            state = driver.run_attempts()
    except Superseded as error:
        # The newer attempt's processes write the state.
        print(error, flush=True)
        return EXIT_FAILED
    except RunEnded as end:
        state = driver.record_end(*end.args)
    except Exception as error:
        # At the start: no cluster, a wrong token, or a different version. Later: a lost connection.
        traceback.print_exception(error)
        state = driver.record_end("failed", f"{problem}: {_shorten(error)}")
    with suppress(OSError, LauncherError):
        close_wandb_run(plan, plan_path, run, run_store.newest_attempt(run))
    return EXIT_CODES.get(state, EXIT_FAILED)


class Driver:
    """`number` is the newest attempt; the command that started the run has created the first."""

    def __init__(self, plan: LaunchPlan, run: RunDir, attempt: int) -> None:
        self._plan, self._run, self.number = plan, run, attempt
        self._section = RaySection.of(plan.config.cluster)
        self._raylet: psutil.Process | None = None
        self._num_signals = self._num_requests = 0
        # The names of nodes whose checks have failed, and the ids of nodes that Ray takes away.
        self._unfit: Collection[str] = ()
        self._taken: set[str] = set()

    def receive_signals(self) -> None:
        """Count the signals that end the run: the first asks for a save, further ones for an immediate end."""

        def receive(*_: object) -> None:
            self._num_signals += 1

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, receive)

    def is_cancelled(self) -> bool:
        """Turn signals into requests like those of the `cancel` verb, for which the agents look; returns whether there is one."""
        while self._num_requests < self._num_signals:
            detached_process.request_cancel(self._run, run_store.read_status(self._run), save=True)
            self._num_requests += 1
        return self._run.cancel(self.number).is_file()

    def run_attempts(self) -> str:
        """Run attempts until the run has ended; returns its state."""
        detached_process.start_liveness_file(self._run)
        self._raylet = find_raylet()
        run_store.update_status(self._run, state="pending", message="waiting for nodes")
        # What `build_trainer` imports takes seconds.
        threading.Thread(target=importlib.import_module, args=[_TRAINER], name="import", daemon=True).start()
        wait_s, num_failures = self._section.placement_minutes * 60, 0
        deadline = time.monotonic() + wait_s
        while True:
            plan, left_out = self._await_nodes(deadline)
            self._open(plan, left_out)
            taken, error = self._fit(plan, left_out, deadline)
            self._taken |= set(taken)
            failed = [one for one in getattr(error, "worker_failures", {}).values() if isinstance(one, NodeFailed)]
            if failed or retry(run_store.read_attempt, self._run, self.number).begun_at:
                if (state := retry(self._conclude, bool(taken), failed, error)) != "pending":
                    return state
                deadline, num_failures = time.monotonic() + wait_s, 0
            # Otherwise no node has begun, and Ray Train is asked again for the same attempt.
            elif type(getattr(error, "controller_failure", None)).__name__ != "WorkerGroupStartupTimeoutError":
                num_failures += 1
                if num_failures > _MAX_EARLY_FAILURES:
                    raise RunEnded("failed", f"Ray Train ended the run: {_shorten(error)}")
                time.sleep(_RESTART_S)

    def _await_nodes(self, deadline: float) -> tuple[LaunchPlan, list[dict[str, Any]]]:
        """Return the plan for the nodes to ask Ray for, and the nodes to leave out. An elastic run waits for its minimum."""
        import ray

        if reached := goodput.reached_limit(self._run, self._plan, clock.now()):
            raise RunEnded("preempted", reached)
        while time.monotonic() <= deadline:
            self._end_if_cancelled()
            plan, left_out = self._plan_for_nodes()
            if plan is not None:
                return plan, left_out
            time.sleep(_RETRY_S)
        section, topology = self._section, self._plan.topology
        needed = section.node_resources(topology.device, topology.ranks_per_node)

        def describe(resources: Mapping[str, float]) -> str:
            return ", ".join(f"{name}: {resources.get(name, 0):g}" for name in needed)

        num_nodes = sum(node["Alive"] for node in ray.nodes())
        raise RunEnded(
            "failed",
            f"the cluster did not provide the nodes within {section.placement_minutes:g} minutes (cluster.placement_minutes): "
            f"asked for {format_count(section.fewest_nodes or topology.nodes, 'node')} with {describe(needed)} each; it has "
            f"{describe(ray.cluster_resources())} on {format_count(num_nodes, 'node')}, of these free: "
            f"{describe(ray.available_resources())}",
        )

    def _plan_for_nodes(self) -> tuple[LaunchPlan | None, list[dict[str, Any]]]:
        """Return the plan for the nodes that Ray has, None if they are too few, and the nodes to leave out.

        Nodes that failed their checks are left out if enough others are there; otherwise they are used, since a failed check may
        be temporary. A run of a fixed size leaves the wait for nodes to Ray, so that an autoscaler adds them.
        """
        import ray

        from launcher.plan.planner import fit_nodes

        if not self._section.leaves_out_bad_nodes:
            return self._plan, []
        topology, fewest = self._plan.topology, self._section.fewest_nodes or 1
        needed = self._section.node_resources(topology.device, topology.ranks_per_node)
        nodes = [node for node in ray.nodes() if is_eligible(node, needed, self._section) and node["NodeID"] not in self._taken]
        left_out = [node for node in nodes if node["NodeName"] in self._unfit]
        if len(nodes) - len(left_out) < fewest:
            left_out = []
        if (num_nodes := min(len(nodes) - len(left_out), topology.nodes)) < fewest:
            return None, []
        try:
            return fit_nodes(self._plan, num_nodes), left_out
        except ConfigError as error:
            raise RunEnded("failed", error.problems[0].message) from None

    def _open(self, plan: LaunchPlan, left_out: Collection[Mapping[str, Any]]) -> None:
        """Open the next attempt, with `plan`; one that no node has begun is used again."""
        run = self._run

        def write_attempt() -> None:
            with run_store.start_lock(run, wait_s=_LOCK_WAIT_S):
                run_store.fence(run, self.number, refresh=True)
                if run_store.read_attempt(run, self.number).begun_at is not None:
                    self.number = run_store.create_attempt(run, Attempt(store.newest_step(run.checkpoints), automatic=True))
                if not plan == self._plan == run_store.load_plan(run):
                    # An attempt without its own plan uses the previous attempt's.
                    run_store.write_plan(run, self.number, plan)
                run_store.update_status(run, attempt=self.number)

        retry(write_attempt)
        if self._section.leaves_out_bad_nodes:
            text = f"attempt {self.number} asks for {format_count(plan.topology.nodes, 'node')}"
            if left_out:
                names = ", ".join(sorted(node["NodeName"] for node in left_out))
                text += f", without {names}, which failed the node checks before: "
                text += "repair it, or remove it with `ray drain-node`; the run saves first"
            self._report("alert" if left_out else "info", text)

    def _fit(
        self, plan: LaunchPlan, left_out: Collection[Mapping[str, Any]], deadline: float
    ) -> tuple[list[str], Exception | None]:
        """Let Ray Train run the attempt to its end; returns the ids of the nodes that Ray takes away, and Ray Train's error."""
        run, section, number = self._run, self._section, self.number
        place_s = max(1.0, deadline - time.monotonic())
        # Ray Train reads it here.
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(
            min(_PLACE_S, place_s) if section.leaves_out_bad_nodes else place_s
        )
        arguments = AttemptArguments(str(run_store.newest_plan_path(run)), number, section.interface, section.env)
        taken: list[str] = []
        errors: list[Exception] = []

        def fit() -> None:
            try:
                taken.extend(build_trainer(plan, run, arguments, left_out).fit().return_value or ())
            except Exception as error:
                traceback.print_exception(error)
                errors.append(error)

        # In a separate thread, Ray Train does not handle SIGINT.
        thread = threading.Thread(target=fit, name="fit", daemon=True)
        thread.start()
        has_begun, look_s = False, float(os.environ.get(RESIZE_VARIABLE, 60))
        look_at = time.monotonic() + look_s
        while thread.is_alive():
            if self._raylet is not None and psutil.wait_procs([self._raylet], timeout=0)[0]:
                raise RunEnded("failed", _RAYLET_LOST)
            # A full or slow disk is no reason to end training.
            with suppress(OSError, LauncherError):
                if not has_begun:
                    self._end_if_cancelled()
                    has_begun = run_store.read_attempt(run, number).begun_at is not None
                elif not self.is_cancelled() and time.monotonic() > look_at:
                    look_at = time.monotonic() + look_s
                    self._request_resize(plan)
            thread.join(_LOOK_S)
        error = errors[0] if errors else None
        from ray.train import PreemptionError, TrainingFailedError

        if isinstance(error, PreemptionError):
            taken.extend(error.preemption_info.preempted_node_ids)
        if section.address is None and error is not None and not isinstance(error, TrainingFailedError):
            remove_placement_groups()
        return taken, error

    def _request_resize(self, plan: LaunchPlan) -> None:
        """Ask the agents to save and end the attempt if the next one can have more nodes.

        Ranks that still load would react only after their first step; those that finish do not need more nodes.
        """
        status, request = run_store.read_status(self._run), resize_request(self._run, self.number)
        if status.message == "starting" or status.step == status.max_steps or request.exists():
            return
        larger = self._plan_for_nodes()[0]
        if larger is not None and larger.topology.nodes > plan.topology.nodes:
            nodes = format_count(larger.topology.nodes, "node")
            self._report("info", f"Ray has more nodes: the run saves and continues with {nodes}")
            request.touch()

    def _conclude(self, is_preempted: bool, failed: list[NodeFailed], error: Exception | None) -> str:
        """Judge the attempt, and record how it ended; returns the state of the run: pending if another attempt follows."""
        run, number = self._run, self.number
        run_store.fence(run, number, refresh=True)
        attempt = run_store.read_attempt(run, number)
        if not attempt.nodes:
            attempt = replace(attempt, nodes=failed[0].nodes, begun_at=clock.now())
            run_store.write_attempt(run, number, attempt)
        for failure in failed:
            if isinstance(failure, NodeUnfit):
                name = failure.nodes[failure.number]
                problem = Problem(failure.reason, where=name)
                journal.append(run, number, NodeEnded(node=failure.number, host=name, problems=(problem,)))
        state = "PREEMPTED" if is_preempted else "RESIZED" if resize_request(run, number).exists() else ""
        silence = _explain_silence(attempt.nodes, error)
        conclusion = postmortem.conclude(run, number, attempt, self._section, Evidence(state, silence=silence))
        conclusion.end_attempt(run, number)
        self._unfit = conclusion.decision.exclude
        return conclusion.decision.state

    def record_end(self, state: str, message: str) -> str:
        """Record how the run ended, unless that is recorded or another command has started it again; returns its state."""
        if state == "failed":
            message += f"; {detached_process.resume_hint(self._run)}"
        print(message, flush=True)

        def write() -> str:
            run_store.fence(self._run, self.number, refresh=True)
            known = run_store.read_status(self._run).state
            if known not in RUNNING_STATES:
                return known
            if state in ("failed", "preempted"):
                self._report("alert", f"the run ends: {message}")
            run_store.update_status(self._run, state=state, message=message)
            return state

        try:
            return retry(write)
        except (OSError, LauncherError):
            return "failed"

    def _end_if_cancelled(self) -> None:
        """End a run that waits for nodes; if storage does not answer, the next look retries."""
        with suppress(OSError, LauncherError):
            if self.is_cancelled():
                raise RunEnded("cancelled", "cancelled while it waited for nodes")

    def _report(self, kind: str, text: str) -> None:
        """Append an event; a failed write does not stop the run."""
        with suppress(OSError):
            append_event(self._run, self.number, kind, text)


def _explain_silence(nodes: tuple[str, ...], error: Exception | None) -> dict[str, str]:
    """Return why nodes may have left no record, by their names: what Ray says about their workers."""
    import ray
    from ray.exceptions import ActorUnavailableError
    from ray.train import WorkerGroupError

    if not isinstance(error, WorkerGroupError):
        return {} if error is None else {nodes[0]: f"Ray Train ended the attempt: {_shorten(error)}"}
    causes = {nodes[rank]: getattr(one, "health_check_failure", one) for rank, one in error.worker_failures.items()}
    undecided = {name for name, cause in causes.items() if isinstance(cause, ActorUnavailableError)}
    until = time.monotonic() + _DECIDE_S
    while True:
        known = ray.nodes()
        lost = {node["NodeName"] for node in known} - {node["NodeName"] for node in known if node["Alive"]}
        if undecided <= lost or time.monotonic() > until:
            break
        time.sleep(_LOOK_S)
    silence = {name: f"Ray has lost {name}" for name in nodes if name in lost}
    for name, cause in causes.items():
        if isinstance(cause, NodeFailed):
            silence.setdefault(name, cause.reason)
        elif type(cause).__name__ == "WorkerHealthCheckTimeoutError":
            silence.setdefault(name, f"no answer from Ray's worker on {name}: it hangs or is cut off from the network")
        else:
            silence.setdefault(name, f"Ray's worker on {name} was killed or has ended")
            print(f"{name}: {cause}", flush=True)
    return silence


def is_eligible(node: Mapping[str, Any], needed: Mapping[str, float], section: RaySection) -> bool:
    """Return whether Ray has a node, with the resources that one of the run needs, its accelerator and its labels."""
    if not node["Alive"] or any(node["Resources"].get(name, 0.0) < amount for name, amount in needed.items()):
        return False
    if section.accelerator_type and f"accelerator_type:{section.accelerator_type}" not in node["Resources"]:
        return False
    for label, selector in section.label_selector.items():
        values = selector.removeprefix("!").removeprefix("in(").removesuffix(")").split(",")
        is_listed = node["Labels"].get(label) in [value.strip() for value in values]
        if is_listed == selector.startswith("!"):
            return False
    return True


def build_trainer(
    plan: LaunchPlan, run: RunDir, arguments: AttemptArguments, left_out: Collection[Mapping[str, Any]] = ()
) -> Any:
    """Build the trainer whose `fit` runs an attempt: one worker a node, on other nodes than `left_out`, and no restarts."""
    from ray.train import BackendConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.backend import Backend
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    section = RaySection.of(plan.config.cluster)

    class SecretsBackend(Backend):
        """Sets the variables with keys in the workers: arguments of a call are in memory only, others in the object store."""

        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(lambda variables: os.environ.update(variables), backend_config.secrets)

    class SecretsConfig(BackendConfig):
        backend_cls = SecretsBackend

        def __init__(self) -> None:
            self.secrets = {name: os.environ[name] for name in _SECRETS if name in os.environ}

    # Ray Train's processes that the run does not use; each takes seconds of CPU time. The first reads datasets. The second
    # removes the placement group of a controller that was killed: it works only with a dashboard, and the driver does it for a
    # Ray of its own.
    unused = {"DatasetsCallback", *(("PlacementGroupCleanerCallback",) if section.address is None else ())}

    class Trainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [callback for callback in callbacks if type(callback).__name__ not in unused]

    resources = section.node_resources(plan.topology.device, plan.topology.ranks_per_node)
    labels = dict(section.label_selector)
    if left_out:
        labels["ray.io/node-id"] = f"!in({','.join(node['NodeID'] for node in left_out)})"
    return Trainer(
        run_agent,
        train_loop_config={"attempt": arguments},
        backend_config=SecretsConfig(),
        scaling_config=ScalingConfig(
            num_workers=plan.topology.nodes,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            placement_strategy="STRICT_SPREAD",
            accelerator_type=section.accelerator_type,
            label_selector=labels or None,
        ),
        run_config=RunConfig(
            name=f"attempt-{arguments.attempt:03d}",
            storage_path=str(run.root / "ray"),
            failure_config=FailureConfig(
                max_failures=0,
                controller_failure_limit=0,
                max_preemption_failures=0,
                preemption_grace_s=plan.config.cluster.stop_grace_seconds,
            ),
        ),
    )


def _shorten(error: Exception | None) -> str:
    """Return a Ray error's message as one line of limited length."""
    return " ".join(str(error).split())[:_MAX_MESSAGE_CHARS] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
