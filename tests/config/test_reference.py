from __future__ import annotations

from pathlib import Path

import pytest

from launcher.config.command_line import GROUPS
from launcher.config.compose import conf_dir
from launcher.config.known_settings import settings
from launcher.config.reference import main, render

REPO = Path(__file__).resolve().parents[2]


def test_the_page_is_current() -> None:
    assert main(["--check", str(REPO / "docs" / "settings.md")]) == 0


def test_an_outdated_page_gives_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "docs" / "settings.md"
    assert main(["--check", str(page)]) == 1
    assert capsys.readouterr().err == f"{page} does not match the settings; write it with: make settings\n"
    assert not page.exists()
    assert main([str(page)]) == 0
    assert main(["--check", str(page)]) == 0
    page.write_text(page.read_text().replace("Peak learning rate.", "Learning rate."))
    assert main(["--check", str(page)]) == 1


def test_a_setting_of_two_clusters_is_described_for_each() -> None:
    static = render().split("\n### cluster=static\n")[1]
    assert "Unset: NNODES or the provider's variable" in static


def test_the_page_has_every_setting_and_every_option() -> None:
    page = render()
    for key in settings():
        assert f"`{key}`" in page or f"\n## {key}\n" in page
    folders = {folder.name for folder in conf_dir().iterdir() if folder.is_dir()}
    assert folders == set(GROUPS)
    for group in GROUPS:
        for file in (conf_dir() / group).glob("*.yaml"):
            assert f"- `{file.stem}`: " in page
            assert f"- `{file.stem}`: \n" not in page, f"{file} has no comment at its head"


@pytest.mark.parametrize(
    ("key", "type_", "default"),
    [
        ("model.dtype", "auto | bf16 | fp16 | fp32", "bf16"),
        ("train.max_steps", "int > 0 or null", "null"),
        ("optim.lr", "float > 0", "1e-05"),
        ("optim.betas", "[0 <= float <= 1, 0 <= float <= 1]", "[0.9, 0.95]"),
        ("data.eval_fraction", "0 <= float < 1", "0.0"),
        ("data.sources[].path", "text", None),
        ("deepspeed.hpz_partition_size", "int > 0 | node", "1"),
        ("tracking.tags", "list of name", "[]"),
        ("export.enabled", "true | false", "true"),
        ("model.config", "mapping or null", "null"),
    ],
)
def test_types_and_defaults_are_readable(key: str, type_: str, default: str | None) -> None:
    assert (settings()[key].type, settings()[key].default) == (type_, default)
