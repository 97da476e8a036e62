"""`rm` on real run directories, and `clean` on a cache with every kind of entry."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hand_made
import pytest
from plan_fixtures import DATA

from launcher.cli.main import main
from launcher.clusters.detached_process import describe_this_process
from launcher.plan.launch_plan import Lineage
from launcher.plan.run_dir import RunDir
from launcher.runs import atomic_files, json_records, locks, run_store
from launcher.runs.run_records import ExportRecord, MirrorRecord
from launcher.tracking.jsonl import JsonlTracker

Ask = Callable[..., tuple[int, str, str]]
Clean = Callable[..., tuple[int, dict, str]]
DAY = 86400.0
AGES = {"data/old": 90, "data/young": 9, "data/fresh": 2, "models/tiny-0123": 40, "sources/abcd": 10, "weight-checks": 50}


@pytest.fixture
def ask(run: RunDir, typed: Ask) -> Ask:
    """Run `rm ARGUMENTS` in the fixture's folder of runs."""
    return partial(typed, "rm", "--root", str(run.root.parent))


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
    (left / "plan.json").write_text("{}")
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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose entries are kilobytes in size and were last used days ago, in a working directory without runs."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LAUNCHER_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    for number, (name, days) in enumerate(AGES.items(), 1):
        fill(folder / name, number * 1000, days)
    return folder


def fill(folder: Path, num_bytes: int, days: float) -> None:
    folder.mkdir(parents=True)
    (folder / "content").write_bytes(b"x" * num_bytes)
    age(folder, days)


def age(path: Path, days: float) -> None:
    at = time.time() - days * DAY
    for one in (*path.rglob("*"), path):
        os.utime(one, (at, at))


@pytest.fixture
def clean(cache: Path, capsys: pytest.CaptureFixture[str]) -> Clean:
    """Run `clean --json ARGUMENTS`; return exit code, the JSON object on standard output, and standard error."""

    def cleaned(*arguments: str) -> tuple[int, dict, str]:
        code = main(["clean", "--json", *arguments])
        out, err = capsys.readouterr()
        return code, json.loads(out) if out else {}, err

    return cleaned


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def run_with(folder: Path, state: str, root: Path) -> RunDir:
    """Create a run whose data cache is `folder`, last used a hundred days ago."""
    plan = hand_made.plan(root / f"is-{state}", hand_made.SETTINGS, data=DATA.model_copy(update={"cache_dir": str(folder)}))
    run = hand_made.run(plan, state=state)
    status = replace(run_store.read_status(run), updated_at=time.time() - 100 * DAY)
    run.status.write_text(json.dumps(vars(status)))
    return run


def test_everything_unused_goes_the_oldest_first(clean: Clean, cache: Path) -> None:
    code, answer, _ = clean("--dry-run")
    assert code == 0
    assert names(answer["chosen"]) == ["old", "weight-checks", "tiny-0123", "abcd", "young"]
    assert [(entry["kind"], entry["bytes"]) for entry in answer["entries"][:1]] == [("data", 1000)]
    assert (cache / "data/old").is_dir()
    assert clean("--yes")[0] == 0
    assert [path.parent.name for path in cache.rglob("*") if path.is_file()] == ["fresh"], "of the last seven days"
    assert clean("--yes", "--older-than", "1d")[0] == 0
    assert clean("--yes")[1]["entries"] == []


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (["--older-than", "45d"], ["old", "weight-checks"]),
        (["--older-than", "1200h", "--only", "data"], ["old"]),
        (["--only", "sources", "--only", "models"], ["tiny-0123", "abcd"]),
    ],
)
def test_choices(clean: Clean, flags: list[str], chosen: list[str]) -> None:
    code, answer, _ = clean(*flags, "--yes")
    assert (code, names(answer["chosen"])) == (0, chosen)


@pytest.mark.parametrize("flags", [["--older-than", "soon"], ["--only", "runs"]])
def test_a_choice_that_is_none_is_refused(clean: Clean, cache: Path, flags: list[str]) -> None:
    code, answer, _ = clean(*flags, "--yes")
    assert (code, answer["exit_code"]) == (2, 2)
    assert flags[0] in answer["message"]
    assert (cache / "data/old").is_dir()


def test_without_a_terminal_and_without_yes_nothing_is_removed(clean: Clean, cache: Path) -> None:
    code, answer, _ = clean()
    assert (code, answer["message"]) == (2, "nothing was removed: there is no terminal to ask on")
    assert (cache / "data/old").is_dir()


