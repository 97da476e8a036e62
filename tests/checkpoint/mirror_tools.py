"""Runs with checkpoints but no training, storage that fails on demand, and an S3 server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import hand_made
from fsspec.implementations.local import LocalFileSystem
from plan_fixtures import composed, facts_for

from launcher.checkpoint import store
from launcher.checkpoint.manifest import STATE, Checkpoint
from launcher.checkpoint.mirror import Mirror, read_complete_checkpoints
from launcher.checkpoint.remote_folder import RemoteFolder
from launcher.plan.architecture import model_facts
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.runs.run_records import Attempt

Hook = Callable[[str, str], None]


class FaultyFileSystem(LocalFileSystem):
    """The local disk under another protocol. `hook` receives each operation and path before it happens, and may raise."""

    protocol = "faulty"
    hook: ClassVar[Hook] = staticmethod(lambda what, path: None)

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        path = self._strip_protocol(path)
        type(self).hook("read" if "r" in mode else "write", path)
        return super().open(path, mode, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        type(self).hook("read", path)
        return super().cat_file(path, *args, **kwargs)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        type(self).hook("finish", path2)
        super().mv(path1, path2, **kwargs)

    def rm_file(self, path: str) -> None:
        type(self).hook("remove", path)
        super().rm_file(path)


fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


@contextmanager
def hooked(hook: Hook) -> Iterator[None]:
    before, FaultyFileSystem.hook = FaultyFileSystem.hook, staticmethod(hook)
    try:
        yield
    finally:
        FaultyFileSystem.hook = before


@contextmanager
def finished_files() -> Iterator[list[str]]:
    """The names of the files that appear in the storage inside the block, in order."""
    names: list[str] = []
    with hooked(lambda what, path: names.append(path) if what == "finish" else None):
        yield names


def make_run(
    folder: Path,
    mirror: str,
    name: str = "a",
    created_at: str = "2026-01-31T09:15:00Z",
    settings: Sequence[str] = ("checkpoint.keep_last=1",),
) -> tuple[LaunchPlan, RunDir]:
    """A run directory in its first attempt, as it is after submission, with a small tokenizer."""
    common = composed(("model=tiny", "train.max_steps=20", *settings))
    checkpoint = common.checkpoint.model_copy(update={"mirror": mirror})
    config = common.model_copy(update={"run": common.run.model_copy(update={"name": name}), "checkpoint": checkpoint})
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "config.json", "model.safetensors", "model.safetensors.index.json"):
        (tokenizer / file).write_text(f'"{file}"')
    facts = facts_for(config, data=None, working_dir=str(folder))
    model = model_facts(config.model.config, None, str(tokenizer), None)
    provenance = facts.provenance.model_copy(update={"created_at": created_at})
    made = plan(config, facts.model_copy(update={"model": model, "provenance": provenance}))
    run = hand_made.run(made, Attempt(None), state="running")
    # Keep only a little code, so that packing it is fast.
    for path in (run.code / "launcher").iterdir():
        if path.is_dir() and path.name != "plan":
            shutil.rmtree(path)
    return made, run


def commit(
    run: RunDir, step: int, content: bytes = b"weights", attempt: int = 1, num_ranks: int = 3, loss: float | None = None
) -> Checkpoint:
    """Commit a checkpoint with fake content."""
    names = [*map(store.shard_name, range(num_ranks)), STATE]
    files = {name: f"{name} of {step}: ".encode() + content for name in names}
    return store.open_checkpoint(hand_made.checkpoint(run, step, loss, attempt, files))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@dataclass(frozen=True)
class S3:
    """An S3 server on this machine, and the environment variables to reach it."""

    environment: dict[str, str]
    bucket: str = "bucket"


@contextmanager
def running_s3(log: Path) -> Iterator[S3]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not _answers(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "waited 60 s for the S3 server"
            time.sleep(0.05)
        yield S3(
            {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": "testing",
                "AWS_SECRET_ACCESS_KEY": "canary-of-the-mirror",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            }
        )
    finally:
        process.kill()
        process.wait(timeout=10)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def make_bucket(s3: S3) -> None:
    """Use a separate process: clients remember the environment in which they started."""
    code = f"import fsspec; fsspec.filesystem('s3').mkdir({s3.bucket!r})"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **s3.environment}, check=True, timeout=60)


def begun(plan: LaunchPlan, run: RunDir, attempt: int = 1) -> Mirror:
    mirror = Mirror(RemoteFolder(f"{plan.config.checkpoint.mirror}/a"), run, plan, attempt)
    mirror.begin()
    return mirror


def send_all(mirror: Mirror) -> int:
    sent = 0
    while waiting := mirror.list_missing_checkpoints():
        sent += mirror.send(waiting[0])
        mirror.prune()
    return sent


def steps_in(folder: Path) -> list[int]:
    return list(read_complete_checkpoints(RemoteFolder(f"file://{folder}")))


def elsewhere(tmp_path: Path, run: RunDir, step: int, pinned: bool = False) -> RunDir:
    """The run in its second attempt, on another machine that has fetched one of its checkpoints."""
    moved = RunDir(tmp_path / "elsewhere")
    others = [store.step_name(c.step) for c in store.list_checkpoints(run.checkpoints) if c.step != step]
    shutil.copytree(run.root, moved.root, ignore=shutil.ignore_patterns(*others))
    run_store.create_attempt(moved, Attempt(resume_step=step, pinned=pinned))
    return moved
