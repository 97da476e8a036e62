"""A run's settings in one YAML file: precedence, refused content, and the locations in error messages."""

from __future__ import annotations

import os
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
    assert note == "model=qwen3_8b on the command line replaces the section of my.yaml: model.path, model.dtype are not used"
    # The file does not affect the next command.
    assert compose()[0].config.data.name == "stdlib_docs"


def test_references_aliases_and_open_values_are_those_of_every_file(
    write: Callable[[str], str], compose: Compose, refused: Refused
) -> None:
    file = write("run: {name: 'lr-${optim.lr}'}\noptim: {lr: '???', eps: &small 1e-7}\ndata: {path: a.jsonl}\n")
    assert compose(file, "optim.lr=0.5")[0].config.run.name == "lr-0.5"
    (problem,) = refused(file)
    assert (problem.message, problem.where) == ("optim.lr: a value is required and none was given", "my.yaml:2")


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
        "experiment": "my.yaml:10",
        "export.push_to_hub": "my.yaml:11",
        "cluster=slurmy": "my.yaml:12",
        "tracking": "my.yaml:13",
        "run.seed": "command line",
    }
    remedies = {key: problem.remedy for key, problem in problems.items()}
    assert remedies["model=qwen3_9b"].startswith("did you mean qwen3_8b?")
    assert remedies["cluster=slurmy"].startswith("did you mean slurm?")
    assert remedies["learning_rate"] == "did you mean optim.lr?"
    assert remedies["optim.epz"] == "did you mean optim.eps?"
    assert remedies["optim.eps"] == "write `optim:`, and indented below it `eps: 3`"
    assert "hf_" not in "".join(map(str, problems.values()))


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", "optim.lr: the file sets this key twice, in lines 2 and 3", "my.yaml:3"),
        ("optim:\n\tlr: 1\n", "the indentation contains a tab, which YAML does not allow", "my.yaml:2"),
        ("optim: [1\n", "the file is not valid YAML: while parsing a flow", "my.yaml:2:1"),
        ("# nothing\n", "the file sets nothing", "my.yaml"),
        ("- optim\n", "the file is not a mapping of sections to settings", "my.yaml"),
        ("run: {name: '${x'}\n", "a reference in this value is not written as Hydra reads it", "my.yaml:1"),
        ("model: ???\n", "model: a value is required and none was given", "my.yaml:1"),
        ("optim: {betas: {a: 1}}\n", "optim.betas: must be a list", "my.yaml:1"),
        (f"a: {'[' * 3000}", "the file is not", "my.yaml"),
        (f"run: {{seed: {'9' * 5000}}}\n", "the file is not read: ", "my.yaml"),
        ("run: {null: 1}\n", "run.null: a key is a name, and this one is read as null", "my.yaml:1"),
        ("1: 2\n", "1: a key is a name, and this one is read as a number", "my.yaml:1"),
        ("model:\n  base: tiny\n  1: 2\n", "model.1: a key is a name, and this one is read as a number", "my.yaml:3"),
        ("run: !!python/object/apply:os.getcwd []\n", "the file is not valid YAML: ", "my.yaml:1:6"),
        ("run: {seed: 1}\n---\nrun: {seed: 2}\n", "the file is not valid YAML: ", "my.yaml:2:1"),
        ("optim: {lr: 2025-13-45}\n", "optim.lr: must be a number", "my.yaml:1"),
        (
            "a: &a [1,1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
            "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d,*d,*d]\nf: [*e,*e,*e]\n",
            "the file is not read: it has more than 200,000 values, with its aliases expanded",
            "my.yaml",
        ),
    ],
)
def test_a_file_that_cannot_be_read_says_why(
    text: str, message: str, where: str, write: Callable[[str], str], refused: Refused
) -> None:
    (problem,) = refused(write(text))
    assert problem.message.startswith(message)
    assert problem.where == where


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        (
            "data: {base: jsonl}\n",
            "data.path: a value is required",
            "write `path: ...` below `data:` in my.yaml, or add data.path=",
        ),
        ("cluster: {partition: x}\n", "cluster.partition: this setting", "write `base: slurm` below `cluster:`, or remove"),
        ("run: {name: 5}\n", "run.name: must be text", 'quote it: `name: "5"`'),
        # Only the missing option is reported.
        ("model: {base: qwen3_9b, dtype: fp32}\n", "model=qwen3_9b: there is no such option", "did you mean qwen3_8b?"),
        ("data: {base: jsonll, path: a.jsonl}\n", "data=jsonll: there is no such option", "did you mean jsonl?"),
        ("optim: {base: adam}\n", "optim=adam: there is no such option", "did you mean adamw?"),
    ],
)
def test_remedies_are_worded_for_the_file(
    text: str, message: str, remedy: str, write: Callable[[str], str], refused: Refused
) -> None:
    (problem,) = refused(write(text))
    assert problem.message.startswith(message)
    assert problem.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("section", "value", "in_file", "override"),
    [
        ("model", "Qwen/Qwen3-8B", "`model: {path: Qwen/Qwen3-8B}`", "model.path=Qwen/Qwen3-8B"),
        ("model", "./mymodel", "`model: {path: ./mymodel}`", "model.path=./mymodel"),
        ("model", "run:first", "`model: {path: 'run:first'}`", "model.path=run:first"),
        ("model", "weights", "`model: {path: weights}`", "model.path=weights"),
        ("data", "rows.jsonl", "`data: {path: rows.jsonl}`", "data=jsonl data.path=rows.jsonl"),
        ("data", "owner/rows", "`data: {path: owner/rows}`", "data=jsonl data.path=owner/rows"),
    ],
)
def test_a_path_where_a_name_is_expected_is_shown_as_a_path(
    section: str, value: str, in_file: str, override: str, write: Callable[[str], str], refused: Refused
) -> None:
    file = write(f"{section}: {value}\n")
    os.mkdir("weights")
    (problem,) = refused(file)
    assert (problem.message, problem.where) == (f"{section}={value}: there is no such option", "my.yaml:1")
    assert problem.remedy == f"write {in_file}; a name alone selects an option"
    (problem,) = refused(f"{section}={value}")
    assert (problem.where, problem.remedy) == ("command line", f"write {override}; a name alone selects an option")