@pytest.mark.parametrize("state", ["running", "failed", "preempted", "cancelled", "completed"])
def test_what_an_unfinished_run_uses_stays(clean: Clean, cache: Path, tmp_path: Path, state: str) -> None:
    run = run_with(cache / "data/old", state, tmp_path / "elsewhere/runs")
    code, answer, _ = clean("--only", "data", "--yes", "--root", "elsewhere/runs")
    assert code == 0
    (entry,) = (entry for entry in answer["entries"] if entry["path"].endswith("/old"))
    assert entry["runs"] == [str(run.root)]
    is_finished = state == "completed"
    assert entry["kept"] == ("" if is_finished else f"used by is-{state} ({state})")
    assert (cache / "data/old").is_dir() != is_finished
    assert not (cache / "data/young").exists()


def test_the_data_of_evaluation_sets_counts_as_used(clean: Clean, cache: Path, tmp_path: Path) -> None:
    evaluated = DATA.model_copy(update={"cache_dir": str(cache / "data/old")})
    hand_made.run(hand_made.plan(tmp_path / "runs/one", hand_made.SETTINGS, eval_sets={"held-out": evaluated}), state="failed")
    _, answer, _ = clean("--only", "data", "--yes")
    assert names(answer["chosen"]) == ["young"]
    assert (cache / "data/old").is_dir()


def test_a_run_whose_plan_is_damaged_stops_the_command(clean: Clean, cache: Path, tmp_path: Path) -> None:
    run = run_with(cache / "data/old", "failed", tmp_path / "runs")
    run.plan.write_text("{")
    code, answer, _ = clean("--yes")
    assert (code, answer["message"]) == (2, "the plan of a run cannot be read, so what it uses is unknown")
    assert "python -m launcher rm runs/is-failed" in answer["remedy"]
    assert (cache / "data/old").is_dir()


def test_what_is_being_built_stays(clean: Clean, cache: Path) -> None:
    fill(cache / "data/next.partial", 100, 9)
    fill(cache / "models/.killed-0123", 100, 9)
    with locks.hold(cache / "data/next.lock", 0, "python -m launcher data"), locks.hold(cache / "data/old.lock", 0, "other"):
        code, answer, _ = clean("--yes")
    assert code == 0
    kept = {Path(entry["path"]).name: entry["kept"] for entry in answer["entries"] if entry["kept"]}
    assert kept.keys() == {"next.partial", "old"}
    assert kept["next.partial"].startswith(f"being built by process {os.getpid()} on ")
    assert ".killed-0123" in names(answer["chosen"])
    assert "next.partial" in names(clean("--yes")[1]["chosen"]), "its builder has ended"


def test_the_table_says_what_is_to_be_done_with_each_part(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_with(cache / "data/fresh", "failed", tmp_path / "runs")
    assert main(["clean", "--older-than", "45d", "--dry-run"]) == 0
    rows = {Path(line.split()[0]).name: line for line in capsys.readouterr().out.splitlines() if len(line.split()) > 5}
    assert str(cache / "data/fresh") in rows["fresh"]
    assert rows["fresh"].endswith("is-failed  keep: used by is-failed (failed)")
    assert rows["old"].endswith("-          remove")
    assert rows["abcd"].endswith("-          keep")
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["clean", "--older-than", "45d", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    below = lines[lines.index(str(cache / "data/fresh")) + 1]
    assert below.split()[0] == "data", "the path has a line of its own in a narrow terminal"
    assert below.endswith("keep: used by is-failed (failed)")


def test_a_cache_that_a_group_shares_goes_on_request_only(clean: Clean, cache: Path) -> None:
    fill(cache / "data-team/common", 100, 100)
    _, answer, _ = clean("--only", "data", "--yes")
    kept = {Path(entry["path"]).name: entry["kept"] for entry in answer["entries"] if entry["kept"]}
    assert kept == {"common": "shared with the group team"}
    assert names(clean("--only", "data", "--yes", "--shared")[1]["chosen"]) == ["common"]


def test_a_folder_of_the_cache_that_is_a_link_is_not_followed(clean: Clean, cache: Path, tmp_path: Path) -> None:
    fill(tmp_path / "precious/part", 10, 100)
    (cache / "data-team").symlink_to(tmp_path / "precious")
    (cache / "models/linked").symlink_to(tmp_path / "precious")
    assert clean("--yes", "--shared")[0] == 0
    assert (tmp_path / "precious/part/content").is_file()
