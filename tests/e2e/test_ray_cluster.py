"""Runs on a Ray of several nodes, which are lost, taken away, unfit or not to be had."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path

import psutil
import pytest
from e2e_tools import TINY, last_step, losses, metrics, status, wait_for
from ray_cluster import RayCluster
from ray_tools import await_no_launcher, causes, kill_all, ranks_of, rows_environment, rows_of

from launcher import run_store
from launcher.checkpoint import store
from launcher.plan.run_dir import RunDir

Launch = Callable[..., subprocess.CompletedProcess[str]]

STEPS = 120
# Steps that are slow enough for nodes to come and go between them.
SETTINGS = (*TINY, "train.global_batch_size=32", f"train.max_steps={STEPS}", "train.save_every=5", "train.export=false")
# Of the same global batch on other numbers of ranks, sums are made in another order.
CLOSE = 2e-3

pytestmark = [pytest.mark.ray, pytest.mark.rest, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def undisturbed(launch: Launch, module_runs: Path) -> Path:
    """Its rows are in the folder `rows` beside it."""
    rows = rows_environment(module_runs / "rows")
    done = launch(*SETTINGS, f"run.root={module_runs}", "run.name=undisturbed", **rows)
    assert done.returncode == 0, done.stdout + done.stderr
    return module_runs / "undisturbed"


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """The head of a Ray cluster, with one CPU."""
    found = RayCluster()
    try:
        found.start("n1")
        yield found
    finally:
        found.stop()


@pytest.fixture
def node(cluster: RayCluster) -> Iterator[Callable[..., str]]:
    """Adds a node for the test: `node("n2")`."""
    added = []

    def add(name: str, *prefix: str, num_cpus: int = 1) -> str:
        cluster.start(name, f"--num-cpus={num_cpus}", prefix=prefix)
        added.append(name)
        return name

    yield add
    for name in added:
        cluster.kill(name)
    wait_for("Ray to miss the nodes", lambda: list(cluster.node_ids()) == ["n1"], 60)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "runs"
    folder.mkdir()
    yield folder
    kill_all(folder)


def ray(cluster: RayCluster, root: Path, name: str, *more: str) -> list[str]:
    """The command line of a run on the cluster."""
    return [*SETTINGS, "+cluster=ray", f"cluster.address={cluster.address}", f"run.root={root}", f"run.name={name}", *more]


def assert_close(found: dict[int, float], wanted: dict[int, float]) -> None:
    assert found.keys() == wanted.keys()
    apart = {step: abs(found[step] - wanted[step]) for step in wanted if abs(found[step] - wanted[step]) > CLOSE}
    assert not apart


def test_a_token_or_an_address_that_is_wrong_is_told_in_words(
    launch: Launch, cluster: RayCluster, root: Path, tmp_path: Path
) -> None:
    nobody = launch(*SETTINGS, "+cluster=ray", "cluster.address=127.0.0.2:1", f"run.root={root}", "run.name=nobody")
    assert nobody.returncode == 2
    assert "there is no Ray at this address" in nobody.stderr
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
    assert "the cluster does not take the token" in http.stderr
    assert not (root / "http").exists()


def test_a_cluster_of_another_version_of_ray_is_told_in_words(launch: Launch, root: Path, tmp_path: Path) -> None:
    found = distribution("ray")
    (file,) = [found.locate_file(path) for path in found.files or () if path.match("ray/_version.py")]
    other = tmp_path / "_version.py"
    other.write_text(Path(str(file)).read_text().replace(found.version, "2.1.0"))
    older = RayCluster()
    try:
        prefix = ("unshare", "--mount", "sh", "-c", f'mount --bind {other} {file} && exec "$@"', "older")
        older.start("head", prefix=prefix, env={"PYTHONDONTWRITEBYTECODE": "1"})
        done = launch(*ray(older, root, "older"), **older.env)
    finally:
        older.stop()
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Ray cannot be used" in done.stderr
    assert "2.1.0" in done.stderr
    assert found.version in done.stderr
    assert "Traceback" not in done.stderr


def test_a_request_that_can_never_be_met_fails_at_the_deadline(launch: Launch, cluster: RayCluster, root: Path) -> None:
    done = launch(*ray(cluster, root, "many", "cluster.workers=4", "cluster.placement_minutes=0.1", "--follow"), **cluster.env)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "asked for 4 workers with CPU: 1 each; it has CPU: 1 on 1 node" in status(root / "many")["message"]
    await_no_launcher(root / "many")


@pytest.mark.parametrize("of_ray", [False, pytest.param(True)])
def test_a_node_that_does_not_share_the_storage_is_named(
    launch: Launch, cluster: RayCluster, node: Callable[..., str], root: Path, tmp_path: Path, of_ray: bool
) -> None:
    """Its folder for runs, or that for Ray Train's own state, is another one than the head's."""
    state = tmp_path / "state"
    state.mkdir()
    hidden, words = (state, "Ray Train's storage is not the one") if of_ray else (root, "the run directory is not visible")
    node("apart", "unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {hidden} && exec "$@"', "apart")
    done = launch(*ray(cluster, root, "unshared", f"cluster.storage_path={state}", "--follow"), **cluster.env)
    assert done.returncode == 1, done.stdout + done.stderr
    message = status(root / "unshared")["message"]
    assert f"apart: {words}" in message
    assert "n1:" not in message


def test_an_elastic_run_does_without_a_node_that_is_unfit(
    launch: Launch, cluster: RayCluster, node: Callable[..., str], root: Path
) -> None:
    node("apart", "unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {root} && exec "$@"', "apart")
    elastic = ("cluster.workers=2", "cluster.min_workers=1", "train.max_steps=10", "--follow")
    done = launch(*ray(cluster, root, "without", *elastic), **cluster.env)
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(root / "without")
    # Ray may have begun with the one worker that was there first.
    assert causes(run.root)[-2:] == ["bad_node", "completed"]
    assert run_store.read_attempt(run, run_store.newest_attempt(run)).nodes == ("n1",)
    assert "with 1 rank, 1 worker idle on n1, without apart, unfit before: mend it" in done.stdout


def test_a_head_that_does_not_see_the_run_directory_is_told_to_the_one_who_submits(launch: Launch, root: Path) -> None:
    alone = RayCluster()
    try:
        alone.start("head", prefix=("unshare", "--mount", "sh", "-c", f'mount -t tmpfs tmpfs {root} && exec "$@"', "head"))
        through = (f"cluster.address={alone.http}", f"cluster.python={sys.executable}", "cluster.workers=1")
        done = launch(*ray(alone, root, "unseen", *through), **alone.env)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Ray's job ended before it could write to the run directory" in done.stderr
        assert "does not see the run directory" in done.stderr
        assert "set run.root to a folder that the cluster's nodes see" in done.stderr
        assert json.loads(launch("status", str(root / "unseen"), "--json", **alone.env).stdout)["state"] == "failed"
    finally:
        alone.stop()


def test_a_node_with_another_version_of_a_package_is_named(
    launch: Launch, cluster: RayCluster, node: Callable[..., str], root: Path, tmp_path: Path
) -> None:
    found = distribution("transformers")
    (file,) = [found.locate_file(path) for path in found.files or () if path.match("transformers-*/METADATA")]
    other = tmp_path / "METADATA"
    other.write_text(Path(str(file)).read_text().replace(f"Version: {found.version}", "Version: 4.0.0"))
    node("old", "unshare", "--mount", "sh", "-c", f'mount --bind {other} {file} && exec "$@"', "old")
    done = launch(*ray(cluster, root, "versions", "--follow"), **cluster.env)
    assert done.returncode == 1, done.stdout + done.stderr
    said = f"old: the version of transformers differs from the head node's old: 4.0.0; n1: {found.version}"
    other_way = f"n1: the version of transformers differs from the head node's n1: {found.version}; old: 4.0.0"
    assert said in status(root / "versions")["message"] or other_way in status(root / "versions")["message"]


def test_the_jobs_api_takes_a_run_and_it_is_followed_cancelled_and_resumed(
    launch: Launch, cluster: RayCluster, node: Callable[..., str], root: Path, tmp_path: Path, undisturbed: Path
) -> None:
    node("n2")
    run, mirror = root / "job", tmp_path / "mirror"
    canary = "canary-0123456789abcdef"
    env = {**cluster.env, "WANDB_API_KEY": canary}
    settings = (f"cluster.address={cluster.http}", f"cluster.python={sys.executable}", f"train.mirror=file://{mirror}")
    done = launch(*ray(cluster, root, "job", *settings), **env)
    assert done.returncode == 0, done.stdout + done.stderr
    job = run_store.read_json(run / "attempts/001/submitted.json")["job"]
    assert f"job        {job}" in done.stdout
    assert f"{cluster.http}/#/jobs/{job}" in done.stdout
    wait_for("step 7", lambda: last_step(run) >= 7)
    assert json.loads(launch("status", str(run), "--json", **env).stdout)["state"] == "running"
    assert re.search(r"^job +running ", launch("ls", "--root", str(root), **env).stdout, re.MULTILINE)
    assert launch("cancel", str(run), **env).returncode == 0
    wait_for("its end", lambda: status(run)["state"] == "cancelled")
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
    resumed = launch("resume", str(run), "--follow", **env)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert step < STEPS
    assert losses(run) == losses(undisturbed)
    assert mirrored(STEPS)
    assert json.loads((mirror / "job/status.json").read_text())["state"] == "completed"


def test_a_run_loses_a_node_and_gets_another(
    start: Callable, cluster: RayCluster, node: Callable[..., str], root: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """Elastic: two ranks on two nodes, then one, then two again; the rows of each step are the same."""
    node("n2")
    run, rows = root / "elastic", tmp_path / "rows"
    elastic = (
        "cluster.workers=2",
        "cluster.min_workers=1",
        "cluster.resize_seconds=2",
        "cluster.pass_env=[ROWS_SEEN]",
        "--follow",
    )
    with start(*ray(cluster, root, "elastic", *elastic), **cluster.env, **rows_environment(rows)) as process:
        await_training(run, num_ranks=2)
        wait_for("a checkpoint", lambda: store.newest_step(run / "checkpoints") is not None)
        cluster.kill("n2")
        await_training(run, num_ranks=1)
        node("n3")
        await_training(run, num_ranks=2)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert_close(losses(run), losses(undisturbed))
    wanted = {step: {tuple(batch)} for step, ((_, batch),) in rows_of(undisturbed, undisturbed.parent / "rows").items()}
    seen = rows_of(run, rows)
    assert {step: {tuple(batch) for _, batch in times} for step, times in seen.items()} == wanted
    assert {num_ranks for times in seen.values() for num_ranks, _ in times} == {1, 2}
    assert run_store.load_plan(RunDir(run)).topology.world_size == 2, "the plan is that of the newest attempt"
    # Ray begins with as few as are there at that moment, so that there may have been one more at the start.
    assert causes(run)[-3:] == ["infrastructure", "resized", "completed"]
    last = run_store.newest_attempt(RunDir(run))
    before = [line["trainer/step"] for line in metrics(run) if "train/loss" in line and line["attempt"] < last]
    assert run_store.read_attempt(RunDir(run), last).resume_step == max(before), "it saved before it grew"
    await_no_launcher(run)


def test_a_run_of_fixed_size_survives_the_kill_of_a_worker_and_of_a_raylet(
    start: Callable, cluster: RayCluster, node: Callable[..., str], root: Path, undisturbed: Path
) -> None:
    node("n2")
    run = root / "killed"
    settings = ("cluster.address=auto", "cluster.workers=2", "--follow")
    # Ray leaves the address of the newest cluster there, of which this machine may have several.
    with start(*ray(cluster, root, "killed", *settings), **cluster.env, RAY_TMPDIR=str(cluster.folder)) as process:
        await_training(run, num_ranks=2)
        wait_for("a checkpoint", lambda: store.newest_step(run / "checkpoints") is not None)
        before = ranks_of(run)
        before[run_store.read_attempt(RunDir(run), 1).nodes.index("n2")].parent().kill()
        wait_for("the next attempt", lambda: (run / "attempts/002/marker").exists())
        assert not any(rank.is_running() for rank in before.values())
        wait_for("a step of it", lambda: any(line["attempt"] == 2 and "train/loss" in line for line in metrics(run)))
        cluster.kill_raylet("n2")
        wait_for("all ranks to be gone", lambda: not ranks_of(run))
        node("n3")
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert causes(run) == ["infrastructure", "infrastructure", "completed"]
    assert [set(run_store.read_attempt(RunDir(run), number).nodes) for number in (2, 3)] == [{"n1", "n2"}, {"n1", "n3"}]
    assert losses(run) == losses(undisturbed), "the same rows and bitwise the same losses"
    await_no_launcher(run)


def test_a_run_saves_before_a_node_is_taken_away(
    start: Callable, cluster: RayCluster, node: Callable[..., str], root: Path, undisturbed: Path
) -> None:
    node("n2")
    run = root / "drained"
    settings = ("cluster.workers=2", "train.save_every=1000", "--follow")
    with start(*ray(cluster, root, "drained", *settings), **cluster.env) as process:
        await_training(run, num_ranks=2)
        cluster.drain("n2", seconds=120)
        wait_for("it waits for workers", lambda: status(run)["state"] == "pending")
        assert "runs again" in status(run)["message"]
        # In its place.
        node("n3")
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "Ray is about to lose n2: the run saves" in output
    assert causes(run) == ["preempted", "completed"]
    assert set(run_store.read_attempt(RunDir(run), 2).nodes) == {"n1", "n3"}
    assert_close(losses(run), losses(undisturbed))
    steps = [line["trainer/step"] for line in metrics(run) if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1)), "no step was repeated"


def test_keys_reach_the_ranks_and_nothing_else(
    launch: Launch, start: Callable, cluster: RayCluster, node: Callable[..., str], root: Path
) -> None:
    """Four ranks on three nodes, two of them on one; their keys are in no file, no log of Ray's and no command line."""
    node("n2", num_cpus=2)
    node("n3")
    run = root / "keys"
    canary = "canary-fedcba9876543210"
    arguments = ray(cluster, root, "keys", "cluster.workers=4", "train.max_steps=100000", "--follow")
    with start(*arguments, **cluster.env, WANDB_API_KEY=canary) as process:
        await_training(run, num_ranks=4)
        ranks = ranks_of(run)
        assert sorted(ranks) == [0, 1, 2, 3]
        environments = [rank.environ() for rank in ranks.values()]
        assert {found["WANDB_API_KEY"] for found in environments} == {canary}
        assert sorted((found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) for found in environments) == [
            *[("0", "1")] * 2,
            ("0", "2"),
            ("1", "2"),
        ]
        commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        assert not [command for command in commands if canary in command]
        assert launch("cancel", str(run), **cluster.env).returncode == 0
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    files = [path for folder in (run, cluster.folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if canary.encode() in path.read_bytes()]
    await_no_launcher(run)


@pytest.mark.parametrize("by_job", [False, True])
def test_a_head_that_is_lost_is_told_with_the_way_to_go_on(launch: Launch, root: Path, by_job: bool) -> None:
    alone = RayCluster()
    run = root / "headless"
    try:
        alone.start("head")
        through = (f"cluster.address={alone.http}", f"cluster.python={sys.executable}") if by_job else ()
        done = launch(*ray(alone, root, "headless", "cluster.workers=1", *through), **alone.env)
        assert done.returncode == 0, done.stdout + done.stderr
        wait_for("step 7", lambda: last_step(run) >= 7)
        alone.kill("head")
        await_no_launcher(run)

        def seen() -> dict[str, str]:
            found: dict[str, str] = json.loads(launch("status", str(run), "--json", **alone.env).stdout)
            return found

        if by_job:
            # The network between here and the cluster may be away for a moment.
            assert seen()["state"] == "running"
            assert "Ray does not answer" in seen()["message"]
            minutes_pass(RunDir(run))
        assert seen()["state"] == "failed"
        assert f"python -m launcher resume {run}" in seen()["message"]
    finally:
        alone.stop()


def minutes_pass(run: RunDir) -> None:
    """Since the last sign of life."""
    then = time.time() - 600
    for file in (run.status, run.alive):
        os.utime(file, (then, then))


def await_training(run: Path, num_ranks: int) -> None:
    """Until an attempt with so many ranks has logged a step."""

    def training() -> bool:
        attempts = {line["attempt"] for line in metrics(run) if "train/loss" in line}
        newest = max(attempts, default=0)
        return newest > 0 and len(run_store.read_attempt(RunDir(run), newest).nodes) == num_ranks

    wait_for(f"training on {num_ranks} ranks", training, 240)