def test_a_missing_file_names_the_closest_one(write: Callable[[str], str], shown: Callable[..., str]) -> None:
    write("optim: {lr: 0.5}\n", "mine.yaml")
    assert "there is no such file" in shown("mien.yaml")
    assert "did you mean mine.yaml?" in shown("mien.yaml")
    assert "did you mean" not in shown("nope.yaml")
    assert "a run has one file" in shown("mine.yaml", "mine.yaml")
    assert "there is no such file" in shown("no/folder.yaml")
    os.mkdir("folder.yaml")
    # Nothing writes to the pipe: a command that opened it would wait forever.
    os.mkfifo("pipe.yaml")
    os.mkfifo("pipe")
    for name in ("folder.yaml", "pipe.yaml", "pipe"):
        assert "a run's file is a regular file, and this is not one" in shown(name)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv.gz", "rows.json", "missing.jsonl"])
@pytest.mark.parametrize("verb", [("data",), ("train",), ()])
def test_a_file_of_rows_is_answered_with_how_to_name_it(
    write: Callable[[str], str], capsys: pytest.CaptureFixture[str], name: str, verb: tuple[str, ...]
) -> None:
    if not name.startswith("missing"):
        write('{"text": "a"}\n{"text": "b"}\n', name)
    assert main((*verb, name)) == 2
    text = capsys.readouterr().err
    assert text.startswith("this is a file of rows, not one of settings")
    assert f"python -m launcher init --data {name}; or name them as a setting: data.path={name}" in text


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


def test_a_verb_after_the_file_is_put_in_order(write: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    file = write("model: tiny\n")
    assert main([file, "plan", "optim.lr=1"]) == 2
    assert "write: python -m launcher plan my.yaml optim.lr=1" in capsys.readouterr().err


def test_hydras_flags_combine_with_a_file(write: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    file = write("optim: {lr: 0.5}\n")
    # A file named like a flag's value is not taken as the settings file.
    write("x: 1\n", "job")
    assert main(["plan", "--cfg", "job", file, "--package", "optim"]) == 0
    assert "lr: 0.5" in capsys.readouterr().out
