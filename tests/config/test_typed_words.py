"""Arguments that are not overrides, and values that need quotes: the message shows what to type."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.config.compose import Composed
from launcher.errors import Problem

Refused = Callable[..., list[Problem]]
Shown = Callable[..., str]


@pytest.mark.parametrize(
    "value",
    [
        "~/rows.jsonl",
        "my data (1)/rows.jsonl",
        "lr=1.jsonl",
        "./~x",
        "rows é.jsonl",
        "it's.jsonl",
        'a "b" c',
        "x)(",
        "a;b&c",
        "x#y",
    ],
)
def test_the_message_shows_how_to_quote_a_value(refused: Refused, compose: Callable[..., list[Composed]], value: str) -> None:
    (problem,) = refused("data=jsonl", f"data.path={value}")
    assert problem.message == "data.path: the value has characters that Hydra reads as its own syntax"
    assert (problem.where, problem.value) == ("command line", f"data.path={value}")
    assert problem.remedy.startswith("quote it twice, for the shell and for Hydra: ")
    (word,) = shlex.split(problem.remedy.partition("Hydra: ")[2])
    assert compose("data=jsonl", word)[0].config.data.path == value


def test_commas_in_a_value_are_a_sweep_or_one_quoted_value(refused: Refused, compose: Callable[..., list[Composed]]) -> None:
    (problem,) = refused("data=jsonl", "data.path=a,b.jsonl")
    assert problem.message == "data.path: the commas make this a list of values to try, and the flag -m is missing"
    assert problem.remedy.startswith("add -m for one run per value; for one value with commas, write ")
    (word,) = shlex.split(problem.remedy.partition("write ")[2])
    assert compose("data=jsonl", word)[0].config.data.path == "a,b.jsonl"


@pytest.mark.parametrize(
    ("token", "remedy"),
    [
        ("optim.betas=0.9,0.95", "add -m for one run per value; for one value with commas, write 'optim.betas=[0.9,0.95]'"),
        ("optim.betas=(0.9, 0.95)", "write 'optim.betas=[0.9, 0.95]'"),
        # Quotes do not help if the value must not be text.
        ("model.dtype=fp16,bf16", "add -m for one run per value"),
        ("train.max_steps=1,000", "add -m for one run per value"),
        ("optim.lr=10^-5", "write optim.lr=VALUE with a value of the type: float > 0"),
        ("model==tiny", "write group=option"),
        ("model=tiny optim.lr=1e-5", "write each as a separate word: model=tiny optim.lr=1e-5"),
    ],
)
def test_the_remedy_suits_the_kind_of_value(refused: Refused, token: str, remedy: str) -> None:
    (problem,) = refused(token)
    assert problem.remedy == remedy


@pytest.mark.parametrize(
    ("token", "remedy"),
    [
        ("model=Qwen3-8B", "did you mean qwen3_8b? "),
        ("model=Tiny", "did you mean tiny? "),
        ("model=mistral", "did you mean mistral_7b_v0_3 or mistral_nemo_12b or mistral_small_24b? "),
        ("experiment=llama3_8b", "did you mean llama3_8b_one_gpu_offload or llama3_8b_one_node? "),
        ("optim=adamw_torch", "did you mean adamw? "),
        ("cluster=kubernetes", "did you mean static? "),
        ("+cluster=sbatch", "did you mean slurm? "),
        ("tracking=false", "did you mean none? "),
        ("deepspeed=ds_config.json", "remove it: the plan makes DeepSpeed's configuration"),
    ],
)
def test_an_option_under_another_name_gets_a_suggestion(refused: Refused, token: str, remedy: str) -> None:
    (problem,) = refused(token)
    assert problem.message.endswith(": there is no such option")
    assert problem.remedy.startswith(remedy)


def test_commas_between_options_are_a_sweep(refused: Refused) -> None:
    (problem,) = refused("model=tiny,demo")
    assert problem.remedy == "add -m for one run per value"


def test_a_list_that_cannot_be_parsed_shows_an_example(refused: Refused, compose: Callable[..., list[Composed]]) -> None:
    (problem,) = refused("data=jsonl", "data.path=x", "data.sources=[{name: a, path: ~/x}]")
    assert problem.message == "data.sources: Hydra cannot parse this list or mapping"
    (word,) = shlex.split(problem.remedy.partition("as in ")[2])
    assert compose("data=jsonl", word)[0].config.data.sources[0].path == "~/rows (1).jsonl"


def test_mistakes_in_other_settings_are_reported_beside_one_that_cannot_be_parsed(refused: Refused) -> None:
    problems = refused("data=jsonl", "data.path=~/x", "--jsn", "optim.lr=0", "run.name=a b", "run.seed=x")
    assert [p.message.partition(":")[0] for p in problems] == [
        *("there is no flag --jsn", "data.path", "run.name", "run.seed", "optim.lr")
    ]


@pytest.mark.parametrize(
    ("tokens", "message", "remedy"),
    [
        (["plan", "--jsn"], "there is no flag --jsn", "did you mean --json?"),
        (["plan", "--multi"], "there is no flag --multi", "did you mean --multirun?"),
        (["data", "--htm"], "there is no flag --htm", "did you mean --html?"),
        (["train", "--detatch"], "there is no flag --detatch", "did you mean --detach?"),
        (["plan", "--zzz"], "there is no flag --zzz", "settings are written key=value"),
        (["--model", "tiny"], "--model: settings are written without dashes", "write model=tiny"),
        (["plan", "--model=tiny"], "--model: settings are written without dashes", "write model=tiny"),
        (["plan", "--optim.lr", "1e-5"], "--optim.lr: settings are written without dashes", "write optim.lr=1e-5"),
        (["plan", "--max-steps=3"], "--max-steps: settings are written without dashes", "write train.max_steps=3"),
        (["-c", "s.yaml"], "-c: a file of settings is named without a flag", "write: python -m launcher train s.yaml"),
        (["plan", "--config", "s.yaml"], "--config: a file of settings is named without a flag", "the same for plan and data"),
        (["--verison"], "there is no flag --verison", "did you mean --version?"),
        (["status", "--hlep"], "there is no such flag", "did you mean --help?"),
        (["resume"], "RUN is missing", "python -m launcher resume"),
        (["why"], "RUN and STEP are missing", "python -m launcher why"),
        (["plan", "--cfg"], "--cfg prints one of job, hydra, all", "write --cfg job"),
        (["plan", "--cfg", "hydr"], "--cfg prints one of job, hydra, all", "write --cfg hydra"),
        (["plan", "--config-dir"], "--config-dir needs a value", "write --config-dir followed by its value"),
        (["plan", "optim.lr", "=", "3"], "an override needs a key before its =", "write optim.lr=3"),
        (["plan", "optim.lr", "=3"], "an override needs a key before its =", "write optim.lr=3"),
        (["plan", "optim.lr = 3"], "an override needs a key before its =", "write optim.lr=3"),
        (["plan", "=3"], "an override needs a key before its =, and no spaces around it", "write key=value"),
        (["plan", "train.max_steps"], "train.max_steps: is not an override, because it has no =", "write train.max_steps=..."),
        (["plan", "max_stepz"], "max_stepz: is not an override, because it has no =", "did you mean train.max_steps?"),
        (["plan", "--batch-size", "4"], "--batch-size: settings are written without", "write train.global_batch_size=4"),
        (["train", "model=tiny", "--dry-run"], "there is no flag --dry-run here", "python -m launcher plan with the same words"),
        (["plan", "qqqqq"], "qqqqq: is not an override, because it has no =", "write key=value"),
        (["plan", "model=tiny", "train.max_steps:5"], "train.max_steps:5: is not an override", "write train.max_steps=5"),
        (["plan", "run.name=${optim.lr"], "run.name: a reference in this value is not closed", "close each ${ with a }"),
        (["plan", "-m", "run.name=a,~b"], "run.name: a value has characters", "quote the values of the sweep one by one"),
        (["plan", "-1"], "there is no flag -1", "settings are written key=value; --help lists the flags"),
        (["plan", "run.root=my", "runs"], "runs: is not an override", "value before it: 'run.root=\"my runs\"'"),
    ],
)
def test_a_word_that_is_no_override_is_answered_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], tokens: list[str], message: str, remedy: str
) -> None:
    assert main(tokens) == 2
    text = capsys.readouterr().err
    assert text.startswith(message)
    assert remedy in text
    assert "usage:" not in text or tokens[0] in ("status", "resume", "why")


@pytest.mark.parametrize("tokens", [["plan", "mine"], ["mine"], ["train", "model=tiny", "runs/mine"]])
def test_a_run_in_place_of_settings_is_answered_with_what_can_be_done_with_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: list[str]
) -> None:
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/plan.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert main(tokens) == 2
    text = capsys.readouterr().err
    assert text.startswith("this is a run, not a file of settings\n")
    for verb in ("status", "resume", "config"):
        assert f"python -m launcher {verb} {tokens[-1]}" in text


def test_a_secret_in_a_value_that_cannot_be_parsed_is_not_shown(shown: Shown) -> None:
    for token in (
        "tracking.password=hunter2(",
        "cluster.env.MY_TOKEN=hunter2(",
        "--password=hunter2",
        "tracking.password =hunter2",
    ):
        assert "hunter2" not in shown(token)
