"""Runs on a multi-node Ray survive lost, preempted, unfit and unavailable nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest
from causes import assert_attempt_named_first
from e2e_tools import TINY, last_step, losses, metrics, rows_environment, slow_steps, status
from forked import Launch, require_exit
from hand_made import end_of
from ray_tools import (
    DEADLINE_S,
    RayCluster,
    alerts,
    assert_survived,
    await_no_launcher,
    await_training,
    causes,
    environments_of,
    hang_worker,
    hiding,
    kill_all,
    newest_saved,
    ranks_of,
    rows_of,
    trained,
    wait_for,
)

from launcher.plan.run_dir import RunDir
from launcher.runs import json_records, run_store
from launcher.worker.ray.driver import RESIZE_VARIABLE

# Steps that the undisturbed run trains at first, about as many as the longest run that is compared with it.
STEPS = 80
SETTINGS = (
    *TINY,
    "train.global_batch_size=12",
    "train.max_steps=100000",
    # A constant learning rate does not depend on max_steps, so runs of other lengths have the same losses.
    "optim.schedule=constant",
    "checkpoint.save_every=4",
    "eval.at_start=false",
    "export.enabled=false",
)
# For runs on nodes that nobody takes away: Ray Train starts no process per group of workers that watches for that.
UNTAKEN = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
# Tolerance for the same global batch on another number of ranks, which sums in a different order.
CLOSE = 2e-3

pytestmark = [pytest.mark.ray, pytest.mark.rest, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, module_runs: Path) -> Callable[[int], Path]:
    """`undisturbed(N)`: a run on cluster=local with at least N steps, resumed if needed; its rows are in `rows` beside it."""
    run, rows = module_runs / "undisturbed", rows_environment(module_runs / "rows")

    def at_least(num_steps: int) -> Path:
        begin = ("resume", str(run)) if run.exists() else (*SETTINGS, f"run.root={module_runs}", f"run.name={run.name}")
        if last_step(run) < num_steps:
            done = launch(*begin, f"train.max_steps={max(num_steps, STEPS)}", timeout=DEADLINE_S, **rows)
            require_exit(done)
        return run

    return at_least


@pytest.fixture(scope="module")
def unseen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the cluster's head node cannot see."""
    return tmp_path_factory.mktemp("unseen")


@pytest.fixture(scope="module")
def cluster(unseen: Path) -> Iterator[RayCluster]:
    """A Ray cluster whose head has one CPU; each test calls `have_only` for the other nodes that it needs."""
    ray_cluster = RayCluster()
    try:
        ray_cluster.start("n1", prefix=hiding(unseen))
        yield ray_cluster
    finally:
        ray_cluster.stop()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    kill_all(folder)


def ray(cluster: RayCluster, root: Path, name: str, *more: str) -> list[str]:
    """The command line of a run on the cluster.

    By default, ranks that share no node use more threads.
    """
    places = (f"cluster.address={cluster.address}", "cluster.ranks_per_node=1", f"run.root={root}", f"run.name={name}")
    return [*SETTINGS, "+cluster=ray", *places, environment(), *more]


def environment(**variables: str) -> str:
    """The setting of the ranks' variables."""
    return f"cluster.env={{{', '.join(f'{name}: {value!r}' for name, value in {'OMP_NUM_THREADS': '1', **variables}.items())}}}"


def by_job(cluster: RayCluster) -> tuple[str, str]:
    """Settings that submit a run through the cluster's Jobs API."""
    return f"cluster.address={cluster.http}", f"cluster.python={sys.executable}"


def first_losses(undisturbed: Callable[[int], Path], num_steps: int) -> dict[int, float]:
    return {step: loss for step, loss in losses(undisturbed(num_steps)).items() if step <= num_steps}


def assert_close(actual: dict[int, float], expected: dict[int, float]) -> None:
    assert actual.keys() == expected.keys()
    apart = {step: abs(actual[step] - expected[step]) for step in expected if abs(actual[step] - expected[step]) > CLOSE}
    assert not apart


