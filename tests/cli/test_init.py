"""`init` writes a starter file that plans without changes, and touches no existing file."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from forked import ForkingWorkers

from launcher.cli import worker_process
from launcher.cli.init import format_file
from launcher.cli.main import main
from launcher.config.command_line import conf_dir
from launcher.config.compose import compose_one

Typed = Callable[..., tuple[int, str, str]]
GPUS = ("cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=8")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub cache without models."""
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def workers(hub: Path) -> ForkingWorkers:
    return ForkingWorkers({"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)})


@pytest.fixture
def typed(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hub: Path,
    workers: ForkingWorkers,
    launcher_cache: Path,
) -> Typed:
    """Run a command in a folder with `chats.jsonl` and without access to the Hub; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    monkeypatch.setenv("LAUNCHER_CACHE", str(launcher_cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(worker_process, "subprocess", workers)
    rows = [
        {"messages": [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "word " * (10 + i % 90)}]}
        for i in range(3000)
    ]
    Path("chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def command(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return command


@pytest.mark.rest
def test_the_file_fits_data_model_and_machine_and_plans_as_it_is(typed: Typed) -> None:
    code, out, err = typed("init", "--data", "chats.jsonl", "--model", "tiny", "tracking=none")
    assert (code, out.splitlines()[0]) == (0, "wrote chats.yaml"), err
    assert "assumed" not in out
    for command in ("data chats.yaml", "plan chats.yaml", "train chats.yaml"):
        assert f"  python -m launcher {command}\n" in out
    text = Path("chats.yaml").read_text()
    assert "# chats.jsonl: 3,000 rows." in text
    content = yaml.safe_load(text)
    assert content["model"] == "tiny"
    assert content["data"] == {"base": "jsonl", "path": "chats.jsonl", "max_length": 256, "eval_fraction": 0.04}
    assert (content["train"]["epochs"], content["cluster"], content["tracking"]) == (3, "local", "none")
    # Each suggestion follows its reason.
    lines = text.splitlines()
    for key in ("max_length", "eval_fraction", "epochs", "global_batch_size", "lr", "warmup_steps", "every", "save_every"):
        number = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
        assert lines[number - 1].startswith("  # "), key
    code, out, err = typed("plan", "chats.yaml", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["config"]["optim"]["lr"] == 1e-4
    assert plan["provenance"]["overrides"] == ["chats.yaml"]
    assert plan["warnings"] == []


@pytest.mark.rest
def test_a_model_that_is_not_at_hand_is_assumed_and_what_was_typed_stays(typed: Typed) -> None:
    code, out, err = typed(
        *("init", "--data", "chats.jsonl", "--model", "qwen3_8b", "--out", "big.yaml", "train.epochs=1", *GPUS, "cluster.nodes=2")
    )
    assert code == 0, err
    assert "assumed: Qwen/Qwen3-8B is not on this machine, and the Hub cannot be reached" in out
    content = yaml.safe_load(Path("big.yaml").read_text())
    assert (content["train"]["epochs"], content["train"]["global_batch_size"] % 16) == (1, 0)
    assert content["model"] == "qwen3_8b"
    assert (content["cluster"]["nodes"], float(content["optim"]["lr"]), "deepspeed" in content) == (2, 7e-6, False)
    assert typed("plan", "big.yaml")[0] == 0
    # The model states of 8 billion parameters do not fit on one GPU.
    small = ("--out", "small.yaml", "cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=1")
    assert typed("init", "--data", "chats.jsonl", "--model", "qwen3_8b", *small)[0] == 0
    assert yaml.safe_load(Path("small.yaml").read_text())["deepspeed"] == {
        "offload_optimizer": "cpu",
        "offload_params": "cpu",
    }
    commit = "0123456789abcdef" * 2 + "01234567"
    pinned = ("--out", "hub.yaml", f"model.revision={commit}", *GPUS)
    code, out, err = typed("init", "--data", "chats.jsonl", "--model", "someone/model-3B", *pinned)
    assert code == 0, err
    assert "assumed: the size of the model is taken from its name: 3 billion parameters" in out
    model = yaml.safe_load(Path("hub.yaml").read_text())["model"]
    assert model == {"path": "someone/model-3B", "revision": commit}


def test_the_commands_of_the_readme_work_as_they_stand(typed: Typed) -> None:
    """Commands that need neither the Hub nor a cluster run verbatim; the others use the file that these write."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    lines = readme.split("```sh\n")[1].partition("```")[0].replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    assert [line[:4] for line in words] == [
        ["pip", "install", "."],
        ["python", "-m", "launcher", "init"],
        *(["python", "-m", "launcher", verb] for verb in ("data", "plan", "train")),
    ]
    Path("chats.jsonl").rename("rows.jsonl")
    init, data, plan, train = (line[3:] for line in words[1:])
    code, out, err = typed(*init)
    assert code == 0, err
    assert "fitted to: 16 GPUs of type H100-80GB on 2 nodes (slurm)" in out
    assert (data[1:], train[1:]) == (["rows.yaml"], ["rows.yaml"])
    code, out, err = typed(*plan)
    assert code == 0, err
    assert "2 nodes x 8" in out
    assert "an hour = 16 GPUs x $" in out


@pytest.mark.rest
def test_all_of_long_texts_is_trained(typed: Typed) -> None:
    Path("book.txt").write_text("It was a dark and stormy night. " * 1000)
    assert typed("init", "--data", "book.txt", "--model", "tiny")[0] == 0
    assert yaml.safe_load(Path("book.yaml").read_text())["data"]["long_documents"] == "split"
    code, out, err = typed("data", "book.yaml")
    assert code == 0, err
    assert "truncated" not in out


@pytest.mark.parametrize("line_break", ["\n", "\u2028"])
def test_the_name_of_a_file_adds_no_settings(typed: Typed, line_break: str) -> None:
    """YAML ends a comment at these characters, and the file may be named by another user."""
    name = f"rows{line_break}export: {{push_to_hub: mallory}}{line_break}#.jsonl"
    Path("chats.jsonl").rename(name)
    code, _, err = typed("init", "--data", name, "--model", "tiny", "--out", "run.yaml")
    assert code == 2, err
    assert "contains a control character" in err
    assert not Path("run.yaml").exists()
    text = format_file([name], {"model": "tiny", "train": {"epochs": 3}}, {"model": name, "train.epochs": name})
    assert yaml.safe_load(text) == {"model": "tiny", "train": {"epochs": 3}}


@pytest.mark.rest
def test_on_machines_that_run_the_same_command_the_run_has_a_name(typed: Typed) -> None:
    words = ("init", "--data", "chats.jsonl", "--model", "tiny", "+cluster=static", "cluster.nodes=2", *GPUS)
    code, out, err = typed(*words)
    assert code == 0, err
    assert yaml.safe_load(Path("chats.yaml").read_text())["run"] == {"name": "chats"}
    assert "docs/static.md" in out


@pytest.mark.rest
def test_without_data_it_writes_the_demonstration(typed: Typed) -> None:
    code, out, err = typed("init", "--model", "tiny", "tracking=none")
    assert (code, out.splitlines()[0]) == (0, "wrote run.yaml"), err
    content = yaml.safe_load(Path("run.yaml").read_text())
    assert (content["data"], content["train"]) == ("stdlib_docs", {"max_steps": 16})


@pytest.mark.rest
@pytest.mark.parametrize(
    "words",
    [
        ("base.yaml", "eval.every=9"),
        ("model=tiny", "data.checks.truncated=fail", "eval={every: 0}", "++optim.lr=1e-5"),
        ("model=tiny", "~tracking"),
        ("--config-dir", "own", "model=mine"),
    ],
)
def test_the_file_has_everything_that_was_typed(typed: Typed, words: tuple[str, ...]) -> None:
    Path("base.yaml").write_text("{model: tiny, tracking: none, data: {checks: {truncated: fail}}, eval: {every: 7}}")
    (Path("own") / "model").mkdir(parents=True)
    shutil.copy(conf_dir() / "model" / "tiny.yaml", "own/model/mine.yaml")
    code, _, err = typed("init", *words, "--out", "2024.yaml")
    assert code == 0, err
    assert compose_one(["2024.yaml"]).config == compose_one(words).config


def test_nothing_is_overwritten(typed: Typed) -> None:
    Path("chats.yaml").write_text("mine")
    code, out, err = typed("init", "--data", "chats.jsonl", "--model", "tiny")
    assert (code, out) == (2, "")
    assert "--out" in err
    assert Path("chats.yaml").read_text() == "mine"
    assert "--out" in typed("init", "--out", "folder/my.yaml")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "chat.jsonl"), "chat.jsonl"),
        (("--data", "chats.jsonl", "--model", "tinny"), "did you mean tiny?"),
        (("--data", "chats.jsonl", "--model", "./weights"), "there is no such folder"),
        (("--dat", "chats.jsonl"), "did you mean --data?"),
        (("--model", "tiny", "-m", "optim.lr=1,2"), "the settings of one run"),
        (("--data", "bad.jsonl", "--model", "tiny"), "bad.jsonl:2"),
        (("chats.jsonl", "model=tiny"), "init --data chats.jsonl"),
        (("--data", "chats.jsonl", "--out", "mine.txt"), ".yaml"),
        (("--data", "chats.jsonl", "--model", "run:nope"), "there is no run named nope"),
    ],
)
def test_what_a_run_would_refuse_is_refused_and_nothing_is_written(words: tuple[str, ...], message: str, typed: Typed) -> None:
    Path("bad.jsonl").write_text('{"text": "a row"}\n{"text": \n')
    before = {path.name for path in Path().iterdir()}
    code, out, err = typed("init", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert {path.name for path in Path().iterdir()} - {"hub"} == before
