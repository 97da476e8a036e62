"""The wording of messages: tests/golden/messages.txt shows about 50 mistakes, each with the command that makes it.

LAUNCHER_WRITE_GOLDEN=1 writes the file again. Other tests assert the class of an error and where it points, here for
mistakes in commands on runs.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import hand_made
import pytest
from forked import Launch

from launcher.cli.main import main
from launcher.config.compose import conf_dir
from launcher.errors import SubmitError
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, run_store

FILES = {
    "mine.yaml": "model: qwen3_9b\nlearning_rate: 1e-5\noptim:\n  lr: fast\n  epz: 1\ntrain: 5\ndefaults: [x]\noptim.eps: 3\n",
    "twice.yaml": "optim:\n  lr: 1\n  lr: 2\n",
    "half.yaml": "optim: [1\n",
    "list.yaml": "- optim\n",
    "nothing.yaml": "# nothing\n",
    "other.yaml": "cluster: {partition: x}\nrun: {name: 5}\ndata: {base: jsonl}\n",
    "rows.jsonl": '{"text": "good"}\n{"text": bad}\n',
    "empty.jsonl": "",
    "conf/experiment/mine.yaml": "# @package _global_\ndefaults:\n  - /model: tiny\n",
}
# One command a line; the paragraphs are settings, a run's file, data and model, verbs, and runs.
COMMANDS = """\
plan train.max_stepz=3
plan learning_rate=1e-4 warmup_ratio=0.03 lora_r=8 qqq=1
plan model=tniy
plan model=Qwen/Qwen3-8B
plan cluster.partition=main cluster.kind=slrum
plan optim.lr=0 optim.betas=[0.9,1.5] model.dtype=bf61 run.seed=x eval.sample=yes
plan run.name=12 run.root=~/runs
plan optim.betas=0.9,0.95
plan data.sources=[{name:a}]
plan train.max_steps=5 train.epochs=1
plan run.name=${nope}
plan tracking.password=hunter2
plan deepspeed.extra.bf16.enabled=false
plan -m run.name=one optim.lr=1e-5,2e-5
plan --max-steps 4 --jsn word
plan data=jsonl
plan --config-dir conf experiment=mine
plan --config-dir nowhere
+cluster=slurm cluster.setup=['echo $HOME'] cluster.additional_parameters.qos='a;b'

plan mine.yaml
plan twice.yaml
plan half.yaml
plan list.yaml
plan nothing.yaml
plan other.yaml
plan mien.yaml
plan mine.yaml half.yaml
plan rows.jsonl

plan data.path=nowhere.jsonl model.path=./no_model
plan data.path=empty.jsonl
plan model.path=.
plan model.path=package:no_such_module/weights.gguf
plan model=tiny train.global_batch_size=7 cluster.gpu_type=H10 deepspeed.hpz_partition_size=3

paln model=tiny
stop demo
plan model=tiny data
plan demo
status
status demo --wach
export demo --dtype bf61

