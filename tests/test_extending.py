"""Every extension point: a table that gets one more entry, and what follows from it; examples of the guides work as printed."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest.mock import MagicMock

import pytest
import torch
from doc_tools import REPO, Block, blocks
from extension_ranks import MOMENTUM_SGD
from forked_ranks import RankServer
from plan_fixtures import CPU, DATA, ConfigOf, PlanOf, config_of, facts_for, plan_lines, plan_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher import facts
from launcher.checkpoint.state import State
from launcher.cli.main import main
from launcher.cli.render import terminal
from launcher.cli.report import _read_run_files, page
from launcher.cli.status import status_rows, summarize
from launcher.clusters.backends import BACKENDS
from launcher.config.schema import SECTIONS, RunConfig
from launcher.config.sections.data import COLUMNS, DataSection, Source
from launcher.config.sections.evaluation import AnswerMetrics
from launcher.data.build import build
from launcher.data.checks import findings
from launcher.data.sources.documents import Document, Row, read_value
from launcher.data.sources.formats import FORMATS, RowFormat
from launcher.data.split import Split
from launcher.errors import ConfigError, DataError
from launcher.evaluate.metrics import METRICS as ANSWER_METRICS
from launcher.evaluate.metrics import AnswerMetric, AnswerScorer, GeneratedAnswer, MetricOptions, copy_metric_files
from launcher.evaluate.verdict import judge
from launcher.plan.gpu_types import GPUS, PRICE_ASSUMPTION, GpuType, Price, recognize
from launcher.plan.launch_plan import DeviceFacts, Facts
from launcher.plan.optimizers import OPTIMIZERS
from launcher.plan.planner import plan
from launcher.plan.run_dir import RunDir
from launcher.runs import run_store
from launcher.tracking.jsonl import JsonlTracker
from launcher.tracking.metrics import METRICS, Curve, Metric, Part
from launcher.tracking.tracker import ConsoleTracker
from launcher.tracking.wandb.project import Target, as_json
from launcher.tracking.wandb.tracker import Session
from launcher.train.monitoring.step_metrics import find_peak_tflops

__all__ = ["config_of", "plan_of"]
METRIC = "perf/experts_used_frac"
GPU_ROW = GpuType(95.5, bf16=1200, tf32=600, fp32=80, memory_tbs=4.0, usd_per_hour=4.25, names=r"\bx100\b")
DEVICE = DeviceFacts(kind="cuda", name="NVIDIA X100 96GB HBM3", count=8, memory_gib=95.2)
PAGE = REPO / "docs/extending.md"
METRICS_PAGE = REPO / "docs/evaluation-metrics.md"
TABLES: tuple[dict[Any, Any], ...] = (
    *(BACKENDS, SECTIONS, FORMATS, METRICS, GPUS, OPTIMIZERS),
    ANSWER_METRICS,
)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fake a prepared model and data in the test's own folder; preparing them would take a process several seconds."""

    findings.write(tmp_path, ())
    data = DATA.model_copy(update={"cache_dir": str(tmp_path)})

    def gather(config: RunConfig, found: object, overrides: object, here: DeviceFacts | None) -> Facts:
        return facts_for(config, here or CPU, data, working_dir=str(tmp_path))

    monkeypatch.setattr(facts, "gather", gather)
    monkeypatch.setattr(facts, "find_prepared_data", lambda config, found: (data, {}))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("prepared")
def test_an_unknown_kind_of_cluster_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=tiny", "cluster.kind=k8s"]) == 2
    assert "choose one of: local, slurm, ray" in capsys.readouterr().err


def parse_flashcard(row: Row, where: str) -> Document:
    return Document(where, prompt=f"{read_value(row, 'front', str, where)}\n", text=read_value(row, "back", str, where))


