"""A run's settings in one YAML file: precedence, refused content, locations in error messages, and what a resume may change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.config.compose import Composed
from launcher.config.resume import CHANGEABLE, FIXED, differences, require_same, with_overrides
from launcher.config.schema import RunConfig, settings
from launcher.errors import ConfigError, Problem

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
    assert main([file.replace("my", "mine")]) == 2, "without a verb it is a file to train from"
    assert "there is no such file" in capsys.readouterr().err
    Path("rows.jsonl").write_text('{"text": "one row"}\n')
    assert main(["plan", file]) == 0
    out = capsys.readouterr().out
    assert f"file       {file}" in out


@pytest.fixture
def config(compose: Callable[..., list[Composed]]) -> RunConfig:
    return compose("model=tiny", "tracking=none")[0].config


def problems(config: RunConfig, *overrides: str) -> list[Problem]:
    with pytest.raises(ConfigError) as error:
        with_overrides(config, overrides)
    assert all(problem.where == "command line" and problem.remedy for problem in error.value.problems)
    return list(error.value.problems)


def test_nothing_changes_without_overrides(config: RunConfig) -> None:
    assert with_overrides(config, []) == config


def test_a_changed_length_unsets_the_other_length(config: RunConfig) -> None:
    assert (config.train.max_steps, config.train.epochs) == (16, None)
    assert with_overrides(config, ["train.max_steps=20"]).train.max_steps == 20
    longer = with_overrides(config, ["train.epochs=2"]).train
    assert (longer.max_steps, longer.epochs) == (None, 2.0)


def test_values_keep_their_types(config: RunConfig) -> None:
    changed = with_overrides(
        config, ["optim.lr=1e-3", "tracking.tags=[a, b]", "export.enabled=false", "cluster.ranks_per_node=4"]
    )
    assert (changed.optim.lr, changed.tracking.tags, changed.export.enabled) == (1e-3, ("a", "b"), False)
    assert changed.cluster.ranks_per_node == 4


def test_all_mistakes_in_one_pass(config: RunConfig) -> None:
    mistakes = problems(config, "train.max_stepz=3", "optim.lr=-1", "cluster.nodes=[", "word", "checkpoint.keep_last=0")
    assert [p.message.split(":")[0] for p in mistakes] == [
        "train.max_stepz",
        "cluster.nodes",
        "word",
        "optim.lr",
        "checkpoint.keep_last",
    ]
    assert mistakes[0].remedy == "did you mean train.max_steps?"
    assert mistakes[3].value == "-1"


def test_a_whole_group_is_refused_with_the_reason(config: RunConfig) -> None:
    model, data, experiment = problems(config, "model=qwen3_8b", "+data=jsonl", "experiment=other")
    assert model.message.startswith("model=qwen3_8b: ")
    assert "python -m launcher model.path=run:NAME" in model.remedy
    assert data.message.startswith("data=jsonl: ")
    assert experiment.message.startswith("experiment=other: ")


def refusal(saved: RunConfig, *overrides: str, force: bool = False) -> list[Problem]:
    with pytest.raises(ConfigError) as error:
        require_same(differences(saved, with_overrides(saved, overrides)), force, Path("first"), "checkpoints/step-00000003")
    assert all(problem.where == "checkpoints/step-00000003" and problem.remedy for problem in error.value.problems)
    return list(error.value.problems)


def test_refused_differences_are_shown_key_by_key(config: RunConfig) -> None:
    (problem,) = refusal(config, "data.max_length=64", "run.seed=7", "optim.lr=1e-3", "train.max_steps=99", "data.packing=true")
    assert problem.message.splitlines() == [
        "these settings differ from those that the checkpoint was saved with:",
        "                   checkpoint  requested",
        "  run.seed         42          7",
        "  data.max_length  256         64",
    ]
    assert "--force" in problem.remedy
    assert "another run" in problem.remedy


def test_lists_are_compared_entry_by_entry(config: RunConfig) -> None:
    (problem,) = refusal(config, "data.sources=[{name: stdlib_docs, path: builtin:stdlib_docs}, {name: more, path: more.jsonl}]")
    lines = [line.split() for line in problem.message.splitlines()[2:]]
    assert lines[:3] == [
        ["data.sources[1].name", "-", "'more'"],
        ["data.sources[1].path", "-", "'more.jsonl'"],
        ["data.sources[1].format", "-", "'auto'"],
    ]
    assert all(key.startswith("data.sources[1].") for key, *_ in lines)


def test_force_accepts_all_differences_but_fixed_settings(config: RunConfig) -> None:
    changed = with_overrides(config, ["data.max_length=64", "run.seed=7"])
    require_same(differences(config, changed), True, Path("first"), "")
    for override in (
        "model.path=./other",
        "run.name=b",
        "run.root=elsewhere",
        "model.config={hidden_size: 8}",
        "cluster.kind=ray",
    ):
        (problem,) = refusal(config, override, "run.seed=7", force=True)
        assert "not even with --force" in problem.message
        assert override.split("=")[0] in problem.message
        assert "run.seed" not in problem.message
        assert "model.path=run:first" in problem.remedy
    assert len(refusal(config, "run.name=b", "run.seed=7")) == 2


def test_the_same_value_is_no_difference(config: RunConfig) -> None:
    overrides = [
        f"run.seed={config.run.seed}",
        "model.dtype=auto",
        "data.packing=true",
        f"train.grad_clip={config.train.grad_clip}",
    ]
    assert differences(config, with_overrides(config, [*overrides, "train.max_steps=3", "cluster.ranks_per_node=4"])) == []


def test_data_path_changes_its_source(compose: Callable[..., list[Composed]]) -> None:
    config = compose("model=tiny", "data=jsonl", "data.path=a.jsonl")[0].config
    changed = with_overrides(config, ["data.path=b.jsonl"])
    assert [source.path for source in changed.data.sources] == ["b.jsonl"]
    assert [d.key for d in differences(config, changed)] == ["data.path", "data.sources[0].path"]


def test_settings_with_an_effect_are_not_free_to_change(config: RunConfig) -> None:
    """A setting in neither table must not change freely."""
    free_keys = {key for key in settings() if key.startswith(CHANGEABLE)}
    for key in ("data.max_length", "run.seed", "model.dtype", "optim.weight_decay", "train.global_batch_size", "train.grad_clip"):
        assert key not in free_keys


@pytest.mark.parametrize("keys", [CHANGEABLE, tuple(key for key in FIXED if not key.startswith("plan."))])
def test_every_key_in_the_tables_is_a_setting(keys: tuple[str, ...]) -> None:
    for key in keys:
        assert any(known == key or (key.endswith(".") and known.startswith(key)) for known in settings()), key
