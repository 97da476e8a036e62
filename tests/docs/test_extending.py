"""The examples in docs/extending.md and docs/extending-backends.md work as printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doc_tools import REPO, Block, blocks
from plan_fixtures import config_of, plan_of

from launcher.clusters.backends import BACKENDS, Cluster, cluster_for
from launcher.config.schema import SECTIONS
from launcher.data.loader import IGNORED, MicroBatch
from launcher.data.sources import formats
from launcher.evaluate import metrics as answer_metrics
from launcher.evaluate.metrics import GeneratedAnswer
from launcher.plan.gpu_types import GPUS
from launcher.plan.launch_plan import LaunchPlan
from launcher.plan.optimizers import OPTIMIZERS
from launcher.tracking import metrics
from launcher.train.objectives import OBJECTIVES

__all__ = ["config_of", "plan_of"]
PAGE, BACKENDS_PAGE = REPO / "docs/extending.md", REPO / "docs/extending-backends.md"
METRICS_PAGE = REPO / "docs/evaluation-metrics.md"
TABLES: tuple[dict[Any, Any], ...] = (
    *(BACKENDS, SECTIONS, formats.FORMATS, metrics.METRICS, GPUS, OPTIMIZERS, OBJECTIVES),
    answer_metrics.METRICS,
)


@pytest.fixture(autouse=True)
def unchanged_tables() -> Iterator[None]:
    """Remove what an example registers after its test."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)


def examples() -> dict[str, list[Block]]:
    """Return the Python blocks of the pages by section heading."""
    heading = "A cluster backend"
    sections = {heading: [block for block in blocks(BACKENDS_PAGE) if block.language == "python"]}
    # Only the last block: the one before it is a user's own function.
    metric = "An evaluation metric"
    sections[metric] = [block for block in blocks(METRICS_PAGE) if block.language == "python"][-1:]
    for block in blocks(PAGE):
        headings = re.findall(r"^## (.+)$", block.before, re.MULTILINE)
        heading = headings[-1] if headings else heading
        if block.language == "python":
            sections.setdefault(heading, []).append(block)
    return sections


def execute(section: str) -> dict[str, Any]:
    """Run a section's example and return the names it defines."""
    names: dict[str, Any] = {"__name__": "example"}
    for block in examples()[section]:
        exec(compile(block.body, str(PAGE), "exec", dont_inherit=True), names)
    return names


def test_every_section_has_an_example() -> None:
    headings = re.findall(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert list(examples()) == ["A cluster backend", "An evaluation metric", *headings]


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


def test_a_row_format_of_the_page_is_recognized() -> None:
    execute("A row format")
    row = {"front": "1 + 1?", "back": "2"}
    name = next(name for name, row_format in formats.FORMATS.items() if row_format.required_keys <= row.keys())
    document = formats.FORMATS[name].parse(row, "cards.jsonl:1")
    assert (document.prompt, document.completion) == ("1 + 1?\n", "2")


def test_an_objective_of_the_page_sums_over_the_trained_tokens() -> None:
    execute("A training objective")
    logits, labels = torch.randn(1, 4, 10), torch.tensor([[3, IGNORED, 5, IGNORED]])
    micro = MicroBatch(torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None], labels, (0,))
    loss = OBJECTIVES["label_smoothed"].sum_loss(lambda ids, positions: logits, micro, torch.device("cpu"), scale=0.5)
    logs = logits.log_softmax(-1)
    expected = -sum(0.9 * logs[0, i, labels[0, i]] + 0.1 * logs[0, i].mean() for i in (0, 2))
    assert loss.num_atoms == 2
    torch.testing.assert_close(loss.total, 0.5 * expected)


def test_an_optimizer_of_the_page_keeps_the_states_that_its_row_names(plan_of: Callable[..., LaunchPlan]) -> None:
    names = execute("An optimizer")
    parameter = torch.nn.Parameter(torch.ones(3))
    plan = plan_of("optim.name=sgd")
    optimizer = names["build_sgd"]([{"params": [parameter]}], plan.config.optim, plan.config.deepspeed)
    parameter.sum().backward()
    optimizer.step()
    assert tuple(optimizer.state[parameter]) == OPTIMIZERS["sgd"].states
    assert OPTIMIZERS["sgd"].classes == (f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",)
    assert plan.checkpoint_bytes == 8 * plan.model.num_params


def test_a_gpu_type_of_the_page_gives_a_plan_its_memory_and_price(plan_of: Callable[..., LaunchPlan]) -> None:
    execute("A GPU type")
    plan = plan_of("cluster.gpu_type=X100-96GB", "cluster.ranks_per_node=8")
    assert plan.memory.device_gib == 95.5
    assert plan.price is not None
    assert plan.price.usd_per_gpu_hour == 4.25


def test_a_metric_of_the_page_has_a_panel_in_the_workspace() -> None:
    from launcher.tracking.wandb.workspace import Target, as_json

    execute("A metric")
    assert "Experts in use" in json.dumps(json.loads(as_json(Target("demo"))))


def test_an_evaluation_metric_of_the_page_scores_answers() -> None:
    execute("An evaluation metric")
    metric = answer_metrics.METRICS["contains"]
    assert metric.score(GeneratedAnswer("It is a Red apple.", True, 5), "red") == 1
    assert metric.score(GeneratedAnswer("It is green.", True, 3), "red") == 0
    assert metric.reference_problem(" ", answer_metrics.MetricOptions()) == "has no words"


def test_the_page_names_every_test_of_an_extension_point() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (PAGE, BACKENDS_PAGE, METRICS_PAGE))
    assert {file.name for file in Path(REPO / "tests").glob("test_extending_*.py") if file.name not in text} == set()