def save_byte_tokenizer(folder: Path) -> Path:
    """A tokenizer with one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate([*alphabet, "</s>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    return folder


def test_an_added_format_is_recognized_and_its_rows_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(FORMATS, "flashcards", RowFormat(parse_flashcard, required_keys=frozenset({"front", "back"})))
    path = tmp_path / "cards.jsonl"
    path.write_text(
        "".join(json.dumps({"front": f"{i} + {i}?", "back": str(2 * i), "deck": "sums"}) + "\n" for i in range(10, 20))
    )
    tokenizer = save_byte_tokenizer(tmp_path / "tokenizer")
    facts = build(DataSection(sources=(Source(path=str(path)),), max_length=64, workers=1), str(tokenizer))
    assert facts.num_docs == 10
    split = Split.open(facts)
    first = slice(split.docs[0], split.docs[1])
    trained = split.tokens[first][split.trained[first] == 1].tolist()
    decoded = PreTrainedTokenizerFast.from_pretrained(str(tokenizer)).decode(trained)
    assert decoded in {f"{2 * i}</s>" for i in range(10, 20)}


def test_the_settings_name_the_formats_of_the_table() -> None:
    assert get_args(Source.model_fields["format"].annotation) == ("auto", *FORMATS)


def test_the_columns_of_the_settings_are_keys_of_the_formats() -> None:
    keys = {key for row_format in FORMATS.values() for key in row_format.keys}
    # `functions` is OpenAI's older name for `tools`.
    assert set(COLUMNS) == keys - {"functions"}


@pytest.mark.rest
def test_a_registered_objective_is_trained_and_evaluated(config_of: ConfigOf, rank_server: RankServer, tmp_path: Path) -> None:
    settings = ("optim.lr=0.01", "model.dtype=fp32", "run.name=own", "train.global_batch_size=2", "train.micro_batch_size=1")
    config = config_of("model=tiny", *settings, "cluster.ranks_per_node=1")
    path = tmp_path / "plan.json"
    path.write_text(plan(config, facts_for(config, working_dir=str(tmp_path), vocab_size=1000)).to_json())
    (result,) = rank_server.values("extension_ranks:train_with_label_smoothing", [[str(path)]], tmp_path / "ranks")
    # Random weights predict a nearly uniform distribution, whose loss is log(vocabulary) with any smoothing.
    assert result["losses"][0] == pytest.approx(math.log(1000), rel=0.02)
    assert result["losses"][0] > result["losses"][-1]
    # The held-out loss is the mean over the same trained tokens, after the last step.
    assert result["held_out"] < result["losses"][-1]
    assert result["num_atoms"] == 2 * 15


def test_memory_disk_and_deepspeed_settings_follow_from_the_states(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", MOMENTUM_SGD)
    adamw, sgd = plan_of("optim.name=adamw"), plan_of("optim.name=sgd")
    num_params = adamw.model.num_params
    # Master weights and one optimizer state, instead of two.
    assert (adamw.checkpoint_bytes, sgd.checkpoint_bytes) == (12 * num_params, 8 * num_params)
    assert sgd.memory.optimizer_gib == pytest.approx(adamw.memory.optimizer_gib * 8 / 12, abs=1e-3)
    assert sgd.saving.host_gib_per_node == pytest.approx(adamw.saving.host_gib_per_node * 8 / 12, abs=1e-3)
    assert sgd.deepspeed == adamw.deepspeed | {"zero_allow_untested_optimizer": True}


def test_an_optimizer_with_more_states_gets_more_buffers_on_nvme(plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "three", OPTIMIZERS["adamw"].__class__(("a", "b", "c"), "m:f", ("m.C",)))
    on_nvme = ("deepspeed=zero3_nvme", "deepspeed.nvme_path=/nvme")
    offload = plan_of("optim.name=three", *on_nvme).deepspeed["zero_optimization"]["offload_optimizer"]
    assert offload["buffer_count"] == 5
    assert "buffer_count" not in plan_of(*on_nvme).deepspeed["zero_optimization"]["offload_optimizer"]


def test_a_plan_refuses_an_unknown_optimizer_and_one_that_cannot_be_offloaded(
    plan_of: PlanOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", MOMENTUM_SGD)
    with pytest.raises(ConfigError) as unknown:
        plan_of("optim.name=adam")
    (problem,) = unknown.value.problems
    assert (problem.where, problem.value, problem.remedy) == ("optim.name", "adam", "choose one of: adamw, sgd")
    with pytest.raises(ConfigError, match="the states of sgd cannot be offloaded"):
        plan_of("optim.name=sgd", "deepspeed=zero3_offload")


def test_a_state_file_that_names_no_optimizer_states_has_those_of_adamw() -> None:
    file = {"parameters": {}, "optimizer_step": 1, "loss_scaler": {}, "engine": {}, "extra": {}}
    assert State.model_validate(file).optimizer_states == ("exp_avg", "exp_avg_sq")


@pytest.mark.rest
def test_two_ranks_train_with_it_and_one_resumes_with_the_same_losses(
    config_of: ConfigOf, rank_server: RankServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sgd", MOMENTUM_SGD)

    def write_plan(num_ranks: int) -> str:
        settings = ("optim.name=sgd", "optim.lr=0.5", "model.dtype=fp32", "run.name=sgd", "train.global_batch_size=2")
        config = config_of("model=tiny", *settings, f"cluster.ranks_per_node={num_ranks}")
        path = tmp_path / f"plan-{num_ranks}.json"
        path.write_text(plan(config, facts_for(config, working_dir=str(tmp_path), vocab_size=1000)).to_json())
        return str(path)

    def train(num_ranks: int, *steps: int) -> list[dict[str, Any]]:
        arguments = [(write_plan(num_ranks), *steps)] * num_ranks
        return rank_server.values("extension_ranks:train_with_momentum_sgd", arguments, tmp_path / f"ranks-{num_ranks}")

    straight, _ = train(2, 0, 2, 4)
    (resumed,) = train(1, 2, 0, 4)
    assert straight["tensors"] == ["fp32", "momentum_buffer"]
    states = "momentum_buffer in the checkpoint, velocity in this run's optimizer"
    assert straight["refusal"] == resumed["refusal"] == f"the checkpoint holds the states of another optimizer: {states}"
    assert straight["losses"][0] > straight["losses"][2]
    assert resumed["losses"] == pytest.approx(straight["losses"][2:], rel=1e-6)


@pytest.fixture
def added_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Metric(
        "Throughput",
        "Experts in use",
        curve=Curve("Share of experts in use", 100.0, "%"),
        status=Part("{:.0%} in use".format, "experts"),
        console=Part("experts {:.2f}".format),
        lowest="best/experts_used_frac",
    )
    monkeypatch.setitem(METRICS, METRIC, metric)


@pytest.fixture
def run(run: RunDir, added_metric: None) -> RunDir:
    """A run that logged the metric at two steps."""
    log = JsonlTracker(run, 1)
    for step, frac in ((1, 0.5), (2, 0.25)):
        log.log(step, {"train/loss": 2.0, METRIC: frac})
    log.finish("completed")
    run_store.update_status(run, state="completed", attempt=1, step=2, max_steps=2)
    return run


def test_status_shows_the_metric(run: RunDir) -> None:
    lines = terminal.to_lines(status_rows(summarize(run, run_store.read_status(run))))
    assert "experts     25% in use" in lines


def test_the_report_has_a_chart_of_the_metric(run: RunDir) -> None:
    assert "<h3>Share of experts in use</h3>" in page([_read_run_files(run, "demo")])


@pytest.mark.usefixtures("added_metric")
def test_the_console_line_ends_with_the_metric() -> None:
    stream = io.StringIO()
    ConsoleTracker(2, stream).log(1, {"train/loss": 2.0, METRIC: 0.5})
    assert stream.getvalue() == "step   1/2  loss 2.000  experts 0.50\n"


@pytest.mark.usefixtures("added_metric")
def test_the_workspace_has_a_panel_of_the_metric() -> None:
    spec = json.loads(as_json(Target("demo")))["spec"]
    sections = {part["name"]: part["panels"] for part in spec["section"]["panelBankConfig"]["sections"]}
    shown = {panel["config"]["chartTitle"]: panel["config"]["metrics"] for panel in sections["Throughput"]}
    assert shown["Experts in use"] == [METRIC]


def test_wandb_defines_the_metric_over_the_steps_and_keeps_its_lowest_value(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_run = MagicMock(offline=True, resumed=False, dir=str(run.root / "wandb/offline-run/files"))
    library = SimpleNamespace(init=lambda **settings: wandb_run, Settings=dict, teardown=lambda **settings: None)
    monkeypatch.setitem(sys.modules, "wandb", library)
    session = Session(run_store.load_plan(run), run, offline=True, on_stop=lambda: None)
    wandb_run.define_metric.assert_any_call(METRIC, step_metric="trainer/step")
    session.catch_up(3)
    session.finish("completed")
    wandb_run.summary.update.assert_any_call({"best/experts_used_frac": 0.25, "best/experts_used_frac_step": 2})


ANSWER_ROW = AnswerMetric(
    lambda answer, reference, options: answer.text[:1] == reference[:1],
    lambda reference, options: "" if reference else "is empty",
)


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AnswerScorer:
    monkeypatch.setitem(ANSWER_METRICS, "first_letter", ANSWER_ROW)
    settings = AnswerMetrics.model_construct(metrics=("first_letter",))
    copy_metric_files(settings, tmp_path)
    return AnswerScorer(settings, tmp_path)


def test_a_metric_that_is_added_decides_the_verdict(scorer: AnswerScorer) -> None:
    references, places = ["yes", "no"] * 10, [f"r.jsonl:{n}" for n in range(20)]
    answers = {"0-shot": ["what"] * 20, "tuned": ["y", "n"] * 10}
    scores = {
        side: scorer.score("first_letter", [GeneratedAnswer(text, True, 1) for text in texts], references, places)
        for side, texts in answers.items()
    }
    assert judge("first_letter", scores).sentence.startswith("Fine-tuning helped: first letter 1.00 against 0.00 (0-shot)")


def test_a_metric_that_is_added_refuses_references(scorer: AnswerScorer) -> None:
    with pytest.raises(DataError, match="first_letter cannot score 1 of 2 references: the first one is empty"):
        scorer.check_references(["yes", ""], ["r.jsonl:1", "r.jsonl:2"])


@pytest.fixture
def added_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GPUS, "X100-96GB", GPU_ROW)


@pytest.mark.usefixtures("added_gpu")
def test_a_gpu_type_that_is_added_gives_a_plan_memory_and_price(plan_of: PlanOf) -> None:
    planned = plan_of("cluster.gpu_type=X100-96GB", "cluster.ranks_per_node=8")
    assert planned.topology.device == "cuda"
    assert planned.memory.device_gib == 95.5
    assert planned.price == Price(4.25, PRICE_ASSUMPTION)
    assert any("$34.00 an hour = 8 GPUs x $4.25" in line for line in plan_lines(planned))


@pytest.mark.usefixtures("added_gpu")
def test_a_gpu_type_that_is_added_is_recognized_by_its_drivers_name(plan_of: PlanOf) -> None:
    assert recognize(DEVICE.name) == "X100-96GB"
    assert plan_of(device=DEVICE).price == Price(4.25, PRICE_ASSUMPTION)


@pytest.mark.usefixtures("added_gpu")
def test_a_gpu_type_that_is_added_has_a_peak(config_of: ConfigOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICE.name)
    assert find_peak_tflops(config_of("model.dtype=bf16"), torch.device("cuda", 0)) == 1200


def test_a_gpu_type_that_is_not_in_the_table_is_refused(plan_of: PlanOf) -> None:
    with pytest.raises(ConfigError, match=r"cluster\.gpu_type=X100-96GB is not in the table of GPU types"):
        plan_of("cluster.gpu_type=X100-96GB", "cluster.ranks_per_node=8")


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
    heading, sections = "", dict[str, list[Block]]()
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
    assert list(examples()) == ["An evaluation metric", *headings]


def test_an_optimizer_of_the_page_keeps_the_states_that_its_row_names(plan_of: PlanOf) -> None:
    names = execute("An optimizer")
    parameter = torch.nn.Parameter(torch.ones(3))
    plan = plan_of("optim.name=sgd")
    optimizer = names["build_sgd"]([{"params": [parameter]}], plan.config.optim, plan.config.deepspeed)
    parameter.sum().backward()
    optimizer.step()
    assert tuple(optimizer.state[parameter]) == OPTIMIZERS["sgd"].states
    assert OPTIMIZERS["sgd"].classes == (f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",)
    assert plan.checkpoint_bytes == 8 * plan.model.num_params


def test_a_gpu_type_of_the_page_gives_a_plan_its_memory_and_price(plan_of: PlanOf) -> None:
    execute("A GPU type")
    plan = plan_of("cluster.gpu_type=X100-96GB", "cluster.ranks_per_node=8")
    assert plan.memory.device_gib == 95.5
    assert plan.price is not None
    assert plan.price.usd_per_gpu_hour == 4.25


def test_a_metric_of_the_page_has_a_panel_in_the_workspace() -> None:
    execute("A metric")
    assert "Experts in use" in json.dumps(json.loads(as_json(Target("demo"))))


def test_an_evaluation_metric_of_the_page_scores_answers() -> None:
    execute("An evaluation metric")
    metric = ANSWER_METRICS["contains"]
    assert metric.score(GeneratedAnswer("It is a Red apple.", True, 5), "red", MetricOptions()) == 1
    assert metric.score(GeneratedAnswer("It is green.", True, 3), "red", MetricOptions()) == 0
    assert metric.reference_problem(" ", MetricOptions()) == "has no words"
