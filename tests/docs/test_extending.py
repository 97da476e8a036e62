"""The examples of docs/extending.md work as they are printed there."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from doc_tools import REPO, Block, blocks
from plan_fixtures import config_of, plan_of

from launcher.clusters.base import BACKENDS, Cluster, cluster_for
from launcher.config.cluster_sections import SECTIONS
from launcher.data.sources import formats
from launcher.plan.launch_plan import LaunchPlan
from launcher.tracking import metrics

__all__ = ["config_of", "plan_of"]
PAGE = REPO / "docs/extending.md"
TABLES: tuple[dict[Any, Any], ...] = (BACKENDS, SECTIONS, formats.FORMATS, metrics.METRICS)


@pytest.fixture(autouse=True)
def unchanged_tables() -> Iterator[None]:
    """What an example registers is gone after its test."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


def examples() -> dict[str, list[Block]]:
    """The Python blocks of the page by the heading of their section."""
    sections: dict[str, list[Block]] = {}
    heading = ""
    for block in blocks(PAGE):
        headings = re.findall(r"^## (.+)$", block.before, re.MULTILINE)
        heading = headings[-1] if headings else heading
        if block.language == "python":
            sections.setdefault(heading, []).append(block)
    return sections


def execute(section: str) -> dict[str, Any]:
    """Run the example of a section and return its names."""
    names: dict[str, Any] = {"__name__": "example"}
    for block in examples()[section]:
        exec(compile(block.body, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_every_section_has_an_example() -> None:
    headings = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert list(examples()) == headings


def test_a_backend_of_the_page_has_the_whole_protocol_and_previews_its_job(
    plan_of: Callable[..., LaunchPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = execute("A cluster backend")
    module, _, name = BACKENDS["queue"].partition(":")
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: names[name]}))
    backend = cluster_for("queue")
    members = {member for member in (*vars(Cluster), *Cluster.__annotations__) if not member.startswith("_")}
    assert {member for member in members if not hasattr(backend, member)} == set()
    plan = plan_of()
    section = SECTIONS["queue"].model_validate({"kind": "queue", "queue": "long"})
    config = plan.config.model_copy(update={"cluster": section})
    shown = backend.preview(plan.model_copy(update={"config": config}))
    assert shown is not None
    assert shown.startswith("qsub -q long -N ")
    assert "launcher.worker.agent" in shown


def test_a_row_format_of_the_page_is_recognised() -> None:
    execute("A row format")
    row = {"front": "1 + 1?", "back": "2"}
    name = next(name for name, row_format in formats.FORMATS.items() if row_format.required_keys <= row.keys())
    document = formats.FORMATS[name].parse(row, "cards.jsonl:1")
    assert (document.prompt, document.completion) == ("1 + 1?\n", "2")


def test_a_metric_of_the_page_has_a_panel_in_the_workspace() -> None:
    from launcher.tracking.wandb.workspace import Target, as_json

    execute("A metric")
    assert "Experts in use" in json.dumps(json.loads(as_json(Target("demo"))))


def test_the_page_names_every_test_of_an_extension_point() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {file.name for file in Path(REPO / "tests").glob("test_extending_*.py") if file.name not in text} == set()
