"""The `rm` command on real run directories."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import hand_made
import pytest

from launcher import atomic_files, json_records, locks, run_store
from launcher.cli.main import main
from launcher.clusters.detached_process import describe_this_process
from launcher.plan.launch_plan import Lineage
from launcher.plan.run_dir import RunDir
from launcher.run_records import ExportRecord, MirrorRecord
from launcher.tracking.jsonl import JsonlTracker

Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(run: RunDir, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Run `rm ARGUMENTS` in the fixture's folder of runs; return exit code, standard output and standard error."""

    def asked(*arguments: str) -> tuple[int, str, str]:
        code = main(["rm", "--root", str(run.root.parent), *arguments])
        return code, *capsys.readouterr()

    return asked


@pytest.fixture
def child(run: RunDir) -> RunDir:
    """A run initialized with the weights of the other run."""
    origin = Lineage(run_name="demo", run_dir=str(run.root), step=10, plan_digest="d", wandb_id="w")
    return hand_made.run(hand_made.plan(run.root.with_name("child"), hand_made.SETTINGS, lineage=origin), state="failed")


class Terminal:
    def isatty(self) -> bool:
        return True


def describe_copies(run: RunDir) -> None:
    run.export.mkdir()
    json_records.write(run.export / "export.json", ExportRecord(10, "d", "bf16"))
    mirror = MirrorRecord("s3://bucket/runs", (5, 10), (), None, 1.0)
    json_records.write(run.attempt(2) / "mirror.json", mirror)
    JsonlTracker(run, 2).event("export", "pushed", url="https://hub.example/me/model")


def test_what_goes_is_shown_and_removed(run: RunDir, ask: Ask) -> None:
    describe_copies(run)
    code, out, err = ask("demo", "--dry-run")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "completed, at step 10 of 40" in lines["state"]
    assert lines["checkpoints"].split()[1:] == ["5,", "10"]
    assert "s3://bucket/runs has the steps 5, 10" in lines["copies"]
    assert "https://hub.example/me/model" in lines["copies"]
    assert "nothing was removed, because of --dry-run" in out
    assert run.plan.is_file()
    code, out, err = ask("demo", "--yes", "--json")
    assert (code, err) == (0, "")
    values = json.loads(out)
    assert (values["removed"], values["left"]) == (True, [])
    assert values["runs"][0]["steps"] == [5, 10]
    assert values["runs"][0]["bytes"] > 4000
    assert list(run.root.parent.iterdir()) == []


def test_without_a_terminal_it_refuses_to_guess(run: RunDir, ask: Ask) -> None:
    code, out, err = ask("demo")
    assert code == 2
    assert "none known: what is removed is gone" in out
    assert err.startswith("nothing was removed: there is no terminal to ask on\n")
    assert f"python -m launcher rm --root {run.root.parent} demo --yes" in err
    assert run.plan.is_file()


@pytest.mark.parametrize(("answer", "code"), [("n", 2), ("", 2), ("yes", 0)])
def test_a_terminal_is_asked(run: RunDir, ask: Ask, monkeypatch: pytest.MonkeyPatch, answer: str, code: int) -> None:
    questions = []
    monkeypatch.setattr("launcher.cli.removal.sys", SimpleNamespace(stdin=Terminal(), stdout=Terminal()))
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or answer)
    assert ask("demo")[0] == code
    assert questions[0].startswith("remove 1 run, ")
    assert run.root.exists() == (code == 2)


def test_a_live_run_is_refused_whatever_else_is_asked(run: RunDir, ask: Ask) -> None:
    run_store.update_status(run, state="running", job=describe_this_process())
    code, _, err = ask("demo", "--yes", "--even-if-needed")
    assert code == 2
    assert err.startswith("the run demo is running\n")
    assert f"python -m launcher cancel {run.root}" in err
    # The state is final, but the process is still uploading.
    run_store.update_status(run, state="completed")
    code, _, err = ask("demo", "--yes")
    assert code == 2
    assert f"value:  process {os.getpid()}" in err
    assert run.plan.is_file()


