"""Every kind of mistake in settings is refused with its key, its origin and its value, all in one pass.

tests/golden/messages.txt has the wording.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.config.compose import Composed
from launcher.config.origin import Origins
from launcher.errors import Problem

Refused = Callable[..., list[Problem]]
Compose = Callable[..., list[Composed]]
Shown = Callable[..., str]


@pytest.mark.parametrize(
    ("override", "key", "value", "remedy"),
    [
        ("train.max_stepz=3", "train.max_stepz", "3", "train.max_steps?"),
        ("lr=1", "lr", "1", "optim.lr?"),
        ("batch_size=4", "batch_size", "4", "train.global_batch_size?"),
        ("eval.max_rows=8", "eval.max_rows", "8", "data.eval_max_rows?"),
        ("lora_r=8", "lora_r", "8", "PEFT"),
        ("+clster=local", "clster", "'local'", "cluster?"),
        ("optim.qqq=1", "optim.qqq", "1", "optim.lr, "),
        ("cluster.partition=main", "cluster.partition", "'main'", "+cluster=slurm"),
        ("cluster.kind=slrum", "cluster.kind", "'slrum'", "local, slurm"),
        ("run.seed=abc", "run.seed", "'abc'", "int >= 0"),
        ("model.dtype=bf61", "model.dtype", "'bf61'", "did you mean bf16?"),
        ("run.name=123", "run.name", "123", 'run.name="123"\''),
        ("run.name='a b'", "run.name", "'a b'", "letters"),
        ("optim.lr=0", "optim.lr", "0", "float > 0"),
        ("optim.lr=nan", "optim.lr", "nan", "float > 0"),
        ("optim.betas=[0.9,1.5]", "optim.betas[1]", "1.5", "optim.betas"),
        ("data.sources=[]", "data.sources", "", "data.sources"),
        ("data.sources=[{name: a}]", "data.sources[0].path", "", "path is missing"),
        ("data.sources=[{path: a, weight: -1}]", "data.sources[0].weight", "-1", "data.sources[].weight"),
        ("data.eval_path='s3://me:word@b/a'", "data.eval_path", "'s3://<redacted>@b/a'", "environment"),
        ("run=3", "run", "3", "run"),
        ("model.path=foo", "model.path", "'foo'", "owner/name"),
        ("run.name=${nope}", "run.name", "", "between ${ and }"),
        ("data.path=~/rows.jsonl", "data.path", "data.path=~/rows.jsonl", "'data.path=\"~/rows.jsonl\"'"),
        ("optim.betas=0.9,0.95", "optim.betas", "optim.betas=0.9,0.95", "'optim.betas=[0.9,0.95]'"),
        ("model=Tiny", "model=Tiny", "model=Tiny", "did you mean tiny?"),
        ("model=Qwen/Qwen3-8B", "model=Qwen/Qwen3-8B", "model=Qwen/Qwen3-8B", "model.path=Qwen/Qwen3-8B"),
        ("data=rows.jsonl", "data=rows.jsonl", "data=rows.jsonl", "data.path=rows.jsonl"),
        ("train.max_steps", "train.max_steps", "train.max_steps", "train.max_steps"),
    ],
)
def test_a_mistake_on_the_command_line_names_key_value_and_remedy(
    refused: Refused, override: str, key: str, value: str, remedy: str
) -> None:
    (problem,) = refused(override)
    assert problem.message.startswith(f"{key}: ")
    assert (problem.where, problem.value) == ("command line", value)
    assert remedy in problem.remedy


def test_control_characters_are_refused_and_not_shown(refused: Refused) -> None:
    (problem,) = refused('run.root="a\x1bb"')
    assert problem.message.startswith("run.root: ")
    assert "\x1b" not in problem.value


def test_all_mistakes_in_values_come_in_one_pass_and_those_that_hydra_cannot_read_in_another(refused: Refused) -> None:
    values = ("optim.lr=0", "train.max_stepz=1", "model.dtype=bf8", "run.seed=x", "data=jsonl")
    problems = refused("--jsn", *values)
    assert {p.message.split(":")[0] for p in problems} == {
        *("there is no flag --jsn", "data.path", "run.seed", "model.dtype", "optim.lr", "train.max_stepz")
    }
    problems = refused("--jsn", "run.root=~/x", "optim.eps=[", "word", *values)
    assert {p.message.split(":")[0] for p in problems} == {"there is no flag --jsn", "run.root", "optim.eps", "word"}


def test_a_required_value_that_is_missing_names_file_and_line(refused: Refused) -> None:
    (problem,) = refused("data=jsonl")
    file, line = problem.where.rsplit(":", 1)
    assert file.endswith("conf/data/jsonl.yaml")
    assert Path(file).read_text().splitlines()[int(line) - 1] == "path: ???"


@pytest.mark.parametrize(
    ("tokens", "keys"),
    [
        (("train.max_steps=5", "train.epochs=1"), ("train.max_steps", "train.epochs")),
        (("train.max_steps=null",), ("train.max_steps", "train.epochs")),
        (("export.push_to_hub=owner/name", "export.enabled=false"), ("export.push_to_hub", "export.enabled")),
        (("deepspeed.offload_params=nvme",), ("deepspeed.offload_params",)),
        (("deepspeed=zero3_nvme", "deepspeed.nvme_path=disk"), ("deepspeed.nvme_path",)),
        (("run.max_usd=3",), ("run.max_usd",)),
        (("model.trust_remote_code=true",), ("model.trust_remote_code",)),
        (("data.sources=[{path: a, weight: 0}]",), ("data.sources",)),
        (("+cluster=slurm", "cluster.signal_lead_seconds=100000"), ("cluster.signal_lead_seconds",)),
        (("checkpoint.best_set=b", "eval.sets=[{name: a, path: a.jsonl}]"), ("checkpoint.best_set",)),
        (("data=jsonl", "data.path=a", "data.sources=[{name: a, path: b}]"), ("data.path", "data.sources")),
    ],
)
def test_settings_that_contradict_each_other_are_named(refused: Refused, tokens: tuple[str, ...], keys: tuple[str, ...]) -> None:
    (problem,) = refused(*tokens)
    assert all(f"{key} (" in problem.where or problem.message.startswith(key) for key in keys)


@pytest.mark.parametrize(
    ("tokens", "steps", "epochs"),
    [
        (("train.epochs=2",), None, 2.0),
        (("data=jsonl", "data.path=a", "train.max_steps=5"), 5, None),
        (("experiment=qwen3_1_7b_one_gpu", "data=stdlib_docs"), None, 2.0),
    ],
)
def test_the_length_that_was_set_last_unsets_the_other(
    compose: Compose, tokens: tuple[str, ...], steps: int | None, epochs: float | None
) -> None:
    train = compose(*tokens)[0].config.train
    assert (train.max_steps, train.epochs) == (steps, epochs)


def test_held_out_rows_of_ones_own_replace_the_share_that_a_file_sets(compose: Compose, refused: Refused, rows: Path) -> None:
    data = compose(f"data.path={rows}", f"data.eval_path={rows}")[0].config.data
    assert (data.eval_path, data.eval_fraction) == (str(rows), 0.0)
    (problem,) = refused(f"data.path={rows}", f"data.eval_path={rows}", "data.eval_fraction=0.5")
    assert "data.eval_fraction" in problem.where


def test_sources_replace_the_path_of_a_file(compose: Compose, tmp_path: Path) -> None:
    own_option(tmp_path, "experiment", "own", "# @package _global_\ndata:\n  path: of_the_experiment.jsonl\n")
    for tokens in ((), ("--config-dir", str(tmp_path / "conf"), "experiment=own")):
        data = compose("data=jsonl", *tokens, "data.sources=[{name: a, path: rows.jsonl}]")[0].config.data
        assert (data.path, [source.path for source in data.sources]) == (None, ["rows.jsonl"])


def own_option(tmp_path: Path, group: str, option: str, text: str) -> None:
    folder = tmp_path / "conf" / group
    folder.mkdir(parents=True)
    (folder / f"{option}.yaml").write_text(text)


@pytest.mark.parametrize(
    ("text", "part", "line"),
    [
        ("train:\n  max_steps: ${nope.x}\n", "train.max_steps", "3"),
        ("optim:\n  lr: fast\n", "optim.lr", "3"),
        ("optim:\n  warm_up: 1\n", "optim.warm_up", "3"),
        ("optim:\n  lr: 1\n  lr: 2\n", "lr", "4:3"),
        ("optim:\n\tlr: 1\n", "", "3:1"),
        ("optim: [1, 2\nrun: 3\n", "", "3:4"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_line(refused: Refused, tmp_path: Path, text: str, part: str, line: str) -> None:
    own_option(tmp_path, "experiment", "mine", f"# @package _global_\n{text}")
    tokens = ("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    (problem,) = refused(*tokens)
    assert part in problem.message
    assert problem.where == f"{tmp_path}/conf/experiment/mine.yaml:{line}"


def test_what_hydra_cannot_compose_names_the_file(refused: Refused, tmp_path: Path) -> None:
    own_option(tmp_path, "experiment", "mine", "# @package _global_\ndefaults:\n  - override /model: nope\n")
    (problem,) = refused("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    assert problem.message.startswith("model=nope")
    assert problem.where.endswith("experiment/mine.yaml")


def test_an_experiment_without_its_package_is_told_so(refused: Refused, tmp_path: Path) -> None:
    own_option(tmp_path, "experiment", "mine", "train:\n  max_steps: 3\n")
    (problem,) = refused("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    assert problem.message.startswith("experiment: ")
    assert "# @package _global_" in problem.remedy


def test_a_secret_in_a_line_or_an_override_that_cannot_be_parsed_is_not_shown(refused: Refused, tmp_path: Path) -> None:
    own_option(tmp_path, "experiment", "mine", "# @package _global_\noptim: [1, 2\napi_key: hunter2\n")
    assert "hunter2" not in str(refused("--config-dir", str(tmp_path / "conf"), "experiment=mine"))
    assert "hunter2" not in str(refused("tracking.password=hunter2(", "--password=hunter2", "tracking.password =hunter2"))


def test_a_sweep_with_one_name_is_refused(shown: Shown) -> None:
    assert "run.name=one: " in shown("-m", "run.name=one", "optim.lr=1e-5,2e-5")


def test_a_sweep_with_several_names_is_accepted(session_cache: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "-m", "model=tiny", "run.name=one-${optim.lr}", "optim.lr=1e-5,2e-5"]) == 0
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert names == ["one-1e-05", "one-2e-05"]


FILES = {
    "config.yaml": "defaults:\n  - _self_\nrun:\n  seed: 1\ntrain:\n  epochs: 1\n",
    "model/big.yaml": "# big\nname: big\nconfig:\n  hidden_size: 64\n  layers: [1, 2]\n",
    "data/mine.yaml": "path: x\nsources:\n  - name: a\n    path: ${data.path}\n  - name: b\n    path: ${run.seed}/b\n",
    "data/demo.yaml": "# @package _global_\n# the demo\ndata:\n  path: x\noptim:\n  lr: 1\n",
    "optim/adamw.yaml": "lr: 2\nbetas: [0.9, 0.95]\n",
    "experiment/one.yaml": "# @package _global_\ndefaults:\n  - override /data: demo\noptim:\n  betas:\n    - 0.1\n    - 0.2\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def origins(folder: Path, *overrides: str, **choices: str | None) -> Origins:
    # In Hydra's order: the last option composed comes first.
    chosen = {"experiment": None, "data": "demo", "optim": "adamw", "model": "big", "hydra/launcher": "basic"} | choices
    return Origins(overrides=overrides, choices=chosen, folders=(folder,))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("run.seed", "config.yaml:4"),
        ("train.epochs", "config.yaml:6"),
        ("train", "config.yaml:5"),
        ("model.name", "model/big.yaml:2"),
        ("model.config.hidden_size", "model/big.yaml:4"),
        ("model.config.layers[1]", "model/big.yaml:5"),
        # A file with the package _global_ uses full keys, and data is composed after optim.
        ("data.path", "data/demo.yaml:4"),
        ("optim.lr", "data/demo.yaml:6"),
        ("optim.betas", "optim/adamw.yaml:2"),
        ("nowhere.at_all", ""),
        ("run.name", ""),
    ],
)
def test_the_origin_is_the_file_that_was_composed_last(folder: Path, key: str, expected: str) -> None:
    assert origins(folder).of(key) == (f"{folder}/{expected}" if expected else "")


def test_an_experiment_comes_before_the_groups(folder: Path) -> None:
    found = origins(folder, experiment="one")
    assert found.of("optim.betas[1]") == f"{folder}/experiment/one.yaml:7"
    assert found.of("optim.lr") == f"{folder}/data/demo.yaml:6"


def test_the_origin_of_an_interpolation_is_that_of_its_source(folder: Path) -> None:
    assert origins(folder, data="mine").resolve("data.sources[0].path") == ("data.path", f"{folder}/data/mine.yaml:1")
    assert origins(folder, "data.path=y", data="mine").resolve("data.sources[0].path") == ("data.path", "command line")
    # A value that contains more than a reference has its own location.
    assert origins(folder, data="mine").of("data.sources[1].path") == f"{folder}/data/mine.yaml:6"


@pytest.mark.parametrize("override", ["optim.lr=3", "+optim.lr=3", "++optim.lr=3"])
def test_the_command_line_comes_first(folder: Path, override: str) -> None:
    assert origins(folder, override).of("optim.lr") == "command line"


def test_overrides_of_other_keys_are_no_origin(folder: Path) -> None:
    found = origins(folder, "optim=adamw", "optim.lr_max=3", "model.config={a: 1}")
    assert found.of("optim.lr") == f"{folder}/data/demo.yaml:6"
    assert found.of("model.config.a") == "command line"


def test_paths_below_the_working_directory_are_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert origins(folder).of("run.seed") == "config.yaml:4"


def test_located_adds_the_origin_to_a_problem(folder: Path) -> None:
    problem = Problem("data.sources[0].path is missing", "data.sources[0].path", "y", "set data.sources[0].path")
    located = origins(folder, "data.path=y", data="mine").located(problem)
    assert located == Problem("data.path is missing", "data.path (command line)", "y", "set data.path")
    other = Problem("no host", "node-1", "", "wait")
    assert origins(folder).located(other) == other


@pytest.mark.parametrize(
    ("tokens", "name"),
    [
        (["model.path=./models/My model (1)/"], "My-model-1"),
        (["model.path=Qwen/Qwen3-8B"], "Qwen3-8B"),
        (["model.path=package:some_module/folder/name.Q4_1.gguf"], "name.Q4_1"),
        (["model.path=run:first@7"], "first"),
        (["model.path=Qwen/Qwen3-8B", "model.name=mine"], "mine"),
        (["model=llama3_1_8b", "model.path=/models/copy"], "llama3_1_8b"),
        ([], "smollm2_135m"),
    ],
)
def test_a_run_is_named_after_a_model_that_is_given_by_its_path_alone(
    compose: Callable[..., list[Composed]], tokens: list[str], name: str
) -> None:
    quoted = [token.replace("./models/My model (1)/", "'./models/My model (1)/'") for token in tokens]
    (composed,) = compose(*quoted)
    assert composed.config.model.name == name