status dem
status conf
status demo --root elsewhere
logs demo --attempt 3
logs demo --rank 2
cancel demo
resume demo --step 7
resume demo --step x
resume demo model=qwen3_8b train.max_stepz=1
export demo --step 7
checkpoints demo --step 3
ls --root runs/demo
ls oci://bucket/runs
config demo optim.lrr=1
diff demo nothing
"""
Refuse = Callable[..., str]


def test_messages_are_those_of_the_catalogue(
    run: RunDir,
    golden: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    for name, text in FILES.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    shown = []
    for line in COMMANDS.splitlines():
        if not line:
            continue
        assert main(shlex.split(line)) == 2, line
        out, err = capsys.readouterr()
        assert out == "", line
        assert "Traceback" not in err
        shown.append(f"$ launcher {line}\n{err}")
    text = "\n".join(shown).replace(str(conf_dir()), "CONF").replace(str(tmp_path), "DIR")
    assert "hunter2" not in text.replace("password=hunter2", "")
    # Names of options and commands are added often.
    text = re.sub(r"(choose one of|the sections are|commands are|these are accepted|in this section are): .*", r"\1: ...", text)
    # Versions of Python quote choices differently.
    golden("messages.txt", re.sub(r"\(choose from .*\)", "(choose from ...)", text))


@pytest.fixture
def refuse(launch_here: Launch, run: RunDir) -> Refuse:
    """Run a command in the folder above the runs; check that it refuses and changes nothing. Returns standard error."""

    def files() -> dict[Path, int]:
        # Lock files stay after the lock is released.
        paths = (path for path in run.root.parent.rglob("*") if path.is_file() and path.name != ".lock")
        return {path: path.stat().st_mtime_ns for path in paths}

    def refused(*arguments: str) -> str:
        before = files()
        done = launch_here(*arguments, cwd=run.root.parent.parent)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert "Traceback" not in done.stderr
        assert "where:  " in done.stderr
        assert "remedy: " in done.stderr
        assert files() == before
        return done.stderr

    return refused


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("status", ["RUN"]),
        ("status dem", ["did you mean demo?"]),
        ("status demo --root elsewhere", ["--root"]),
        ("logs runs/demo/attempts/001", ["/runs/demo"]),
        ("status demo --wach", ["--wach", "--watch"]),
        ("resume demo --step x", ["--step", "'x'"]),
        ("resume demo --step 7", ["choose one of: 5, 10"]),
        ("export demo --dtype bf61", ["--dtype", "bf16"]),
        ("export demo --step 7", ["choose one of: 5, 10"]),
        ("logs demo --attempt 3 -f", ["choose one of: 1, 2"]),
        ("logs demo --rank 2 -f", ["--rank"]),
        ("cancel demo", ["completed"]),
        ("drill --fault hnag", ["--fault", "hang"]),
        ("ls --root elsewhere", ["where:  elsewhere"]),
        ("ls --root runs/demo", ["python -m launcher status runs/demo"]),
        ("ls oci://bucket/runs", ["command line", "ocifs"]),
    ],
)
def test_a_mistyped_command_is_answered_with_what_exists(refuse: Refuse, command: str, parts: list[str]) -> None:
    text = refuse(*shlex.split(command))
    for part in parts:
        assert part in text


@pytest.mark.parametrize("verb", ["logs", "resume", "export"])
@pytest.mark.parametrize("content", [None, '{"run_na'], ids=["missing", "half"])
def test_a_plan_that_is_missing_or_damaged_is_restored_by_the_command_that_is_named(
    refuse: Refuse, launch_here: Launch, run: RunDir, verb: str, content: str | None
) -> None:
    text = run.plan.read_text()
    run.plan.unlink() if content is None else run.plan.write_text(content)
    message = refuse(verb, "demo")
    assert ("has no plan.json" if content is None else f"where:  {run.plan}") in message
    command = re.search(r"remedy: restore it with: (cp .*)", message)
    assert command is not None
    subprocess.run(shlex.split(command[1]), check=True, timeout=10)
    assert run.plan.read_text() == text


def test_an_export_without_a_checkpoint_names_what_to_do(refuse: Refuse, run: RunDir) -> None:
    shutil.rmtree(run.checkpoints)
    assert "python -m launcher resume runs/demo" in refuse("export", "demo")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), KeyboardInterrupt()], ids=["full", "interrupt"]
)
def test_a_run_directory_that_cannot_be_completed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """An incomplete run directory would keep its name in use."""

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(atomic_files, "write_text", fail)
    plan = hand_made.plan(tmp_path / "runs/demo", hand_made.SETTINGS)
    with pytest.raises((SubmitError, KeyboardInterrupt)) as raised:
        run_store.create(plan)
    if isinstance(error, OSError):
        assert "the run directory cannot be written: No space left on device" in str(raised.value)
        assert "set run.root to a folder on another disk" in str(raised.value)
    assert [*(tmp_path / "runs").iterdir()] == []
