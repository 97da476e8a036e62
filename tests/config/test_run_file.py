"""A run's settings in one YAML file: precedence, refused content, and the locations in error messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.config.compose import Composed
from launcher.errors import Problem

Compose = Callable[..., list[Composed]]
Refused = Callable[..., list[Problem]]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write the run's settings file into the working directory; return its name."""
    monkeypatch.chdir(tmp_path)

    def written(text: str, name: str = "my.yaml") -> str:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
        return name

    return written


def test_a_string_selects_an_option_and_a_mapping_sets_keys(write: Callable[[str], str], compose: Compose) -> None:
    file = write(
        "model: {base: qwen3_8b, dtype: fp32, activation_checkpointing: false}\n"
        "cluster: slurm\ntracking: none\ndeepspeed: zero3_offload\n"
        "data: {path: rows.jsonl, max_length: 512}\noptim: {lr: 2e-6, betas: [0.8, 0.9]}\ntrain: {max_steps: 7}\n"
    )
    config = compose(file)[0].config
    assert (config.model.name, config.model.dtype, config.model.activation_checkpointing) == ("qwen3_8b", "fp32", "none")
    assert (config.cluster.kind, config.tracking.kind, config.deepspeed.offload_params) == ("slurm", "none", "cpu")
    assert (config.data.name, config.data.sources[0].path, config.data.max_length) == ("jsonl", "rows.jsonl", 512)
    assert (config.optim.lr, config.optim.betas, config.optim.warmup_steps) == (2e-6, (0.8, 0.9), 10)
    # The epochs in conf/config.yaml would set the length a second time.
    assert (config.train.max_steps, config.train.epochs) == (7, None)


def test_a_base_of_null_leaves_the_defaults_of_the_schema(write: Callable[[str], str], compose: Compose) -> None:
    file = write("optim: {base: null, lr: 0.5}\nmodel: {base: null, name: own, path: owner/model}\ndata: {path: a.jsonl}\n")
    config = compose(file)[0].config
    assert (config.optim.warmup_steps, config.model.dtype, config.model.config) == (0, "bf16", None)


@pytest.mark.parametrize("text", ["model: {path: ./weights/own-7b}\n", "model:\n  path: owner/own-7b\n"])
def test_a_model_that_is_given_by_its_path_alone_has_its_name(text: str, write: Callable[[str], str], compose: Compose) -> None:
    assert compose(write(text))[0].config.model.name == "own-7b"


def test_the_command_line_wins_over_the_file_and_the_file_over_an_experiment(
    write: Callable[[str], str], compose: Compose
) -> None:
    file = write(
        "experiment: llama3_8b_one_node\noptim: {lr: 2e-6, eps: 1e-7}\ntrain: {epochs: 3}\ndata: {path: a.jsonl}\n"
        "model: {base: tiny, name: own}\n"
    )
    (composed,) = compose(file, "optim.lr=3e-6", "train.max_steps=4")
    config, experiment = composed.config, compose("experiment=llama3_8b_one_node", "data.path=a.jsonl")[0].config
    assert (config.optim.lr, config.optim.eps, config.optim.warmup_steps) == (3e-6, 1e-7, experiment.optim.warmup_steps)
    assert (config.train.max_steps, config.train.epochs) == (4, None)
    assert config.train.global_batch_size == experiment.train.global_batch_size
    # The file's model replaces the experiment's.
    assert (config.model.name, config.model.init, config.data.max_length) == ("own", "random", experiment.data.max_length)
    assert composed.overrides == (file, "optim.lr=3e-6", "train.max_steps=4")
    assert compose("optim.lr=3e-6", file, "+experiment=llama3_70b_four_nodes")[0].config.cluster.kind == "slurm"


@pytest.mark.rest
def test_an_option_on_the_command_line_replaces_the_whole_section(write: Callable[[str], str], compose: Compose) -> None:
    file = write("model: {path: ./own, dtype: fp32}\ndata: {path: a.jsonl}\n")
    config = compose(file, "model=qwen3_8b", "+cluster=slurm")[0].config
    assert (config.model.path, config.model.dtype, config.cluster.kind) == ("Qwen/Qwen3-8B", "bf16", "slurm")
    jobs = compose(file, "-m", "model=tiny,qwen3_0_6b", "optim.lr=0.5,0.25")
    assert [(job.config.model.name, job.config.optim.lr, job.config.data.path) for job in jobs] == [
        *(("tiny", lr, "a.jsonl") for lr in (0.5, 0.25)),
        *(("qwen3_0_6b", lr, "a.jsonl") for lr in (0.5, 0.25)),
    ]
    assert compose(file)[0].origins.dropped_note() is None
    note = compose(file, "model=qwen3_8b", "data.max_length=64")[0].origins.dropped_note()
    assert note == "model=qwen3_8b on the command line instead of the section in my.yaml: not used: model.path, model.dtype"
    # The file does not affect the next command.
    assert compose()[0].config.data.name == "stdlib_docs"


