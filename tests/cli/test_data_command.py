"""The `data` command as a user runs it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from random import Random

import pytest
from forked import Launch, require_exit

from launcher.data.tokenization.batch_encoder import MIN_BYTES
from launcher.plan.quantities import format_size

SETTINGS = ("model=tiny", "data=jsonl", "data.max_length=128", "data.workers=1", "tracking=none")
EVIL = "<script>alert(1)</script> [bold]not markup[/bold]"
KEY = "sk-proj-" + "aB3" * 12
ESCAPE = "\x1b[31m"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows with a few faults, none of which makes a run fail."""
    words = "apple river stone cloud light music paper green window garden".split()  # noqa: SIM905
    texts = [" ".join(words[(i * 7 + j * j) % 10] for j in range(12)) + f" {i}" for i in range(120)]
    lines = [{"prompt": f"{text}?", "completion": f" {i} {EVIL}{ESCAPE}"} for i, text in enumerate(texts)]
    lines[0][f"{EVIL}{ESCAPE}"] = "not read"
    lines += [lines[0], {"prompt": "key?", "completion": f" {KEY}"}, {"prompt": "empty?", "completion": " "}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def leaking(rows: Path, tmp_path: Path) -> tuple[str, ...]:
    """Settings whose held-out file repeats a training row."""
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(rows.read_text().splitlines()[3] + "\n" + '{"prompt": "another?", "completion": " yes"}\n')
    return (*SETTINGS, f"data.path={rows}", f"data.eval_path={held_out}", "data.eval_fraction=0")


@pytest.mark.rest
def test_the_report_in_a_pipe_has_marks_and_no_colors(launch: Launch, rows: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    # Long enough for two documents to fit in a row.
    longer = tuple(setting.replace("max_length=128", "max_length=256") for setting in SETTINGS)
    settings = (*longer, f"data.path={rows}", "data.eval_fraction=0")
    done = launch("data", *settings, "--show", "2", "--html", str(page), cwd=tmp_path)
    require_exit(done)
    assert "tokenize: 123 of 123 documents" in done.stderr
    shown = done.stdout
    assert "\x1b" not in shown
    assert shown.count("⟦") == shown.count("⟧") > 2
    for trained in re.findall("(?<!between )⟦(.*?)⟧", shown, re.DOTALL):
        assert re.fullmatch(rf"(\d+ {re.escape(EVIL)}␛\[31m|\[API key: .*\])<\|im_end\|>", trained), trained
    assert re.search(r"^train +123 +1 +122 ", shown, re.MULTILINE)
    assert re.search(r"document 2 of \d+, train, \d+ tokens", shown)
    assert f"{rows}:121: the same as {rows}:1" in shown
    assert f"{rows}:122: messages[1], character 0: [API key: s…, 44 characters]" in shown
    assert "data.checks.empty_answer=drop" in shown
    unread = "train: unread keys (rows): {key}[bold]not mark… (54 characters) (2)"
    assert unread.format(key="<script>alert(1)</script> ") in shown
    assert unread.format(key="&lt;script&gt;alert(1)&lt;/script&gt; ") in page.read_text()
    assert KEY not in shown + done.stderr + page.read_text()
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert html.count('class="bars"') == 3
    assert html.count("<th>source</th>") == 2, "one table would be cut off"
    # The page is self-contained: it loads nothing from elsewhere, whatever the rows contain.
    assert not re.search(r"<(link|img|iframe|object|script|image|use)\b|\b(src|href|srcset)\s*=|url\(|@import", html)
    folder, size = re.findall(r"^cache +(/\S+/data/[0-9a-f]{32}) \((.+)\)$", shown, re.MULTILINE)[0]
    files = [file for file in Path(folder).rglob("*") if file.is_file() and file.name != "meta.json"]
    assert size == format_size(sum(file.stat().st_size for file in files))
    assert re.search(r"^source +epochs +rows +tokens +share +trained", shown, re.MULTILINE)


def test_the_report_for_programs_needs_no_scheduler(launch_here: Launch, rows: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, f"data.path={rows}", "data.eval_fraction=0", "cluster=slurm")
    done = launch_here("data", *settings, "--json", "--show=1", cwd=tmp_path, SLURM_CONF="/nowhere")
    require_exit(done)
    report = json.loads(done.stdout)
    assert report["documents"] == 122
    assert not report["refused"]
    assert {one["name"]: one["count"] for one in report["findings"]}["secrets"] == 1
    assert [one["whole"] for one in report["shown"]] == [True]
    assert list(report["sources"][0]["unread_keys"].values()) == [2]


def test_token_ids_beyond_the_embedding_refuse_the_report_as_they_refuse_the_plan(
    launch_here: Launch, rows: Path, tmp_path: Path
) -> None:
    settings = (*SETTINGS, f"data.path={rows}", "data.eval_fraction=0", "model.config.vocab_size=100")
    for verb in ("data", "plan"):
        refused = launch_here(verb, *settings, cwd=tmp_path)
        assert refused.returncode == 2, refused.stdout
        assert "but the model's embedding has 100 rows" in refused.stderr


def imported(stderr: str) -> set[str]:
    """Return the modules that a command imported, from the output of PYTHONPROFILEIMPORTTIME."""
    return set(re.findall(r"^import time:.*\| +(\S+)$", stderr, re.MULTILINE))


@pytest.mark.rest
def test_a_file_of_real_size_is_built_by_several_processes(launch: Launch, tmp_path: Path) -> None:
    """Workers import the main module of the building process, so only the real command shows what they load."""
    random, words = Random(0), "apple river stone cloud light music paper green window garden".split()  # noqa: SIM905
    num_rows = 1000
    length = MIN_BYTES // num_rows
    texts = (" ".join(random.choices(words, k=length // 4))[:length] for _ in range(num_rows))
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}:", "completion": text}) + "\n" for i, text in enumerate(texts)))
    settings = ("model=tiny", "data=jsonl", f"data.path={path}", "data.max_length=256", "data.workers=2", "data.eval_fraction=0")
    settings = (*settings, "data.checks.no_turn_end=keep", "data.checks.truncated=keep")
    done = launch("data", *settings, "--json", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    require_exit(done)
    assert json.loads(done.stdout)["read_documents"] == num_rows
    assert "Traceback" not in done.stderr
    assert {"launcher.data.tokenization.forkserver_preload", "transformers"} <= imported(done.stderr)
    assert "torch" not in imported(done.stderr), "its import takes longer than the rest"


@pytest.mark.rest
def test_a_finished_cache_is_reported_without_a_second_process(
    launch: Launch, launch_here: Launch, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*SETTINGS, f"data.path={rows}", "data.eval_fraction=0")

    def answers(run: Launch, **env: str) -> list[subprocess.CompletedProcess[str]]:
        """Return the report as text, as JSON and as an HTML page."""
        page = tmp_path / "page.html"
        return [
            run("data", *settings, cwd=tmp_path, **env),
            run("data", *settings, "--json", cwd=tmp_path, **env),
            run("data", *settings, "--show=2", "--json", "--html", str(page), cwd=tmp_path, **env),
            subprocess.CompletedProcess([], 0, page.read_text(), ""),
        ]

    built = answers(launch_here)
    assert [done.returncode for done in built] == [0] * 4, built[0].stderr
    with monkeypatch.context() as patch:
        patch.setattr("launcher.cli.data.prepare", lambda *_, **__: pytest.fail("a second process"))
        again = answers(launch_here)
    assert [done.stdout for done in again] == [done.stdout for done in built]
    done = launch("data", *settings, "--json", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    assert done.stdout == built[1].stdout
    assert "numpy" in imported(done.stderr)
    assert imported(done.stderr).isdisjoint({"torch", "transformers", "launcher.worker.prepare"})
    # Modules for commands on runs take a tenth of the command's time to import.
    assert imported(done.stderr).isdisjoint({"launcher.runs.run_store", "launcher.cli.follow", "launcher.cli.train"})


@pytest.mark.rest
def test_held_out_rows_in_training_refuse_report_and_run(launch_here: Launch, leaking: tuple[str, ...], tmp_path: Path) -> None:
    runs = f"run.root={tmp_path / 'runs'}"
    reported = launch_here("data", *leaking, cwd=tmp_path)
    assert reported.returncode == 2
    assert "1 of 2 (50.0%)  held-out documents" in reported.stdout
    for done in (reported, launch_here(*leaking, runs, "run.name=x", "train.max_steps=1", cwd=tmp_path)):
        assert done.returncode == 2, done.stdout
        assert "held_out.jsonl:1" in done.stderr
        assert "data.checks.held_out_in_train=keep" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists(), "refused before anything is submitted"
    planned = launch_here("plan", *leaking, cwd=tmp_path)
    assert planned.returncode == 0
    assert "the run would be refused" in planned.stdout
    for setting in ("held_out_in_train=keep", "held_out_in_train=drop"):
        assert launch_here("data", *leaking, f"data.checks.{setting}", cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--show", "many"], "--show"),
        (["--html", "notes.html"], "not a page of the launcher"),
    ],
)
def test_invalid_options_are_refused_at_once(launch_here: Launch, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "notes.html").write_text("mine")
    done = launch_here("data", *SETTINGS, "data.path=rows.jsonl", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert "remedy: " in done.stderr
