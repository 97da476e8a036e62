from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.cli.data import list_notes, list_numbers, summarize
from launcher.config.sections.data import DataSection, Source
from launcher.config.sections.train import TrainSection
from launcher.data.build import build
from launcher.data.loader import TrainBatches
from launcher.data.report import report as report_of
from launcher.data.split import Split
from launcher.data.tokenization.encoder import load_tokenizer
from launcher.plan.launch_plan import Batch, DataFacts

Jsonl = Callable[..., Path]
SECRET = "sk-proj-" + "aB3" * 12


def report(
    facts: DataFacts, data: DataSection, tokenizer: Path, num_shown: int = 0, stop_ids: Sequence[int] = (), **train: Any
) -> dict[str, Any]:
    settings = TrainSection(**{"epochs": 1, **train})
    return report_of(facts, data, load_tokenizer(str(tokenizer)).decode, settings, seed=0, stop_ids=stop_ids, num_shown=num_shown)


@pytest.fixture
def mixture(jsonl: Jsonl) -> DataSection:
    """Two sources of different lengths; the second contains a duplicate and an API key. One fifth is held out."""
    short = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(150)]
    long = [{"prompt": f"Count to {i}:", "completion": "".join(f" {n}" for n in range(i % 40 + 8))} for i in range(60)]
    long += [long[5], {"prompt": "Key?", "completion": f"the key is {SECRET}, row"}, {"prompt": "none", "completion": ""}]
    files = {"short": jsonl(short, "a.jsonl"), "long": jsonl(long, "b.jsonl")}
    sources = tuple(Source(name=name, path=str(file), completions="text") for name, file in files.items())
    return DataSection(sources=sources, max_length=64, eval_fraction=0.2, workers=1)


@pytest.fixture
def numbers(mixture: DataSection, tokenizer_dir: Path) -> dict[str, Any]:
    return report(build(mixture, str(tokenizer_dir)), mixture, tokenizer_dir)


def test_sources_add_up_to_the_mixture(numbers: dict[str, Any], mixture: DataSection, tokenizer_dir: Path) -> None:
    facts = build(mixture, str(tokenizer_dir))
    assert json.loads(json.dumps(numbers)) == numbers
    sources = numbers["sources"]
    assert [source["name"] for source in sources] == ["short", "long"]
    for key in ("read_documents", "dropped_documents", "truncated_documents", "documents", "tokens", "trained_tokens"):
        assert sum(source[key] for source in sources) == numbers[key], key
    assert numbers["read_documents"] + numbers["held_out"]["read_documents"] == 213
    assert numbers["documents"] == facts.num_docs == numbers["read_documents"] - numbers["dropped_documents"]
    assert (numbers["rows"], numbers["tokens"]) == (facts.num_rows, facts.num_tokens)
    assert numbers["trained_tokens"] == facts.num_trained_tokens
    assert numbers["held_out"]["tokens"] == facts.num_eval_tokens
    assert sum(source["frac"] for source in sources) == pytest.approx(1)
    assert all(0 < source["rows"] <= facts.num_rows for source in sources)
    for counts in (*sources, numbers, numbers["held_out"]):
        assert sum(bin_["documents"] for bin_ in counts["length_histogram"]) == counts["documents"]
    assert numbers["cache_bytes"] > facts.num_tokens * 5
    assert numbers["padding_frac"] == pytest.approx(facts.padding_frac)