def test_references_aliases_and_open_values_are_those_of_every_file(
    write: Callable[[str], str], compose: Compose, refused: Refused
) -> None:
    file = write("run: {name: 'lr-${optim.lr}'}\noptim: {lr: '???', eps: &small 1e-7}\ndata: {path: a.jsonl}\n")
    assert compose(file, "optim.lr=0.5")[0].config.run.name == "lr-0.5"
    (problem,) = refused(file)
    assert (problem.message, problem.where) == ("optim.lr: a value is required and none was given", "my.yaml:2")


@pytest.mark.parametrize("text", [f"a: {'[' * 3000}", f"run: {{seed: {'9' * 5000}}}\n", "run: {name: '${x'}\n", "- optim\n"])
def test_a_file_that_cannot_be_read_is_named(text: str, write: Callable[[str], str], refused: Refused) -> None:
    (problem,) = refused(write(text))
    assert problem.where.startswith("my.yaml")


def test_all_mistakes_are_reported_with_file_and_line(write: Callable[[str], str], refused: Refused) -> None:
    file = write(
        "model: qwen3_9b\nlearning_rate: 1e-5\noptim:\n  lr: fast\n  epz: 1\ntrain: 5\noptim.eps: 3\ndefaults: [x]\n"
        "hydra: {run: {dir: x}}\nexperiment: [x]\nexport: {push_to_hub: hf_abcdefghijklmnopqrstuvwxyzabcd12}\n"
        "cluster: {base: slurmy}\ntracking: 5\n"
    )
    problems = {problem.message.partition(":")[0]: problem for problem in refused(file, "run.seed=x")}
    where = {key: problem.where for key, problem in problems.items()}
    assert where == {
        "model=qwen3_9b": "my.yaml:1",
        "learning_rate": "my.yaml:2",
        "optim.lr": "my.yaml:4",
        "optim.epz": "my.yaml:5",
        "train": "my.yaml:6",
        "optim.eps": "my.yaml:7",
        "defaults": "my.yaml:8",
        "hydra": "my.yaml:9",
        "experiment=['x']": "my.yaml:10",
        "export.push_to_hub": "my.yaml:11",
        "cluster=slurmy": "my.yaml:12",
        "tracking=5": "my.yaml:13",
        "run.seed": "command line",
    }
    remedies = {key: problem.remedy for key, problem in problems.items()}
    assert remedies["model=qwen3_9b"].startswith("did you mean qwen3_8b?")
    assert remedies["cluster=slurmy"].startswith("did you mean slurm?")
    assert remedies["learning_rate"] == "did you mean optim.lr?"
    assert remedies["optim.epz"] == "did you mean optim.eps?"
    assert remedies["optim.eps"] == "write `optim:`, and indented below it `eps: 3`"
    assert "hf_" not in "".join(map(str, problems.values()))


def test_a_path_alone_names_rows_of_ones_own(compose: Compose, tmp_path: Path) -> None:
    (composed,) = compose("model=tiny", "data.path=rows.jsonl")
    assert (composed.config.data.name, composed.config.data.sources[0].path) == ("jsonl", "rows.jsonl")
    assert composed.overrides == ("model=tiny", "data.path=rows.jsonl", "data=jsonl")
    for words in (("data.path=null",), ("data.path=typed.jsonl", "data.path=null"), ()):
        (composed,) = compose("model=tiny", *words, "data.sources=[{name: train, path: rows.jsonl}]")
        assert (composed.config.data.name, composed.config.data.sources[0].path) == ("jsonl", "rows.jsonl")
    (composed,) = compose("model=tiny", "data.path=null")
    assert composed.config.data.name == "stdlib_docs"
    # A settings file with its own data section takes precedence.
    file = tmp_path / "own.yaml"
    file.write_text("data: {base: jsonl, path: a.jsonl, max_length: 99}\n")
    (composed,) = compose(str(file), "data.path=rows.jsonl")
    assert (composed.config.data.max_length, composed.config.data.sources[0].path) == (99, "rows.jsonl")
    file.write_text("data: {max_length: 99}\n")
    (composed,) = compose(str(file), "data.path=rows.jsonl")
    assert (composed.config.data.name, composed.config.data.max_length) == ("jsonl", 99)


def test_relative_paths_begin_at_the_working_directory(
    write: Callable[[str], str],
    shown: Callable[..., str],
    session_cache: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    file = write("model: tiny\ndata: {path: rows.jsonl}\ntracking: none\n", "runs.d/my.yaml")
    Path("runs.d/rows.jsonl").write_text('{"text": "one row"}\n')
    text = shown(file)
    assert f"data.path ({file}:2)" in text
    assert "write runs.d/rows.jsonl: relative paths begin at the working directory" in text
    assert main([file.replace("my", "mine")]) == 2, "without a verb it is a file to train from"
    assert "there is no such file" in capsys.readouterr().err
    Path("rows.jsonl").write_text('{"text": "one row"}\n')
    assert main(["plan", file]) == 0
    out = capsys.readouterr().out
    assert f"file       {file}; data.sources[0].path is {tmp_path}/rows.jsonl" in out


def test_hydras_flags_combine_with_a_file(write: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    file = write("optim: {lr: 0.5}\n")
    # A file named like a flag's value is not taken as the settings file.
    write("x: 1\n", "job")
    assert main(["plan", "--cfg", "job", file, "--package", "optim"]) == 0
    assert "lr: 0.5" in capsys.readouterr().out
