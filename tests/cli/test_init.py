"""`init`: a starter file that plans as it is written, and nothing that exists is touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launcher.cli.main import main

Typed = Callable[..., tuple[int, str, str]]
GPUS = ("cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=8")


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Exit code, output and errors of a command in a folder with `chats.jsonl`; the Hub cannot be reached."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
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


def test_the_file_fits_data_model_and_machine_and_plans_as_it_is(typed: Typed) -> None:
    code, out, err = typed("init", "--data", "chats.jsonl", "--model", "tiny", "tracking=none")
    assert (code, out.splitlines()[0]) == (0, "wrote chats.yaml"), err
    assert "assumed" not in out
    for command in ("data chats.yaml --show 3", "plan chats.yaml", "train chats.yaml"):
        assert f"  python -m launcher {command}\n" in out
    text = Path("chats.yaml").read_text()
    assert "# chats.jsonl: 3,000 rows of the format messages." in text
    content = yaml.safe_load(text)
    assert content["model"] == "tiny"
    assert content["data"] == {"base": "jsonl", "path": "chats.jsonl", "max_length": 256}
    assert (content["train"]["epochs"], content["cluster"], content["tracking"]) == (3, "local", "none")
    # Each suggestion stands below its reason.
    lines = text.splitlines()
    for key in ("max_length", "epochs", "global_batch_size", "lr", "warmup_steps", "every", "save_every"):
        number = next(i for i, line in enumerate(lines) if line.strip().startswith(f"{key}:"))
        assert lines[number - 1].startswith("  # "), key
    code, out, err = typed("plan", "chats.yaml", "--json")
    assert code == 0, err
    plan = json.loads(out)
    assert plan["config"]["optim"]["lr"] == 1e-4
    assert plan["provenance"]["overrides"] == ["chats.yaml"]
    assert plan["warnings"] == []


def test_a_model_that_is_not_at_hand_is_assumed_and_what_was_typed_stays(typed: Typed) -> None:
    code, out, err = typed(
        *("init", "--data", "chats.jsonl", "--model", "qwen3_8b", "--out", "big.yaml", "train.epochs=1", *GPUS, "cluster.nodes=2")
    )
    assert code == 0, err
    assert "assumed: Qwen/Qwen3-8B is not on this machine" in out
    content = yaml.safe_load(Path("big.yaml").read_text())
    assert (content["train"]["epochs"], content["train"]["global_batch_size"] % 16) == (1, 0)
    assert content["model"] == {"base": "qwen3_8b", "activation_checkpointing": True}
    assert (content["cluster"]["nodes"], float(content["optim"]["lr"]), "deepspeed" in content) == (2, 7e-6, False)
    assert typed("plan", "big.yaml")[0] == 0
    # One GPU does not hold the states of 8 billion parameters.
    small = ("--out", "small.yaml", "cluster.gpu_type=H100-80GB", "cluster.ranks_per_node=1")
    assert typed("init", "--data", "chats.jsonl", "--model", "qwen3_8b", *small)[0] == 0
    assert yaml.safe_load(Path("small.yaml").read_text())["deepspeed"] == "zero3_offload"
    code, out, err = typed("init", "--data", "chats.jsonl", "--model", "someone/model-3B", "--out", "hub.yaml", *GPUS)
    assert code == 0, err
    assert "assumed: the size of the model is taken from its name: 3 billion parameters" in out
    model = yaml.safe_load(Path("hub.yaml").read_text())["model"]
    assert model == {"name": "model-3B", "path": "someone/model-3B", "activation_checkpointing": True}


def test_without_data_it_writes_the_demonstration(typed: Typed) -> None:
    code, out, err = typed("init", "--model", "tiny", "tracking=none")
    assert (code, out.splitlines()[0]) == (0, "wrote run.yaml"), err
    content = yaml.safe_load(Path("run.yaml").read_text())
    assert (content["data"], content["train"]) == ("stdlib_docs", {"max_steps": 16})


def test_nothing_is_overwritten(typed: Typed) -> None:
    Path("chats.yaml").write_text("mine")
    code, out, err = typed("init", "--data", "chats.jsonl", "--model", "tiny")
    assert (code, out) == (2, "")
    assert "the file exists, and init overwrites nothing" in err
    assert "such as --out chats-2.yaml" in err
    assert Path("chats.yaml").read_text() == "mine"
    assert "does not exist" in typed("init", "--out", "folder/my.yaml")[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "chat.jsonl"), "the data file does not exist"),
        (("--data", "chats.jsonl", "--model", "tinny"), "did you mean tiny?"),
        (("--data", "chats.jsonl", "--model", "./weights"), "there is no such folder"),
        (("--dat", "chats.jsonl"), "did you mean --data?"),
        (("--model", "tiny", "-m", "optim.lr=1,2"), "init writes the settings of one run"),
        (("--data", "bad.jsonl", "--model", "tiny"), "bad.jsonl:2"),
    ],
)
def test_what_a_run_would_refuse_is_refused_and_nothing_is_written(words: tuple[str, ...], message: str, typed: Typed) -> None:
    Path("bad.jsonl").write_text('{"text": "a row"}\n{"text": \n')
    before = {path.name for path in Path().iterdir()}
    code, out, err = typed("init", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert {path.name for path in Path().iterdir()} - {"hub"} == before