def test_padding_of_single_documents_is_that_of_the_first_epochs_batches(mixture: DataSection, tokenizer_dir: Path) -> None:
    # Then the last batch, which is not compared, has few documents.
    data = mixture.model_copy(update={"packing": False, "eval_fraction": 0.0})
    facts = build(data, str(tokenizer_dir))
    size = {"global_batch_size": 16, "micro_batch_size": 4}
    batch = Batch(**size, accumulation=4, max_tokens_per_step=0, tokens_per_step=None, max_steps=1, epochs=None)
    batches = TrainBatches(Split.open(facts), batch, 0, 0, 1, 0, group_by_length=True)
    micros = [micro for step in range(facts.num_rows // 16) for micro in batches.step(step).micro]
    slots = sum(micro.input_ids.numel() for micro in micros)
    row_tokens = np.diff(Split.open(facts).rows)
    num_tokens = sum(int(row_tokens[list(micro.row_ids)].sum()) for micro in micros)
    data_report = report(facts, data, tokenizer_dir, **size)
    # The tolerance covers the incomplete last batch of the epoch.
    assert data_report["padding_frac"] == pytest.approx(1 - num_tokens / slots, abs=0.03)
    assert (data_report["padded_rows"], data_report["padding_is_most"]) == (4, False)
    most = report(facts, data, tokenizer_dir, global_batch_size=16)
    assert (most["padded_rows"], most["padding_is_most"]) == (16, True)
    assert most["padding_frac"] > data_report["padding_frac"]
    assert report(facts, data, tokenizer_dir, global_batch_size=16, micro_batch_size=1)["padding_frac"] == 0
    ((_, rows), *_) = summarize(most)
    assert f"at most {most['padding_frac']:.2%} padding in micro-batches of up to 16" in rows


def test_a_partly_used_source_is_reported(mixture: DataSection, tokenizer_dir: Path) -> None:
    short, long = mixture.sources
    sources = (short.model_copy(update={"epochs": 2.0}), long.model_copy(update={"max_tokens": 500}))
    data = mixture.model_copy(update={"sources": sources})
    data_report = report(build(data, str(tokenizer_dir)), data, tokenizer_dir)
    passes = data_report["sources"][1]["epochs"]
    assert 0 < passes < 1
    assert any(note.startswith(f"long: {passes:.2f} passes over it") for note in list_notes(data_report))
    header, *lines = list_numbers(data_report)
    assert [line[header.index("epochs")] for line in lines] == ["2.00", f"{passes:.2f}", "", ""]


def test_documents_outside_the_mixture_are_not_counted_as_truncated(jsonl: Jsonl, tokenizer_dir: Path) -> None:
    long = jsonl([{"prompt": f"What is {i}?", "completion": " word" * 100} for i in range(20)], "long.jsonl")
    short = jsonl([{"text": f"A short text, number {i}"} for i in range(10)], "short.jsonl")
    sources = (Source(name="long", path=str(long), weight=3), Source(name="short", path=str(short), weight=1, max_tokens=50))
    data = DataSection(sources=sources, max_length=64, eval_fraction=0, workers=1)
    data_report = report(build(data, str(tokenizer_dir)), data, tokenizer_dir)
    counts = data_report["sources"][0]
    assert 0 < counts["documents"] < 20
    assert counts["truncated_documents"] == counts["documents"]
    assert counts["unused_documents"] == 20 - counts["documents"]
    unused = [note for note in list_notes(data_report) if "not in the mixture" in note]
    assert [note.rpartition("its ")[2] for note in unused] == ["weight", "weight and max_tokens"]
    off = data.model_copy(update={"sources": (sources[0], sources[1].model_copy(update={"weight": 0.0}))})
    data_report = report(build(off, str(tokenizer_dir)), off, tokenizer_dir)
    assert any(note.startswith("short: not read") for note in list_notes(data_report))
    assert [line[0] for line in list_numbers(data_report)[1:]] == ["long"]


def test_findings_are_judged_by_the_current_settings(numbers: dict[str, Any], mixture: DataSection, tokenizer_dir: Path) -> None:
    by_name = {one["name"]: one for one in numbers["findings"]}
    assert by_name["empty_answer"]["action"] == "drop"
    (example,) = by_name["secrets"]["examples"]
    assert example["where"].endswith("b.jsonl:62")
    assert SECRET not in example["detail"]
    assert not numbers["refused"]
    strict = mixture.model_copy(update={"checks": mixture.checks.model_copy(update={"secrets": "fail"})})
    facts = build(strict, str(tokenizer_dir))
    assert facts.cache_dir == numbers["cache_dir"], "fail gives the tokens of keep"
    assert report(facts, strict, tokenizer_dir)["refused"]


def test_three_documents_are_shown_with_their_masks(numbers: dict[str, Any]) -> None:
    assert len(numbers["shown"]) == 3
    for shown in numbers["shown"]:
        (document,) = shown["documents"]
        assert [part["trained"] for part in document["parts"]] == [False, True]
        assert document["parts"][0]["text"].endswith(("=", ":"))
        assert document["parts"][1]["text"].endswith("<|im_end|>")


def test_rows_are_shown_whole_and_without_secrets(mixture: DataSection, tokenizer_dir: Path) -> None:
    facts = build(mixture, str(tokenizer_dir))
    shown = report(facts, mixture, tokenizer_dir, num_shown=10_000)["shown"]
    assert [one["row"] for one in shown] == list(range(facts.num_rows))
    documents = [document for one in shown for document in one["documents"]]
    assert len(documents) == facts.num_docs
    assert sum(document["tokens"] for document in documents) == facts.num_tokens
    assert {document["source"] for document in documents} == {"short", "long"}
    texts = ["".join(part["text"] for part in document["parts"]) for document in documents]
    assert sum("[API key: s…, 44 characters]" in text for text in texts) == 1
    assert SECRET not in json.dumps(shown)
    assert len(report(facts, mixture, tokenizer_dir, num_shown=2)["shown"]) == 2


ENDS = (
    "{% for m in messages %}{{ m.role }}:{% if m.role == 'user' %}{{ m.content }}{% else %}{% generation %}{{ m.content }}"
    "{{ '' if 'bare' in m.content else '<|endoftext|>' if loop.last else '<|im_end|>' }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


def test_the_report_lists_the_tokens_that_end_turns(jsonl: Jsonl, tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    end, in_between = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    template = tmp_path / "ends.jinja"
    template.write_text(ENDS)
    turns = [[f"{i}?", f"{i}.", "And?", f"{i + 1}."] for i in range(200)]
    # A special token at the end of the row's own text does not count as an end of turn.
    turns.append(["What begins a turn?", "It is a bare <|im_start|>"])
    roles = ("user", "assistant") * 2
    rows = [{"messages": [{"role": r, "content": text} for r, text in zip(roles, texts, strict=False)]} for texts in turns]
    data = DataSection(sources=(Source(path=str(jsonl(rows))),), max_length=64, chat_template=str(template), workers=1)
    facts = build(data, str(tokenizer_dir))
    assert facts.turn_end_ids == (end,)
    for stops, words in (
        ([in_between], "does not stop there, but the generation settings of the export do"),
        ([7, end], "stops there"),
    ):
        data_report = report(facts, data, tokenizer_dir, stop_ids=stops)
        assert data_report["turn_ends"] == [{"id": end, "token": "<|endoftext|>", "stops": end in stops}]
        said_of_end = dict(summarize(data_report))["end of turn"]
        assert f"<|endoftext|> (token {end})" in said_of_end
        assert said_of_end.endswith(words)
