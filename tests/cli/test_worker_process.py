"""A worker process reports its result; after Ctrl-C it ends, removes its partial files and prints nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest
from forked import require_exit
from pace import slowness

from launcher.cli import config, train
from launcher.cli.follow import Interrupts, interrupted_start
from launcher.cli.main import main
from launcher.cli.start_run import start_run
from launcher.cli.worker_process import run_worker, run_worker_module
from launcher.clusters.local import LocalCluster
from launcher.config.schema import RunConfig
from launcher.errors import EXIT_INTERRUPTED, RunError
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, run_store


def test_the_message_names_the_process_that_failed() -> None:
    settings = RunConfig.model_validate(hand_made.SETTINGS)
    with pytest.raises(RunError, match=r"python -m launcher\.worker\.absent ended with exit code 1; its messages are above"):
        run_worker_module("launcher.worker.absent", settings)


def test_relative_paths_in_variables_start_from_the_working_directory_of_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ranks work in the run directory: there, a relative HF_HOME would have no token when the run ends with a push."""
    given = {"HF_HOME": "./hf", "PYTHONPATH": "/packages:own::../src", "NETRC": "~/netrc", "LAUNCHER_CACHE": "/cache:a/../b"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "print_schema", lambda _: 0)
    assert main(["schema"]) == 0
    changed = {"HF_HOME": f"{tmp_path}/hf", "PYTHONPATH": f"/packages:{tmp_path}/own::{tmp_path.parent}/src"}
    assert {name: os.environ[name] for name in given} == {**given, **changed}


# Writes a file from several processes until it is stopped, as a data cache build does.
WORKER = """
import multiprocessing, os, pathlib, signal, sys, time
from launcher.child_process import exit_on_termination

exit_on_termination()
folder = pathlib.Path(sys.argv[1])
try:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
    child.start()
    (folder / "child").write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGINT)
    (folder / "partial").write_text("half")
    time.sleep(3600)
finally:
    (folder / "partial").unlink()
"""


def test_an_interrupted_evaluation_names_the_command_that_continues_at_its_step(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("launcher.cli.evaluate.run_reporting", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert main(["evaluate", str(run.root), "evaluate.max_prompts=5", "--set=held_out"]) == EXIT_INTERRUPTED
    command = f"evaluate {run.root} evaluate.max_prompts=5 --step 10 --set=held_out"
    assert command in capsys.readouterr().err


def interrupt_after(file: Path) -> None:
    until = time.monotonic() + 60 * slowness()
    while not file.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_worker_removes_what_it_was_writing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    thread = threading.Thread(target=interrupt_after, args=(tmp_path / "partial",))
    thread.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_worker([sys.executable, "-c", WORKER, str(tmp_path)])
    thread.join()
    assert time.monotonic() - started < 600, "it was not waited for"
    assert not (tmp_path / "partial").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "child").read_text()), 0)
    assert capfd.readouterr() == ("", "")


def test_a_worker_answers_with_its_exit_code_and_output(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print(sys.stdin.read() + '!'); sys.exit(3)"
    assert run_worker([sys.executable, "-c", code], "hello", -1) == (3, "hello!\n")
    assert run_worker([sys.executable, "-c", code], "hello") == (3, "")
    assert capfd.readouterr().out == "hello!\n"


# Submits a run as `train` does, and prints the outcome.
SUBMIT = """
import sys
from pathlib import Path
from launcher.runs import run_store
from launcher.cli.follow import Interrupts
from launcher.cli.main import main
from launcher.cli.start_run import start_run
from launcher.clusters.slurm.cluster import SlurmCluster
from launcher.errors import SubmitError
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.run_dir import RunDir

plan = LaunchPlan.load(Path(sys.argv[1]))
with Interrupts() as interrupts:
    interrupts.defer()
    try:
        run, attempt = start_run(plan, SlurmCluster())
        print(*SlurmCluster().submission_details(run, attempt)[0], len(interrupts.received))
    except SubmitError as error:
        print(error)
print(run_store.read_status(RunDir(Path(plan.run_dir))).message)
"""


@pytest.fixture
def submit(tmp_path: Path) -> Callable[[str], list[str]]:
    """Submit a run in its own session with the given sbatch script in place of Slurm's; return the output lines."""
    plan = hand_made.plan(tmp_path / "runs/demo", {**hand_made.SETTINGS, "cluster": {"kind": "slurm"}})
    atomic_files.write_json(tmp_path / "plan.json", plan.model_dump(mode="json"))

    def run(sbatch: str) -> list[str]:
        for name, lines in (("sbatch", sbatch), ("srun", "exit 1")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{lines}\n")
            (tmp_path / name).chmod(0o700)
        command = [sys.executable, "-c", SUBMIT, str(tmp_path / "plan.json")]
        env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        env["PATH"] = f"{tmp_path}:{env['PATH']}"
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60 * slowness(), start_new_session=True)
        require_exit(done)
        return done.stdout.splitlines()

    return run


def test_an_interrupt_from_the_terminal_does_not_end_sbatch(submit: Callable[[str], list[str]]) -> None:
    """A terminal sends the interrupt to all processes of the command, including sbatch."""
    assert submit("kill -INT 0; echo Submitted batch job 77") == ["job 77 1", ""]


@pytest.mark.rest
@pytest.mark.parametrize("end", ["echo sbatch: warning >&2; kill -KILL $$", "exit 1"], ids=["killed", "silent"])
def test_an_sbatch_without_an_answer_may_leave_a_job(submit: Callable[[str], list[str]], tmp_path: Path, end: str) -> None:
    said = submit(end)
    assert said[0] == said[-1] == "sbatch ended without an answer; Slurm may have the job"
    assert "look for it with: squeue --me --name=demo-run, end it with scancel" in said[2]
    shutil.rmtree(tmp_path / "runs/demo")
    said = submit("echo sbatch: error: invalid account >&2; exit 1")
    assert said[0] == said[-1] == "sbatch refused the job"


class InterruptedCluster(LocalCluster):
    """Simulates Ctrl-C while the run is being submitted."""

    def submit(self, run: RunDir, attempt: int, plan: Path) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_while_a_run_is_submitted_waits_until_the_run_can_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.defer()
        run, attempt = start_run(hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS), InterruptedCluster())
        assert interrupts.received == [signal.SIGINT]
        assert (attempt, run_store.read_status(run).state) == (1, "pending")
        assert interrupted_start(run) == EXIT_INTERRUPTED
        assert capsys.readouterr().out.endswith(f"stop it with: python -m launcher cancel {run.root}\n")
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), Interrupts():
        os.kill(os.getpid(), signal.SIGINT)


def test_after_an_interrupt_no_other_run_of_a_sweep_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "cluster_for", lambda kind: InterruptedCluster())
    names = ("one", "two", "three")
    plans = [hand_made.plan(tmp_path / name, hand_made.SETTINGS).model_copy(update={"run_name": name}) for name in names]
    assert train.start_all(plans, follows=False) == EXIT_INTERRUPTED
    assert capsys.readouterr().out.endswith("not started: two, three\n")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_an_interrupt_during_the_imports_prints_no_traceback() -> None:
    code = (
        "import os, runpy, signal, sys\n"
        "class Now:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'launcher.cli.main': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Now())\n"
        "runpy.run_module('launcher', run_name='__main__', alter_sys=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60 * slowness())
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