def assert_only_in_memory(key: str, *folders: Path) -> None:
    """Check that no file of the run and no log of Ray contains a key."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_a_wrong_token_and_a_wrong_address_are_refused_with_a_remedy(
    launch: Launch, launch_here: Launch, cluster: RayCluster, root: Path, tmp_path: Path
) -> None:
    nobody = launch_here(*SETTINGS, "+cluster=ray", "cluster.address=127.0.0.2:1", f"run.root={root}", "run.name=nobody")
    assert nobody.returncode == 2
    assert "no Ray answers at this address" in nobody.stderr
    assert not (root / "nobody").exists()
    token = tmp_path / "token"
    token.write_text("0" * 64)
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    refused = launch(*ray(cluster, root, "refused"), **wrong)
    assert refused.returncode == 1
    assert "Ray cannot be used" in refused.stderr
    assert "RAY_AUTH_TOKEN_PATH" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert status(root / "refused")["state"] == "failed"
    http = launch(*SETTINGS, "+cluster=ray", f"cluster.address={cluster.http}", f"run.root={root}", "run.name=http", **wrong)
    assert http.returncode == 2
    assert "the cluster rejected the token" in http.stderr
    assert not (root / "http").exists()


def test_an_unmet_request_fails_at_its_deadline(launch_here: Launch, cluster: RayCluster, root: Path) -> None:
    cluster.have_only()
    done = launch_here(*ray(cluster, root, "many", "cluster.nodes=3", "cluster.placement_minutes=0.1", "--follow"), **cluster.env)
    require_exit(done, 1)
    assert "asked for 3 nodes with CPU: 1 each; it has CPU: 1 on 1 node" in status(root / "many")["message"]
    await_no_launcher(root / "many")


def test_a_head_that_does_not_see_the_run_directory_is_refused_on_submission(
    launch: Launch, cluster: RayCluster, unseen: Path
) -> None:
    done = launch(*ray(cluster, unseen, "unseen", *by_job(cluster), "cluster.nodes=1"), **cluster.env)
    require_exit(done, 1)
    assert "Ray's job ended before it could write to the run directory" in done.stderr
    assert "does not see the run directory" in done.stderr
    assert "set run.root to a folder that the cluster's nodes can write to" in done.stderr
    assert json.loads(launch("status", str(unseen / "unseen"), "--json", **cluster.env).stdout)["state"] == "failed"


def test_unfit_nodes_are_named_and_an_elastic_run_excludes_one_and_ends_at_once_on_a_permanent_error(
    launch_here: Launch, cluster: RayCluster, root: Path, tmp_path: Path
) -> None:
    """A node differs from the head in its package versions, another in its folder for runs."""
    hidden, other = tmp_path / "hidden", tmp_path / "METADATA"
    hidden.mkdir()
    package = distribution("transformers")
    (file,) = [package.locate_file(path) for path in package.files or () if path.match("transformers-*/METADATA")]
    other.write_text(Path(str(file)).read_text().replace(f"Version: {package.version}", "Version: 4.0.0"))
    cluster.have_only()
    cluster.start("apart", prefix=hiding(hidden))
    cluster.start("older", prefix=hiding(replaced={Path(str(file)): other}))

    fixed = ("cluster.nodes=3", "--follow")
    done = launch_here(*ray(cluster, root, "fixed", *fixed), **cluster.env, **UNTAKEN)
    require_exit(done, 1)
    message = str(status(root / "fixed")["message"])
    assert "nodes differ in packages: transformers " in message
    assert "transformers 4.0.0" in message

    cluster.remove("older")
    # The loss of the second or third step is not finite.
    diverging = ("optim.lr=1e30", "optim.warmup_steps=0")
    elastic = ("cluster.nodes=2", "cluster.min_nodes=1", *diverging, "--follow")
    done = launch_here(*ray(cluster, hidden, "without", *elastic), **cluster.env, **UNTAKEN)
    require_exit(done, 1)
    run = RunDir(hidden / "without")
    # An earlier attempt may have started with the one node that joined first.
    assert causes(run.root)[-2:] == ["bad_node", "user_error"]
    newest = run_store.newest_attempt(run)
    message = end_of(run, newest - 1)["message"]
    assert "apart: the run directory is not visible" in message
    assert "n1:" not in message
    assert run_store.read_attempt(run, newest).nodes == ("n1",)
    assert trained(run.root, newest)
    assert "1 node, without apart, which failed the node checks before: repair it" in done.stdout
    assert status(run.root)["state"] == "failed"
    assert "not finite" in status(run.root)["message"] or "the loss is" in status(run.root)["message"]
    await_no_launcher(run.root)


@pytest.mark.parametrize("way, others", [("jobs_api", {}), ("driver", {"n2": 1})])
def test_doctor_checks_every_node(launch: Launch, cluster: RayCluster, root: Path, way: str, others: dict[str, int]) -> None:
    cluster.have_only(**others)
    addresses = {"driver": cluster.address, "jobs_api": cluster.http}
    settings = ("model=tiny", "tracking.mode=offline", f"run.root={root}", "+cluster=ray", f"cluster.python={sys.executable}")
    command = ("doctor", *settings, f"cluster.address={addresses[way]}", "--json")
    done = launch(*command, **cluster.env)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert sorted(report["nodes"]) == ["n1", *others], done.stdout + done.stderr
    assert report["here"][0]["name"] == "Ray"
    for node in report["nodes"].values():
        verdicts = {result["name"]: result["verdict"] for result in node["results"]}
        assert verdicts["torch"] == verdicts["all-reduce"] == "ok", node
        assert verdicts["run.root"] != "failure", node
    assert list(root.iterdir()) == []


def test_prompts_are_answered_on_every_node(
    launch: Launch, cluster: RayCluster, undisturbed: Callable[[int], Path], working_dir: Path
) -> None:
    """Evaluate from a driver, then again through the Jobs API, which finds all answers already there."""
    cluster.have_only(n2=1)
    run = undisturbed(1)
    few = ("evaluate.shots=2", "evaluate.instructions=['']", "evaluate.max_prompts=4")
    settings = (*few, "evaluate.max_new_tokens=4", "evaluate.prompts_per_batch=2", "--json", "+cluster=ray")
    command = ("evaluate", run.name, "--root", str(run.parent), *settings, f"cluster.python={sys.executable}")
    for address in (cluster.address, cluster.http):
        place = f"cluster.address={address}"
        evaluated = launch(*command, place, cwd=working_dir, timeout=DEADLINE_S, **cluster.env, PYTHONSAFEPATH="1")
        require_exit(evaluated)
        result = json.loads(evaluated.stdout)
        assert result["num_processes"] == 2
        assert result["sets"]["held_out"]["verdict"]["num_prompts"] == 4
    assert not list(run.glob("evaluations/*/held_out/.*"))


def test_a_run_of_fixed_size_survives_a_hang_and_a_preemption_and_has_the_same_losses(
    start: Callable, cluster: RayCluster, root: Path, undisturbed: Callable[[int], Path]
) -> None:
    """A worker hangs, then a node is about to be preempted: each time a new attempt continues; then a signal ends the driver."""
    cluster.have_only(n2=1)
    run = root / "hung"
    pace = environment(SECONDS_PER_STEP="0.5")
    settings = ("cluster.address=auto", "cluster.nodes=2", "cluster.stall_seconds=10", pace, "--follow")
    # This machine may run several clusters, among which address=auto alone would not choose.
    env = {**cluster.env, **slow_steps(), "RAY_ADDRESS": cluster.address}
    with start(*ray(cluster, root, run.name, *settings), **env) as process:
        assert_survived(run, 1, hang_worker)
        assert re.search(r"no answer from Ray's worker on n[12]: it hangs or is cut off from the network", alerts(run, 1))
        cluster.drain("n2", seconds=120)
        wait_for("it waits for nodes", lambda: status(run)["state"] == "pending")
        assert "runs again" in status(run)["message"]
        # A replacement for n2.
        cluster.start("n3")
        wait_for("a step of the third attempt", lambda: trained(run, 3))
        # As when the driver's pod or machine shuts down.
        os.kill(status(run)["job"]["pid"], signal.SIGTERM)
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, output
    assert status(run)["state"] == "cancelled"
    assert causes(run) == ["infrastructure", "preempted", "cancelled"]
    attempts = [run_store.read_attempt(RunDir(run), number) for number in (1, 2, 3)]
    assert [set(attempt.nodes) for attempt in attempts] == [{"n1", "n2"}, {"n1", "n2"}, {"n1", "n3"}]
    assert "Ray is about to lose n2: the run saves" in output
    assert "Ray is about to lose n2: the run saves" in alerts(run, 2)
    end = last_step(run)
    assert newest_saved(run, 3) == end
    assert [*trained(run, 2), *trained(run, 3)] == list(range(attempts[1].resume_step + 1, end + 1)), "no step was repeated"
    assert losses(run) == first_losses(undisturbed, end), "the same rows and bitwise the same losses"
    await_no_launcher(run)


def test_a_run_through_the_jobs_api_is_cancelled_and_completed(
    launch: Launch, start: Callable, cluster: RayCluster, root: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    cluster.have_only()
    run, mirror = root / "job", tmp_path / "mirror"
    canary = "canary-0123456789abcdef"
    env = {**cluster.env, "WANDB_API_KEY": canary}
    own = ("cluster.nodes=1", f"checkpoint.mirror=file://{mirror}", "--follow")
    arguments = ray(cluster, root, "job", *by_job(cluster), *own)
    with start(*arguments, **env) as process:
        wait_for("step 7", lambda: last_step(run) >= 7)
        assert json.loads(launch("status", str(run), "--json", **env).stdout)["state"] == "running"
        assert re.search(r"^job +running ", launch("ls", "--root", str(root), **env).stdout, re.MULTILINE)
        assert launch("cancel", str(run), **env).returncode == 0
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, output
    job = json_records.read_json(run / "attempts/001/submitted.json")["job"]
    assert status(run)["state"] == "cancelled"
    step = status(run)["step"]

    def mirrored(number: int) -> bool:
        return (mirror / f"job/checkpoints/step-{number:08d}/manifest.json").is_file()

    assert mirrored(step), "what was saved last is sent before the run is over"
    listed = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", "job", "list", f"--address={cluster.http}"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
    )
    assert job in listed.stdout + listed.stderr
    assert canary not in listed.stdout + listed.stderr
    assert canary not in "".join(path.read_text(errors="replace") for path in run.rglob("*.json"))

    resumed = launch("resume", str(run), f"train.max_steps={step + 2}", **env)
    require_exit(resumed)
    job = json_records.read_json(run / "attempts/002/submitted.json")["job"]
    assert f"job        {job}" in resumed.stdout
    assert f"{cluster.http}/#/jobs/{job}" in resumed.stdout
    wait_for("its end", lambda: status(run)["state"] == "completed")
    assert status(run)["step"] == step + 2
    assert mirrored(step + 2)
    await_no_launcher(run)
    assert json.loads(launch("status", str(run), "--json", **env).stdout)["state"] == "completed"
    assert_close(losses(run), first_losses(undisturbed, last_step(run)))
    assert_only_in_memory(canary, run, cluster.folder)


def test_an_elastic_run_shrinks_and_grows_until_the_head_is_lost_and_only_its_ranks_get_its_keys(
    launch_here: Launch, start: Callable, cluster: RayCluster, root: Path, tmp_path: Path, undisturbed: Callable[[int], Path]
) -> None:
    """Train on three nodes of two ranks, then on one, then on two.

    Each step has the same rows. No file, Ray log or command line contains the keys.
    """
    cluster.have_only(n3=1, n4=1)
    run, rows = root / "elastic", tmp_path / "rows"
    canary = "canary-fedcba9876543210"
    elastic = (
        *("cluster.ranks_per_node=2", "cluster.resources_per_rank={CPU: 0.5}"),
        "cluster.nodes=3",
        "cluster.min_nodes=1",
        environment(SECONDS_PER_STEP="0.5", ROWS_SEEN=str(rows)),
        "--follow",
    )
    env = {**cluster.env, **rows_environment(rows), **UNTAKEN, "WANDB_API_KEY": canary, RESIZE_VARIABLE: "2"}
    with start(*ray(cluster, root, "elastic", *elastic), **env) as process:
        await_training(run, num_nodes=3)
        assert sorted(ranks_of(run)) == [0, 1, 2, 3, 4, 5]
        environments = environments_of(rows, run_store.newest_attempt(RunDir(run)))
        assert {variables["WANDB_API_KEY"] for variables in environments} == {canary}
        assert [(variables["LOCAL_RANK"], variables["LOCAL_WORLD_SIZE"]) for variables in environments] == [
            ("0", "2"),
            ("1", "2"),
        ] * 3
        commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        assert not [command for command in commands if canary in command]
        shrunk = run_store.newest_attempt(RunDir(run))
        wait_for("a checkpoint", lambda: newest_saved(run, shrunk))
        before = ranks_of(run).values()
        cluster.kill_raylet("n3")
        cluster.kill_raylet("n4")
        wait_for("all ranks to be gone", lambda: not any(rank.is_running() for rank in before))
        await_training(run, num_nodes=1)
        assert_attempt_named_first(launch_here, run, shrunk, "ray_node", **cluster.env)
        cluster.start("n5")
        await_training(run, num_nodes=2)
        cluster.kill("n5")
        cluster.kill("n1")
        output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, output
    await_no_launcher(run)
    shown = json.loads(launch_here("status", str(run), "--json", **cluster.env).stdout)
    assert shown["state"] == "failed"
    assert f"python -m launcher resume {run}" in shown["message"]
    end = last_step(run)
    assert_close(losses(run), first_losses(undisturbed, end))
    alone = undisturbed(end)
    expected = {step: {tuple(batch)} for step, ((_, batch),) in rows_of(alone, alone.parent / "rows").items() if step <= end}
    seen = rows_of(run, rows)
    assert {step: {tuple(batch) for _, batch in times} for step, times in seen.items()} == expected
    assert {num_ranks for times in seen.values() for num_ranks, _ in times} == {2, 4, 6}
    assert run_store.load_plan(RunDir(run)).topology.world_size == 4, "the plan is that of the newest attempt"
    last = run_store.newest_attempt(RunDir(run))
    # An earlier attempt may have started with the nodes that had joined.
    assert causes(run)[: last - 1][-2:] == ["infrastructure", "resized"]
    earlier = [line["trainer/step"] for line in metrics(run) if "train/loss" in line and line["attempt"] < last]
    assert run_store.read_attempt(RunDir(run), last).resume_step == max(earlier), "it saved before it grew"
    assert_only_in_memory(canary, run, cluster.folder)
