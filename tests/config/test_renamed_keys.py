"""A renamed key is refused with its exact replacement: on the command line, in files, in sweeps and by `resume`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli.main import main
from launcher.config.compose import Composed
from launcher.config.introspect import settings
from launcher.config.renamed_keys import RENAMED, renamed_override, renamed_setting
from launcher.config.resume import with_overrides
from launcher.errors import ConfigError, Problem

Refused = Callable[..., list[Problem]]
REPO = Path(__file__).parents[2]
PASSWORD = "s3://me:kanarienvogel@bucket/runs"
TOKEN = "hf_abcdefghijklmnopqrstuvwx"


def test_every_new_key_is_a_setting_and_no_old_key_is() -> None:
    assert set(RENAMED.values()) <= settings().keys()
    assert not RENAMED.keys() & settings().keys()


def test_no_source_or_guide_uses_an_old_key() -> None:
    files = [*REPO.glob("launcher/**/*.py"), *REPO.glob("docs/*.md"), *REPO.glob("*/README.md"), REPO / "README.md"]
    old_key = re.compile(rf"(?<![\w.])(?:{'|'.join(map(re.escape, RENAMED))})\b")
    using = {str(file.relative_to(REPO)) for file in files if old_key.search(file.read_text(encoding="utf-8"))}
    assert using == {"launcher/config/renamed_keys.py"}


@pytest.mark.parametrize("old", RENAMED)
@pytest.mark.parametrize("prefix", ["", "+", "++"])
def test_an_old_key_on_the_command_line_is_refused_with_its_replacement(old: str, prefix: str) -> None:
    problem = renamed_override(f"{prefix}{old}=50")
    assert problem == Problem(
        f"{old}: the name of this setting is {RENAMED[old]}",
        where="command line",
        value=f"{prefix}{old}=50",
        remedy=f"write {RENAMED[old]}=50",
    )


@pytest.mark.parametrize(
    ("token", "remedy"),
    [
        ("train.save_every=50,100", "write checkpoint.save_every=50,100"),
        ("train.mirror='s3://bucket/a b'", "write checkpoint.mirror='s3://bucket/a b'"),
        ("~train.mirror", "write ~checkpoint.mirror"),
        ("train.sample", "write eval.sample=..."),
    ],
)
def test_the_replacement_keeps_the_value_as_it_was_typed(token: str, remedy: str) -> None:
    problem = renamed_override(token)
    assert problem is not None
    assert problem.remedy == remedy


@pytest.mark.parametrize(
    "token", ["checkpoint.save_every=50", "train.max_steps=3", "train.save_every.x=3", "model=tiny", "--train.sample"]
)
def test_other_overrides_are_not_renamed(token: str) -> None:
    assert renamed_override(token) is None


def test_the_command_refuses_an_old_key_beside_other_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "train.save_every=50", "optim.lr=-1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "train.save_every: the name of this setting is checkpoint.save_every" in err
    assert "remedy: write checkpoint.save_every=50\n" in err
    assert "optim.lr: must be above 0" in err


def test_a_sweep_over_an_old_key_is_refused_once(refused: Refused) -> None:
    (problem,) = refused("-m", "train.save_every=50,100")
    assert problem.remedy == "write checkpoint.save_every=50,100"


def test_an_old_key_in_a_file_is_refused_with_file_and_line(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "conf/experiment/mine.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\ntrain:\n  max_steps: 3\n  keep_last: 4\n  mirror: s3://bucket/runs\n")
    keep, mirror = refused("--config-dir", str(tmp_path / "conf"), "experiment=mine")
    assert keep == Problem(
        "train.keep_last: the name of this setting is checkpoint.keep_last",
        where=f"{file}:4",
        value="4",
        remedy="write `keep_last: 4` in the section `checkpoint`",
    )
    assert (mirror.where, mirror.remedy) == (f"{file}:5", "write `mirror: s3://bucket/runs` in the section `checkpoint`")


def test_an_old_key_inside_a_mapping_on_the_command_line_is_refused(refused: Refused) -> None:
    (problem,) = refused("train={max_steps: 3, export: false}")
    assert (problem.where, problem.remedy) == ("command line", "write export.enabled=false")


def test_a_reference_to_an_old_key_is_refused(refused: Refused) -> None:
    (problem,) = refused("run.seed=${train.save_every}")
    assert problem.remedy == "write ${checkpoint.save_every}"


def test_resume_refuses_an_old_key(compose: Callable[..., list[Composed]]) -> None:
    config = compose("model=tiny")[0].config
    with pytest.raises(ConfigError) as error:
        with_overrides(config, ["train.keep_last=3", "+train.export=false"])
    assert [problem.remedy for problem in error.value.problems] == ["write checkpoint.keep_last=3", "write export.enabled=false"]


@pytest.mark.parametrize("value", [PASSWORD, TOKEN])
def test_the_remedy_never_shows_a_secret(shown: Callable[..., str], compose: Callable[..., list[Composed]], value: str) -> None:
    config = compose("model=tiny")[0].config
    with pytest.raises(ConfigError) as error:
        with_overrides(config, [f"train.mirror={value}"])
    in_file = renamed_setting("train.mirror", value, "mine.yaml:3")
    for text in (shown(f"train.mirror={value}"), str(error.value), str(in_file)):
        assert "checkpoint.mirror" in text
        assert value not in text
        assert "kanarienvogel" not in text