def test_a_run_that_is_being_started_is_refused(run: RunDir, ask: Ask) -> None:
    with locks.hold(run.root / ".lock", 0, "python -m launcher resume demo"):
        code, _, err = ask("demo", "--yes")
    assert code == 2
    assert "python -m launcher resume demo" in err
    assert run.plan.is_file()


def test_a_parent_is_removed_with_its_child_or_on_request_only(run: RunDir, child: RunDir, ask: Ask) -> None:
    code, _, err = ask("demo", "--yes")
    assert code == 2
    assert err.startswith("other runs start from the weights of the run demo\n")
    assert f"value:  {child.root}" in err
    assert ask("demo", "child", "--dry-run")[0] == 0
    assert ask("demo", "--yes", "--even-if-needed")[0] == 0
    assert not run.root.exists()
    assert child.plan.is_file()


def test_all_runs_are_checked_before_the_first_is_removed(run: RunDir, child: RunDir, ask: Ask) -> None:
    run_store.update_status(child, state="running", job=describe_this_process())
    code, _, err = ask("demo", "child", "nothing", "--yes")
    assert code == 2
    assert err.startswith("there is no run named nothing\n")
    code, _, err = ask("demo", "child", "--yes")
    assert code == 2
    assert err.startswith("the run child is running\n")
    assert run.plan.is_file()


def test_links_are_removed_and_not_followed(run: RunDir, ask: Ask, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("kept")
    (run.root / "datasets").symlink_to(outside)
    (run.checkpoints / "step-00000012").symlink_to(outside)
    assert ask("demo", "--yes")[0] == 0
    assert not run.root.exists()
    assert (outside / "precious").read_text() == "kept"


def test_a_run_on_another_disk_goes_with_the_link_to_it(run: RunDir, ask: Ask, tmp_path: Path) -> None:
    elsewhere = tmp_path / "large-disk" / "demo"
    elsewhere.parent.mkdir()
    run.root.rename(elsewhere)
    run.root.symlink_to(elsewhere)
    assert ask("demo", "--yes")[0] == 0
    assert not elsewhere.exists()
    assert not run.root.is_symlink()


def test_a_link_of_that_name_to_somewhere_else_stays(
    run: RunDir, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").symlink_to("/storage/that/is/away")
    assert ask("demo", "--yes")[0] == 0
    assert not run.root.exists()
    assert Path("demo").is_symlink()


def test_what_an_interrupted_removal_left_goes_with_a_run_of_that_name(run: RunDir, ask: Ask) -> None:
    left = run.root.with_name(f"{atomic_files.REMOVING_PREFIX}demo")
    left.mkdir()
    (left / "status.json").write_text("{}")
    assert [one.root.name for one in run_store.list_runs(run.root.parent)] == ["demo"]
    assert ask("demo", "--yes")[0] == 0
    assert list(run.root.parent.iterdir()) == []


def test_what_cannot_be_removed_is_named(run: RunDir, ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = run.checkpoints / "step-00000005" / "rank-00000.safetensors"
    unlink = os.unlink

    def refusing(path: str, **options: int) -> None:
        if os.path.basename(path) == busy.name:
            raise OSError(16, os.strerror(16), path)
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refusing)
        code, _, err = ask("demo", "--yes")
    assert code == 1
    assert err.count("Device or resource busy") == 2, "one for each checkpoint, and none for the folders above"
    assert not run.root.exists()


def test_a_damaged_plan_does_not_keep_a_run_that_has_ended(run: RunDir, ask: Ask) -> None:
    run.plan.write_text("{")
    assert ask("demo", "--dry-run")[0] == 0
    run_store.update_status(run, state="running", job={"pid": 1})
    code, _, err = ask("demo", "--yes")
    assert code == 2
    assert err.startswith("it is unknown whether the run demo has ended: ")
    run_store.update_status(run, state="failed")
    run.plan.unlink()
    assert ask("demo", "--yes")[0] == 0
    assert not run.root.exists()
